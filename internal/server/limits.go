package server

import (
	"context"
	"log/slog"
	"net"
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
	// maxConnections is how many connections one client may have open. It is
	// far above what the other limits can serve, and keeps one machine from
	// taking every file descriptor of the server.
	maxConnections = 2048
	// maxClients is how many clients are told apart: 50 MB at most. They are
	// found by their own handshakes, which nobody can make in another's name.
	maxClients = 1 << 16
	// generation is how long a client is remembered at least. It is more than
	// the minute between two statuses of an agent, and more than maxPatience
	// and a second, when every budget is full again: so to be forgotten is of
	// no use to anybody.
	generation = 2 * time.Minute
	// sayAgain is the least time between two log lines about a client, and
	// sayAny that between lines about any, after the first sayFirst.
	sayAgain = time.Minute
	sayAny   = 10 * time.Second
	sayFirst = 10
	// connecting stands in the metrics for the method of a connection that is
	// refused.
	connecting = "connect"
)

// limits is what every client may ask for. A client is an address, for IPv6 a
// /64: that much every machine is given, or can make up, so single addresses would
// bound nobody. Who comes without an IP address, over a Unix socket or in
// memory, is not limited.
//
// Clients are kept in two generations. Who is seen is in the young one; when that
// is old enough it becomes the old one, and who was in the old one until
// then is forgotten. Time alone does that, never the number of clients: when
// maxClients are known, those that are not are one client together, and the known
// ones keep what they have.
type limits struct {
	observer Observer
	log      *slog.Logger

	mu         sync.Mutex // never held while a call waits
	young, old map[netip.Prefix]*client
	born       time.Time // of the young generation
	strangers  client    // who comes when maxClients are known
	lines      [outcomes]*rate.Limiter
}

// outcome is what became of a call that found no tokens.
type outcome int

const (
	waits outcome = iota // until its turn, or until the caller gave up
	refusals
	outcomes // how many there are
)

// client is what one client has left. It is guarded by limits.mu.
type client struct {
	queues [budgets]queue
	said   [outcomes]time.Time // when the log last spoke of it
}

// queue is a budget with the calls that wait for it, first come, first served.
type queue struct {
	tokens  *rate.Limiter // nil before the first call
	waiting int
}

func newLimits(observer Observer, log *slog.Logger) *limits {
	l := &limits{observer: observer, log: log, young: make(map[netip.Prefix]*client), born: time.Now()}
	for i := range l.lines {
		l.lines[i] = rate.NewLimiter(rate.Every(sayAny), sayFirst)
	}
	return l
}

// clientOf is who comes from an address; the zero Prefix for who is not limited.
func clientOf(address net.Addr) netip.Prefix {
	tcp, ok := address.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	ip, ok := netip.AddrFromSlice(tcp.IP)
	if !ok {
		return netip.Prefix{}
	}
	ip = ip.Unmap() // IPv4, at a listener for both
	bits := 64
	if ip.Is4() {
		bits = 32
	}
	return netip.PrefixFrom(ip, bits).Masked()
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
	from := clientOf(p.Addr)
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
	what := waits
	switch {
	case ctx.Err() != nil:
		err = status.FromContextError(ctx.Err()).Err()
	case err != nil || !room:
		what = refusals
		err = status.Errorf(codes.ResourceExhausted, "more than %d a second are asked for from %s: try again later", perSecond[kind], from)
	}
	l.tell(c, what, from, path.Base(method))
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
	if now.Sub(l.born) >= generation {
		l.old, l.young, l.born = l.young, make(map[netip.Prefix]*client), now
	}
	if c, ok := l.young[from]; ok {
		return c
	}
	c, ok := l.old[from]
	switch {
	case ok:
		delete(l.old, from)
	case len(l.young)+len(l.old) >= maxClients:
		return &l.strangers
	default:
		c = new(client)
	}
	l.young[from] = c
	return c
}

// refuse takes note of a connection that was closed because its client has too many.
func (l *limits) refuse(from netip.Prefix) {
	l.mu.Lock()
	c := l.find(from, time.Now())
	l.mu.Unlock()
	l.tell(c, refusals, from, connecting)
}

// tell counts what found no tokens, and logs it now and then.
func (l *limits) tell(c *client, what outcome, from netip.Prefix, method string) {
	l.observer.Limited(method)
	l.mu.Lock()
	now := time.Now()
	say := now.Sub(c.said[what]) >= sayAgain && l.lines[what].AllowN(now, 1)
	if say {
		c.said[what] = now
	}
	l.mu.Unlock()
	switch {
	case !say:
	case what == waits:
		l.log.Info("client does more than it may: calls wait", "client", from.String(), "method", method)
	default:
		l.log.Warn("client does more than it may: calls are refused", "client", from.String(), "method", method)
	}
}
