package spireapi

import (
	"context"
	"log/slog"
	"net/netip"
	"path"
	"sync"
	"sync/atomic"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/listen"
	"github.com/renewd/renewd/internal/loglimit"
)

// budget is the kind of rate limit that a call counts against.
type budget int

const (
	attesting budget = iota
	signingX509
	signingJWT
	posting
	reporting
	budgets // the number of budgets
)

// Limits are the limits of each client, as [listen.Client] distinguishes them; zero means
// no limit. The rates are of one second, and as many calls may come at once. Each item of
// a batch counts.
type Limits struct {
	listen.Limits
	Attestations        int
	X509SVIDs, JWTSVIDs int // an agent SVID that is renewed is an X.509-SVID
	Statuses, Reports   int
}

// DefaultLimits are the usual limits. The rates are those of a SPIRE server. Reports have
// a limit of their own, the same as statuses: an agent sends one of each a minute, and a
// report every few seconds during a taint wave. An agent has two connections while it
// reconnects. Together with maxRequest the limits bound the memory for a client's requests:
// 4 MiB without an agent SVID, 256 MiB for one agent.
var DefaultLimits = Limits{
	Limits:       listen.Limits{Handshakes: 64, Anonymous: 16, Known: 2048, Caller: 16, AnonymousCalls: 4, CallerCalls: 2 * maxStreams},
	Attestations: 1, X509SVIDs: maxBatch, JWTSVIDs: 500, Statuses: 10, Reports: 10,
}

// rate returns the rate of a budget and how many items may come at once: those of a
// second, and a full batch.
func (l Limits) rate(b budget) (perSecond, burst int) {
	switch b {
	case attesting:
		perSecond = l.Attestations
	case signingX509:
		return l.X509SVIDs, max(l.X509SVIDs, maxBatch)
	case signingJWT:
		perSecond = l.JWTSVIDs
	case posting:
		perSecond = l.Statuses
	case reporting:
		perSecond = l.Reports
	}
	return perSecond, perSecond
}

// ClientLimits are the limits of all clients. It must not be modified.
type ClientLimits struct {
	Default Limits
	// Networks are the limits of each client in a network, instead of Default. Of several
	// networks the smallest counts. An IPv6 client is a /64, so no network is smaller.
	Networks map[netip.Prefix]Limits
}

// For returns the limits of a client; Default for the zero Prefix.
func (l *ClientLimits) For(client netip.Prefix) Limits {
	found, bits := l.Default, -1
	for network, limits := range l.Networks {
		if network.Bits() > bits && client.IsValid() && network.Contains(client.Addr()) {
			found, bits = limits, network.Bits()
		}
	}
	return found
}

// methodBudgets are the methods that are limited. Each item of a batch counts.
var methodBudgets = map[string]budget{
	agentv1.Agent_AttestAgent_FullMethodName:    attesting,
	agentv1.Agent_RenewAgent_FullMethodName:     signingX509,
	svidv1.SVID_BatchNewX509SVID_FullMethodName: signingX509,
	svidv1.SVID_NewJWTSVID_FullMethodName:       signingJWT,
	agentv1.Agent_PostStatus_FullMethodName:     posting,
	api.Fleet_Report_FullMethodName:             reporting,
}

const (
	// maxWait is the longest that a call is delayed. It is less than graceAge, so
	// that a call is not cut off after its delay.
	maxWait = 30 * time.Second
	// maxWaiting is how many calls of one client may wait for one budget: more
	// than one connection can have open, and no more requests in memory than two
	// connections can send.
	maxWaiting = 2 * maxStreams
	// maxClients is how many clients are distinguished, which takes 50 MB at most.
	// A client needs a handshake to be counted, so its address cannot be forged.
	maxClients = 1 << 16
	// maxPerSite is how many clients of one IPv6 /48 are distinguished. The others
	// of that /48 share one budget: a /48 has as many /64s as maxClients.
	maxPerSite = 1 << 10
	// generationTime is how long an idle client is kept at least. It is more than
	// the minute between two statuses of an agent, and more than maxWait and a
	// second, after which every budget is full: so a client gains nothing by being
	// evicted.
	generationTime = 2 * time.Minute
	// connecting is the method, in the metrics, of a connection that is refused.
	connecting = "connect"
)

// limits are the rate limits of all clients, as [listen.Client] distinguishes them.
// A client without an IP address is not limited.
//
// Clients are kept in two generations. A client that makes a call is moved to the
// young one. After generationTime the old generation is evicted, and the young one
// becomes the old one. The number of clients never causes an eviction: once
// maxClients are kept, all further clients share the overflow client.
type limits struct {
	observer Observer
	lines    *loglimit.Log
	of       atomic.Pointer[ClientLimits]

	mu         sync.Mutex // never held while a call waits
	young, old generation
	createdAt  time.Time // of the young generation
	overflow   client    // shared by all clients beyond maxClients
}

// generation holds clients, and how many there are of each site.
type generation struct {
	clients map[netip.Prefix]*client
	perSite map[netip.Prefix]int
}

func newGeneration() generation {
	return generation{clients: make(map[netip.Prefix]*client), perSite: make(map[netip.Prefix]int)}
}

