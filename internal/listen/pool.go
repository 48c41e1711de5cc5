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
	// ownFiles is how many file descriptors a process keeps for itself: the store
	// and copies of it, configuration and certificate files, sockets that it
	// listens on, and the bundle endpoints that it follows.
	ownFiles = 256
	// maxSilent is how many connections of a Pool have said nothing yet, about 5 KB
	// each, maxHandshakes how many are in their handshake, and maxAnonymous how many
	// of a listener are of anonymous callers, about 20 KB each.
	maxSilent     = 8192
	maxHandshakes = 1024
	maxAnonymous  = 1024
	// siteFactor is how many clients' worth of handshakes and anonymous
	// connections and calls the clients of one IPv6 /48 have together.
	siteFactor = 8
	// handshakeShare is how long a handshake may take when others need its room: less
	// would end those of many agents behind one address that all come back at once.
	handshakeShare = time.Second
)

// Pool bounds the connections of a process, over all its listeners: 256 fewer
// than it may have files open (RLIMIT_NOFILE), at least half of those. At most half of
// them say nothing yet, a quarter are in their handshake, and a quarter of each
// listener are of anonymous callers. Make it with [NewPool]. It is safe for
// concurrent use.
//
// When a bound is reached, the oldest connection that says nothing gives way to a
// new one, and the oldest handshake to one that begins if it has taken a second, so
// that those who do not go on keep nobody out. A connection whose handshake is done is closed for another one
// of the same caller only.
type Pool struct {
	max, silent, handshakes, anonymous int

	mu      sync.Mutex // never held over IO
	open    int
	waiting [anonymous]*list.List // of *conn in each state before, the oldest first
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

// NewPoolOf makes a Pool of so many connections.
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

// Max is how many connections there can be at a time.
func (p *Pool) Max() int { return p.max }

// Limits are those of one listener, for each client (see [Client]) where nothing
// else is said. Zero means no limit.
type Limits struct {
	// Handshakes is how many connections may be in their handshake.
	Handshakes int
	// Anonymous is how many connections there may be whose caller is not known.
	Anonymous int
	// Known is how many connections of callers that are known there may be.
	Known int
	// Caller is how many connections there may be of one caller that is known,
	// wherever it comes from. The oldest is closed for one more: a network that
	// fails leaves connections behind that only the caller knows to be dead.
	Caller int
	// AnonymousCalls is how many calls anonymous callers may have in flight, and
	// CallerCalls how many one caller that is known may have.
	AnonymousCalls, CallerCalls int
}

// HTTP are the limits of listeners for HTTP. Many clients may be behind one address.
var HTTP = Limits{Handshakes: 64, Anonymous: 128}

type state int

const (
	silent state = iota
	handshaking
	anonymous
	known
	closed
)

// key is what connections are counted by: those of one state, of a client, of a
// site or of all together.
type key struct {
	state state
	from  netip.Prefix
}

// enter takes a new connection in, silent, and returns the one that has to go for
// it, which is itself when there is no other.
func (p *Pool) enter(c *conn) (gone *conn, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c.owner.closed {
		return nil, net.ErrClosed
	}
	if p.waiting[silent].Len() >= p.silent {
		gone = p.oldest(silent, func(*conn) bool { return true })
	} else if p.open >= p.max {
		for s := range p.waiting {
			if gone == nil {
				gone = p.oldest(state(s), func(*conn) bool { return true })
			}
		}
		if gone == nil {
			return c, nil
		}
	}
	if gone != nil {
		p.drop(gone)
	}
	p.add(c)
	return gone, nil
}

// speak begins the handshake of a connection that has said something, and returns
// the one that has to go for it, which is itself when no other has had its time.
func (p *Pool) speak(c *conn, now time.Time) (gone *conn, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c.state != silent {
		return nil, net.ErrClosed
	}
	p.drop(c)
	c.state, c.began = handshaking, now
	if full, ok := p.full(c); ok {
		gone = p.oldest(handshaking, func(o *conn) bool { return o.owner == c.owner && slices.Contains(o.keys(), full) })
	} else if p.waiting[handshaking].Len() >= p.handshakes {
		gone = p.oldest(handshaking, func(*conn) bool { return true })
	}
	if gone != nil {
		if now.Sub(gone.began) < handshakeShare {
			c.state = closed
			return c, nil
		}
		p.drop(gone)
	}
	p.add(c)
	return gone, nil
}

// identify ends a connection's handshake, once: caller is who it is of, "" when
// that is not known. It returns the one that has to go for it. The error says which
// limit does not allow it; then the connection counts no more and has to be closed.
func (p *Pool) identify(c *conn, caller string) (gone *conn, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch c.state {
	case closed:
		return nil, net.ErrClosed
	case anonymous, known:
		return nil, nil
	}
	p.drop(c)
	c.state, c.caller = anonymous, caller
	if caller != "" {
		c.state = known
	}
	if full, ok := p.full(c); ok {
		c.state = closed
		return nil, full.error(p.limit(c.owner, full))
	}
	l := c.owner
	if of := l.callers[caller]; caller != "" && l.limits.Caller > 0 && len(of) >= l.limits.Caller {
		gone = of[0]
		p.drop(gone)
	}
	p.add(c)
	return gone, nil
}

// oldest is the connection of a state before the handshake is done that goes first,
// of those that fit; nil for none.
func (p *Pool) oldest(s state, fits func(*conn) bool) *conn {
	for e := p.waiting[s].Front(); e != nil; e = e.Next() {
		if c := e.Value.(*conn); fits(c) {
			return c
		}
	}
	return nil
}

// full is a key that has no room for one more connection like c.
func (p *Pool) full(c *conn) (key, bool) {
	for _, k := range c.keys() {
		if limit := p.limit(c.owner, k); limit > 0 && c.owner.by[k] >= limit {
			return k, true
		}
	}
	return key{}, false
}

// limit is how many connections of a key there may be; 0 for any number.
func (p *Pool) limit(l *Listener, k key) int {
	var each int
	switch k.state {
	case handshaking:
		each = l.limits.Handshakes
	case anonymous:
		each = l.limits.Anonymous
	case known:
		each = l.limits.Known
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
		return fmt.Errorf("%s has %d connections of callers that are not known here: close some and try again", k.from, limit)
	}
	return fmt.Errorf("there are %d connections of callers that are not known here: try again later", limit)
}

// add counts a connection by its state, and drop takes it out. The caller holds mu.
func (p *Pool) add(c *conn) {
	l := c.owner
	l.open[c] = struct{}{}
	p.open++
	if c.state < anonymous {
		c.waits = p.waiting[c.state].PushBack(c)
	}
	if c.caller != "" {
		l.callers[c.caller] = append(l.callers[c.caller], c)
	}
	for _, k := range c.keys() {
		l.by[k]++
	}
}

func (p *Pool) drop(c *conn) {
	if c.state == closed {
		return
	}
	l := c.owner
	delete(l.open, c)
	p.open--
	if c.state < anonymous {
		p.waiting[c.state].Remove(c.waits)
	}
	if of := l.callers[c.caller]; len(of) > 1 {
		l.callers[c.caller] = slices.DeleteFunc(of, func(o *conn) bool { return o == c })
	} else {
		delete(l.callers, c.caller)
	}
	for _, k := range c.keys() {
		if l.by[k]--; l.by[k] == 0 {
			delete(l.by, k)
		}
	}
	c.state = closed
}
