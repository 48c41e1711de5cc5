package listen

import (
	"container/list"
	"fmt"
	"math"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"
)

const (
	// ownFiles is how many file descriptors are reserved for the process: the store
	// and its copies, configuration and certificate files, listening sockets, and
	// connections to bundle endpoints.
	ownFiles = 256
	// maxSilent is how many connections of a Pool may be silent, about 5 KB each,
	// maxHandshakes how many may be in their handshake, and maxAnonymous how many of
	// a listener may be of anonymous callers, about 20 KB each.
	maxSilent     = 8192
	maxHandshakes = 1024
	maxAnonymous  = 1024
	// siteFactor is how many times the limits of one client for handshakes, anonymous
	// connections and anonymous calls all clients of one IPv6 /48 have together.
	siteFactor = 8
	// handshakeShare is the age from which a handshake is evicted for a new one. With
	// less, many agents behind one address that reconnect at once would fail.
	handshakeShare = time.Second
	// anonymousShare is the age from which a connection or call of an anonymous caller
	// is evicted for a new one. An attestation takes less, unless it waits for others
	// of its address.
	anonymousShare = 10 * time.Second
)

// Pool bounds the connections of a process, over all its listeners: by 256 less than
// the limit of open files (RLIMIT_NOFILE), but at least half of that. At most half of
// the connections may be silent, a quarter in their handshake, and, for each listener,
// a quarter of anonymous callers. Make it with [NewPool]. It is safe for concurrent
// use.
//
// When a bound is reached, a new connection evicts the oldest silent one, a new
// handshake evicts the oldest one that has taken a second, and a new anonymous caller
// evicts the oldest that has had ten, so that clients which keep what they have do not
// block others. A connection of a known caller is closed only for a newer one of the
// same caller.
type Pool struct {
	max, silent, handshakes, anonymous int

	mu      sync.Mutex // never held over IO
	open    int
	waiting [known]*list.List // *conn by each earlier state, the oldest first
}

// NewPool makes a Pool for this process.
func NewPool() *Pool {
	files := uint64(1024)
	var limit syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) == nil { // Go has raised it to the hard limit
		files = min(limit.Cur, math.MaxInt32)
	}
	return NewPoolOf(int(max(files/2, files-min(files, ownFiles))))
}

// NewPoolOf makes a Pool with a given bound of connections.
func NewPoolOf(connections int) *Pool {
	p := &Pool{
		max: connections, silent: min(maxSilent, connections/2),
		handshakes: min(maxHandshakes, connections/4), anonymous: min(maxAnonymous, connections/4),
	}
	for i := range p.waiting {
		p.waiting[i] = list.New()
	}
	return p
}

// Max returns how many connections there can be at a time.
func (p *Pool) Max() int { return p.max }

// Limits are the limits of one listener, for each client (see [Client]) unless the
// field says otherwise. Zero means no limit.
type Limits struct {
	// Handshakes is how many connections may be in their handshake.
	Handshakes int
	// Anonymous is how many connections of anonymous callers there may be.
	Anonymous int
	// Known is how many connections of known callers there may be.
	Known int
	// Caller is how many connections one known caller may have, from all its
	// addresses. The oldest is closed for one more: after a network failure only the
	// caller knows which of its connections are dead.
	Caller int
	// AnonymousCalls is how many calls anonymous callers may have in flight; for one
	// more, the oldest is ended that has taken ten seconds. CallerCalls is how many
	// calls one known caller may have in flight.
	AnonymousCalls, CallerCalls int
}

// ForAll returns a function for [Config] and [Pool.Listen] that gives all clients the same
// limits.
func ForAll(l Limits) func(netip.Prefix) Limits { return func(netip.Prefix) Limits { return l } }

// HTTP are the limits of HTTP listeners. Many clients may share one address.
var HTTP = Limits{Handshakes: 64, Anonymous: 128}

// state is the state of a connection.
type state int

const (
	silent state = iota
	handshaking
	anonymous
	known
	closed
)

// key selects connections that are counted together: those in one state, of a client,
// of a site, or of all clients if from is zero.
type key struct {
	state state
	from  netip.Prefix
}

// enter adds a new connection, in state silent, and returns the one that is evicted
// for it, which is c if there is no other.
func (p *Pool) enter(c *conn, now time.Time) (evicted *conn, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c.owner.closed {
		return nil, net.ErrClosed
	}
	if p.waiting[silent].Len() >= p.silent {
		evicted = p.oldestLocked(silent, func(*conn) bool { return true })
	} else if p.open >= p.max {
		for s := range p.waiting {
			if evicted == nil {
				evicted = p.oldestLocked(state(s), func(o *conn) bool { return o.state != anonymous || now.Sub(o.began) >= anonymousShare })
			}
		}
		if evicted == nil {
			return c, nil
		}
	}
	if evicted != nil {
		p.dropLocked(evicted)
	}
	p.addLocked(c)
	return evicted, nil
}