func (g generation) add(from netip.Prefix, c *client) {
	g.clients[from] = c
	if site := listen.Site(from); site.IsValid() {
		g.perSite[site]++
	}
}

func (g generation) remove(from netip.Prefix) {
	delete(g.clients, from)
	if site := listen.Site(from); site.IsValid() {
		if g.perSite[site]--; g.perSite[site] == 0 {
			delete(g.perSite, site)
		}
	}
}

// client holds the budgets of one client. It is guarded by limits.mu.
type client struct{ queues [budgets]queue }

// queue is a budget and the number of calls that wait for it, in order of arrival.
type queue struct {
	tokens  *rate.Limiter // nil before the first call
	waiting int
}

func newLimits(observer Observer, lines *loglimit.Log) *limits {
	return &limits{observer: observer, lines: lines, young: newGeneration(), old: newGeneration(), createdAt: time.Now()}
}

// wait returns when a call of n items may proceed, and whether it was delayed. It
// waits for maxWait at most, and at most half of the time until ctx's deadline: the
// call needs the rest, and a join token that is spent for a caller that has left is
// lost. A call that would have to wait longer is refused at once, with
// ResourceExhausted, and does not count. If ctx ends, its error is returned.
func (l *limits) wait(ctx context.Context, method string, n int) (waited bool, err error) {
	kind, ok := methodBudgets[method]
	if !ok || n > maxBatch { // the method refuses such a batch
		return false, nil
	}
	p, ok := peer.FromContext(ctx)
	if !ok {
		return false, nil
	}
	from := listen.Client(p.Addr)
	perSecond, burst := l.of.Load().For(from).rate(kind)
	if !from.IsValid() || perSecond == 0 {
		return false, nil
	}
	l.mu.Lock()
	now := time.Now()
	c := l.findLocked(from, now)
	q := &c.queues[kind]
	switch limit := rate.Limit(perSecond); {
	case q.tokens == nil:
		q.tokens = rate.NewLimiter(limit, burst)
	case q.tokens.Limit() != limit: // the limits were reloaded, or the budget is shared
		q.tokens.SetLimitAt(now, limit)
		q.tokens.SetBurstAt(now, burst)
	}
	if q.tokens.AllowN(now, n) {
		l.mu.Unlock()
		return false, nil
	}
	room := q.waiting < maxWaiting
	if room {
		q.waiting++
	}
	l.mu.Unlock()

	if room {
		err = q.turn(ctx, n)
		l.mu.Lock()
		q.waiting--
		l.mu.Unlock()
	}
	var refused error
	switch {
	case ctx.Err() != nil:
		err = status.FromContextError(ctx.Err()).Err()
	case err != nil || !room:
		err = status.Errorf(codes.ResourceExhausted, "rate limit of %d a second exceeded by %s: try again later", perSecond, from)
		refused = err
	}
	l.report(from, path.Base(method), refused)
	return true, err
}

// turn waits for n tokens.
func (q *queue) turn(ctx context.Context, n int) error {
	limit := maxWait
	if end, ok := ctx.Deadline(); ok {
		limit = min(limit, time.Until(end)/2)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return q.tokens.WaitN(ctx, n)
}

// findLocked returns a client, which is added if there is room.
func (l *limits) findLocked(from netip.Prefix, now time.Time) *client {
	if now.Sub(l.createdAt) >= generationTime {
		l.old, l.young, l.createdAt = l.young, newGeneration(), now
	}
	c := l.touchLocked(from)
	if site := listen.Site(from); c == nil && site.IsValid() && l.young.perSite[site]+l.old.perSite[site] >= maxPerSite {
		from = site
		c = l.touchLocked(site)
	}
	switch {
	case c != nil:
		return c
	case len(l.young.clients)+len(l.old.clients) >= maxClients:
		return &l.overflow
	}
	c = new(client)
	l.young.add(from, c)
	return c
}

// touchLocked returns a client, moved to the young generation; nil if it is not kept.
func (l *limits) touchLocked(from netip.Prefix) *client {
	if c, ok := l.young.clients[from]; ok {
		return c
	}
	c, ok := l.old.clients[from]
	if !ok {
		return nil
	}
	l.old.remove(from)
	l.young.add(from, c)
	return c
}

// connections returns the limits of a client's connections and calls in flight.
func (l *limits) connections(client netip.Prefix) listen.Limits {
	return l.of.Load().For(client).Limits
}

// refuse reports a call or connection that listen.Serve refused.
func (l *limits) refuse(from netip.Prefix, method string, reason error) {
	if method == "" {
		method = connecting
	}
	l.report(from, path.Base(method), reason)
}

// report counts and logs a call or connection that exceeded a limit. refused is why
// it is refused, nil if it was delayed.
func (l *limits) report(from netip.Prefix, method string, refused error) {
	l.observer.Limited(method)
	address := listen.Name(from)
	attrs := []any{"address", address, "method", method}
	if refused == nil {
		l.lines.Note(slog.LevelInfo, "rate limited, calls delayed", address, attrs...)
		return
	}
	l.lines.Note(slog.LevelWarn, "rate limited, calls rejected", address, append(attrs, "error", refused)...)
}
