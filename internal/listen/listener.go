package listen

import (
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"
)

// silentTime is how long a connection may be silent before its handshake.
const silentTime = 5 * time.Second

var (
	errNoRoom = errors.New("too many connections without completed handshake")
	errNewer  = errors.New("its caller has made a newer connection")
	errOldest = errors.New("too many connections of anonymous callers, this was the oldest")
)

// Listener is a listener with limits. Accept returns a connection after its first
// byte, so that a silent one costs only a file descriptor and a small goroutine.
type Listener struct {
	net.Listener
	pool    *Pool
	limits  func(client netip.Prefix) Limits
	refused func(from netip.Prefix, reason error)

	ready  chan net.Conn
	failed chan error    // temporary errors of the listener
	ending chan struct{} // closed by Close
	ended  error         // the listener's permanent error, once broken is closed
	broken chan struct{}
	group  sync.WaitGroup
	close  func() error

	// Guarded by pool.mu.
	open    map[*conn]struct{}
	counts  map[key]int
	callers map[string][]*conn // the oldest first
	closed  bool
}

// Listen returns lis with limits, which it asks for at each step of a connection, so that
// they can change; a client is the zero Prefix if it has no IP address. limits must not
// block. The caller must close the Listener. refused, if not nil, is
// called with the client of each connection that is closed because of a limit, and
// the reason, by several goroutines at a time.
func (p *Pool) Listen(lis net.Listener, limits func(client netip.Prefix) Limits, refused func(from netip.Prefix, reason error)) *Listener {
	if refused == nil {
		refused = func(netip.Prefix, error) {}
	}
	l := &Listener{
		Listener: lis, pool: p, limits: limits, refused: refused,
		ready: make(chan net.Conn), failed: make(chan error), ending: make(chan struct{}), broken: make(chan struct{}),
		open: make(map[*conn]struct{}), counts: make(map[key]int), callers: make(map[string][]*conn),
	}
	l.close = sync.OnceValue(l.end)
	l.group.Go(l.accept)
	return l
}

// Accept implements net.Listener.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.ready:
		return c, nil
	case err := <-l.failed:
		return nil, err
	case <-l.broken:
		return nil, l.ended
	case <-l.ending:
		return nil, net.ErrClosed
	}
}

// accept accepts connections until the listener fails permanently.
func (l *Listener) accept() {
	for {
		raw, err := l.Listener.Accept()
		if err != nil {
			var temporary interface{ Temporary() bool }
			if !errors.As(err, &temporary) || !temporary.Temporary() {
				l.ended = err
				close(l.broken)
				return
			}
			// Such as too many open files: the server waits and calls Accept again.
			select {
			case l.failed <- err:
			case <-l.ending:
			}
			continue
		}
		c := &conn{Conn: raw, owner: l, from: Client(raw.RemoteAddr())}
		evicted, err := l.pool.enter(c, time.Now())
		if err != nil {
			_ = raw.Close()
			continue // the pool refuses because of Close; lis follows
		}
		l.refuse(evicted, errNoRoom)
		if evicted != c {
			l.group.Go(func() { l.awaitFirst(c) })
		}
	}
}

// awaitFirst waits for a connection's first byte and passes the connection to Accept.
func (l *Listener) awaitFirst(c *conn) {
	_ = c.SetReadDeadline(time.Now().Add(silentTime))
	n, err := c.Conn.Read(c.first[:])
	if n == 0 || err != nil {
		_ = c.Close()
		return
	}
	_ = c.SetReadDeadline(time.Time{})
	c.buffered = true
	// Behind a load balancer the client is known only now.
	evicted, err := l.pool.beginHandshake(c, Client(c.RemoteAddr()), time.Now())
	if err != nil {
		_ = c.Close()
		return
	}
	l.refuse(evicted, errNoRoom)
	if evicted == c {
		return
	}
	select {
	case l.ready <- c:
	case <-l.ending:
		_ = c.Close()
	}
}

// refuse closes a connection that was evicted, if any.
func (l *Listener) refuse(evicted *conn, reason error) {
	if evicted != nil {
		_ = evicted.Conn.Close()
		evicted.owner.refused(evicted.from, reason)
	}
}

// identify ends a connection's handshake; see [Pool.identify].
func (l *Listener) identify(c *conn, caller string) error {
	evicted, err := l.pool.identify(c, caller, time.Now())
	reason := errNewer
	if caller == "" {
		reason = errOldest
	}
	l.refuse(evicted, reason)
	return err
}

// ConnState is for the field of [http.Server]: the first request ends the handshake.
// HTTP clients are anonymous.
func (l *Listener) ConnState(c net.Conn, s http.ConnState) {
	if s != http.StateActive {
		return
	}
	if secure, ok := c.(*tls.Conn); ok {
		c = secure.NetConn()
	}
	accepted, ok := c.(*conn)
	if !ok {
		return
	}
	if err := l.identify(accepted, ""); err != nil {
		l.refused(accepted.from, err)
		_ = accepted.Conn.Close()
	}
}

// Close implements net.Listener. It also closes the connections that Accept has not
// returned, and returns when all goroutines have ended.
func (l *Listener) Close() error { return l.close() }

func (l *Listener) end() error {
	close(l.ending)
	err := l.Listener.Close()
	l.closeMatching(func(c *conn) bool { return c.state == silent })
	l.group.Wait()
	return err
}

// closeAll closes every open connection. gRPC waits for those in their handshake and
// cannot close them, so a client could delay the shutdown by sending one byte.
func (l *Listener) closeAll() {
	l.closeMatching(func(*conn) bool { return true })
}

// closeMatching closes the open connections that match, and all that are accepted
// later.
func (l *Listener) closeMatching(matches func(*conn) bool) {
	l.pool.mu.Lock()
	l.closed = true
	var open []*conn
	for c := range l.open {
		if matches(c) {
			open = append(open, c)
			l.pool.dropLocked(c)
		}
	}
	l.pool.mu.Unlock()
	for _, c := range open {
		_ = c.Conn.Close()
	}
}