// beginHandshake moves a connection of a client to state handshaking, and returns the one
// that is evicted for it, which is c if no other has had its time.
func (p *Pool) beginHandshake(c *conn, from netip.Prefix, now time.Time) (evicted *conn, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c.state != silent {
		return nil, net.ErrClosed
	}
	p.dropLocked(c)
	c.state, c.from, c.began = handshaking, from, now
	if full, ok := p.fullLocked(c); ok {
		evicted = p.oldestLocked(handshaking, func(o *conn) bool { return o.owner == c.owner && slices.Contains(o.keysLocked(), full) })
	} else if p.waiting[handshaking].Len() >= p.handshakes {
		evicted = p.oldestLocked(handshaking, func(*conn) bool { return true })
	}
	if evicted != nil {
		if now.Sub(evicted.began) < handshakeShare {
			c.state = closed
			return c, nil
		}
		p.dropLocked(evicted)
	}
	p.addLocked(c)
	return evicted, nil
}

// identify ends a connection's handshake, once, with its caller, "" if that is
// anonymous. It returns the connection that is evicted for it. An error says which
// limit is exceeded; then the connection is no longer counted and must be closed.
func (p *Pool) identify(c *conn, caller string, now time.Time) (evicted *conn, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch c.state {
	case closed:
		return nil, net.ErrClosed
	case anonymous, known:
		return nil, nil
	}
	p.dropLocked(c)
	l := c.owner
	c.state, c.caller, c.began = anonymous, caller, now
	if caller != "" {
		c.state = known
	}
	if full, ok := p.fullLocked(c); ok {
		if !full.from.IsValid() {
			evicted = p.oldestLocked(anonymous, func(o *conn) bool { return o.owner == l })
		}
		if evicted == nil || now.Sub(evicted.began) < anonymousShare {
			c.state = closed
			return nil, full.error(p.limit(c, full))
		}
		p.dropLocked(evicted)
	}
	if of, most := l.callers[caller], l.limits(c.from).Caller; caller != "" && most > 0 && len(of) >= most {
		evicted = of[0]
		p.dropLocked(evicted)
	}
	p.addLocked(c)
	return evicted, nil
}

// oldestLocked returns the oldest connection in a state before known that matches; nil
// for none.
func (p *Pool) oldestLocked(s state, matches func(*conn) bool) *conn {
	for e := p.waiting[s].Front(); e != nil; e = e.Next() {
		if c := e.Value.(*conn); matches(c) {
			return c
		}
	}
	return nil
}

// fullLocked returns a key of c whose limit is reached.
func (p *Pool) fullLocked(c *conn) (key, bool) {
	for _, k := range c.keysLocked() {
		if limit := p.limit(c, k); limit > 0 && c.owner.counts[k] >= limit {
			return k, true
		}
	}
	return key{}, false
}

// limit returns how many connections of a key of c there may be; 0 for any number.
func (p *Pool) limit(c *conn, k key) int {
	var each int
	switch limits := c.owner.limits(c.from); k.state {
	case handshaking:
		each = limits.Handshakes
	case anonymous:
		each = limits.Anonymous
	case known:
		each = limits.Known
	}
	switch {
	case !k.from.IsValid() && k.state == anonymous:
		return p.anonymous
	case !k.from.IsValid():
		return 0
	case k.from.Bits() == siteBits:
		return siteFactor * each
	}
	return each
}

func (k key) error(limit int) error {
	switch {
	case k.state == known:
		return fmt.Errorf("%s has %d connections already: close some and try again", k.from, limit)
	case k.from.IsValid():
		return fmt.Errorf("%s has %d connections of anonymous callers already: close some and try again", k.from, limit)
	}
	return fmt.Errorf("there are %d connections of anonymous callers already: try again later", limit)
}

// addLocked counts a connection by its state; dropLocked undoes that.
func (p *Pool) addLocked(c *conn) {
	l := c.owner
	l.open[c] = struct{}{}
	p.open++
	if c.state < known {
		c.waits = p.waiting[c.state].PushBack(c)
	}
	if c.caller != "" {
		l.callers[c.caller] = append(l.callers[c.caller], c)
	}
	for _, k := range c.keysLocked() {
		l.counts[k]++
	}
}

func (p *Pool) dropLocked(c *conn) {
	if c.state == closed {
		return
	}
	l := c.owner
	delete(l.open, c)
	p.open--
	if c.state < known {
		p.waiting[c.state].Remove(c.waits)
	}
	if of := l.callers[c.caller]; len(of) > 1 {
		l.callers[c.caller] = slices.DeleteFunc(of, func(o *conn) bool { return o == c })
	} else {
		delete(l.callers, c.caller)
	}
	for _, k := range c.keysLocked() {
		if l.counts[k]--; l.counts[k] == 0 {
			delete(l.counts, k)
		}
	}
	c.state = closed
}
