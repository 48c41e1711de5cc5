package spireapi

import (
	"context"
	"log/slog"
	"net/netip"
	"path"
	"sync"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/listen"
)

// budget is what calls of one kind draw from.
type budget int

const (
	attesting budget = iota
	signingX509
	signingJWT
	posting
	reporting
	budgets // how many there are
)

// perSecond are the budgets of one client, those of a SPIRE server. What a
// second gives is also what can be saved up. Reports are limited like statuses,
// which they accompany, and apart from them: an agent sends one of each a
// minute, and during a wave a report every few seconds.
var perSecond = [budgets]int{attesting: 1, signingX509: maxBatch, signingJWT: 500, posting: 10, reporting: 10}

// limited are the methods that are limited. Of a batch, each item counts.
var limited = map[string]budget{
	agentv1.Agent_AttestAgent_FullMethodName:    attesting,
	agentv1.Agent_RenewAgent_FullMethodName:     signingX509,
	svidv1.SVID_BatchNewX509SVID_FullMethodName: signingX509,
	svidv1.SVID_NewJWTSVID_FullMethodName:       signingJWT,
	agentv1.Agent_PostStatus_FullMethodName:     posting,
	api.Fleet_Report_FullMethodName:             reporting,
}

const (
	// maxPatience is the longest that a call waits for its turn. It is less
	// than graceAge, so that no call is cut off after it has had its turn.
	maxPatience = 30 * time.Second
	// maxWaiting is how many calls of one client may wait for one budget: more
	// than one connection can have open, and no more requests in memory than two
	// connections can send.
	maxWaiting = 2 * maxStreams
	// maxClients is how many clients are told apart: 50 MB at most. They are
	// found by their own handshakes, which nobody can make in another's name.
	maxClients = 1 << 16
	// maxOfSite is how many clients of one IPv6 /48 are told apart. The others of it
	// are one client together: a /48 has as many /64s as maxClients.
	maxOfSite = 1 << 10
	// generationTime is how long a client is remembered at least. It is more than
	// the minute between two statuses of an agent, and more than maxPatience
	// and a second, when every budget is full again: so to be forgotten is of
	// no use to anybody.
	generationTime = 2 * time.Minute
	// connecting stands in the metrics for the method of a connection that is
	// refused.
	connecting = "connect"
)

// limits is what every client may ask for, as [listen.Client] tells them apart. Who
// comes without an IP address is not limited.
//
// Clients are kept in two generations. Who is seen is in the young one; when that
// is old enough it becomes the old one, and who was in the old one until
// then is forgotten. Time alone does that, never the number of clients: when
// maxClients are known, those that are not are one client together, and the known
// ones keep what they have.
type limits struct {
	observer Observer
	lines    *listen.Lines

	mu         sync.Mutex // never held while a call waits
	young, old generation
	born       time.Time // of the young generation
	strangers  client    // who comes when maxClients are known
}

// generation is the clients that were seen in a time, and how many of each site
// they are.
type generation struct {
	clients map[netip.Prefix]*client
	of      map[netip.Prefix]int
}

func newGeneration() generation {
	return generation{clients: make(map[netip.Prefix]*client), of: make(map[netip.Prefix]int)}
}

func (g generation) add(from netip.Prefix, c *client) {
	g.clients[from] = c
	if site := listen.Site(from); site.IsValid() {
		g.of[site]++
	}
}

func (g generation) remove(from netip.Prefix) {
	delete(g.clients, from)
	if site := listen.Site(from); site.IsValid() {
		if g.of[site]--; g.of[site] == 0 {
			delete(g.of, site)
		}
	}
}

// client is what one client has left. It is guarded by limits.mu.
type client struct{ queues [budgets]queue }

// queue is a budget with the calls that wait for it, first come, first served.
type queue struct {
	tokens  *rate.Limiter // nil before the first call
	waiting int
}

func newLimits(observer Observer, lines *listen.Lines) *limits {
	return &limits{observer: observer, lines: lines, young: newGeneration(), old: newGeneration(), born: time.Now()}
}

// wait returns when a call of n items may go on, and whether it had to wait for
// that. It waits until ctx ends, with the error of that, but no longer than
// maxPatience, and not longer than half of the time that the caller gives: of the
// rest it needs some to be served, and a join token that is spent for
// nobody is lost. A call whose turn would come later is refused at once, with
// ResourceExhausted, and has used up nothing.
func (l *limits) wait(ctx context.Context, method string, n int) (waited bool, err error) {
	kind, ok := limited[method]
	if !ok || n > perSecond[kind] { // such a batch is refused whenever it comes
		return false, nil
	}
	p, ok := peer.FromContext(ctx)
	if !ok {
		return false, nil
	}
	from := listen.Client(p.Addr)
	if !from.IsValid() {
		return false, nil
	}
	l.mu.Lock()
	now := time.Now()
	c := l.find(from, now)
	q := &c.queues[kind]
	if q.tokens == nil {
		q.tokens = rate.NewLimiter(rate.Limit(perSecond[kind]), perSecond[kind])
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
		err = status.Errorf(codes.ResourceExhausted, "more than %d a second are asked for from %s: try again later", perSecond[kind], from)
		refused = err
	}
	l.tell(from, path.Base(method), refused)
	return true, err
}

// turn waits for n tokens, as long as is worthwhile.
func (q *queue) turn(ctx context.Context, n int) error {
	patience := maxPatience
	if end, ok := ctx.Deadline(); ok {
		patience = min(patience, time.Until(end)/2)
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return q.tokens.WaitN(ctx, n)
}

// find returns a client as it is known. The caller holds mu.
func (l *limits) find(from netip.Prefix, now time.Time) *client {
	if now.Sub(l.born) >= generationTime {
		l.old, l.young, l.born = l.young, newGeneration(), now
	}
	c := l.known(from)
	if site := listen.Site(from); c == nil && site.IsValid() && l.young.of[site]+l.old.of[site] >= maxOfSite {
		from = site
		c = l.known(site)
	}
	switch {
	case c != nil:
		return c
	case len(l.young.clients)+len(l.old.clients) >= maxClients:
		return &l.strangers
	}
	c = new(client)
	l.young.add(from, c)
	return c
}

// known returns a client that is kept, which stays so; nil for another.
func (l *limits) known(from netip.Prefix) *client {
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

// refuse takes note of what listen.Serve refused.
func (l *limits) refuse(from netip.Prefix, method string, reason error) {
	if method == "" {
		method = connecting
	}
	l.tell(from, path.Base(method), reason)
}

// tell counts what found no room, and has it logged now and then: refused is why a
// call or a connection is refused, nil when it only had to wait.
func (l *limits) tell(from netip.Prefix, method string, refused error) {
	l.observer.Limited(method)
	client := listen.Name(from)
	about := []any{"client", client, "method", method}
	if refused == nil {
		l.lines.Note(slog.LevelInfo, "rate limited, calls delayed", client, about...)
		return
	}
	l.lines.Note(slog.LevelWarn, "rate limited, calls rejected", client, append(about, "error", refused)...)
}
