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

// silentTime is how long a connection may say nothing before its handshake.
const silentTime = 5 * time.Second

var (
	errNoRoom = errors.New("there are too many whose handshake is not done")
	errNewer  = errors.New("its caller has made a newer one")
)

// Listener is a listener with limits. It accepts by itself and hands on the
// connections that have said something, so that those that say nothing cost no more
// than a file descriptor and a small goroutine.
type Listener struct {
	net.Listener
	pool    *Pool
	limits  Limits
	refused func(from netip.Prefix, reason error)

	ready  chan net.Conn
	failed chan error    // of the listener
	ending chan struct{} // closed by Close
	ended  error         // why the listener failed for good, once broken is closed
	broken chan struct{}
	group  sync.WaitGroup
	close  func() error

	// Guarded by pool.mu.
	open    map[*conn]struct{}
	by      map[key]int
	callers map[string][]*conn // the oldest first
	closed  bool
}

// Listen returns lis with limits, which has to be closed. Refused is told the client
// of each connection that was closed for them, and why, by several goroutines at a
// time; nil for nobody.
func (p *Pool) Listen(lis net.Listener, limits Limits, refused func(from netip.Prefix, reason error)) *Listener {
	if refused == nil {
		refused = func(netip.Prefix, error) {}
	}
	l := &Listener{
		Listener: lis, pool: p, limits: limits, refused: refused,
		ready: make(chan net.Conn), failed: make(chan error), ending: make(chan struct{}), broken: make(chan struct{}),
		open: make(map[*conn]struct{}), by: make(map[key]int), callers: make(map[string][]*conn),
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

// accept takes connections in until the listener fails for good.
func (l *Listener) accept() {
	for {
		raw, err := l.Listener.Accept()
		if err != nil {
			var passing interface{ Temporary() bool }
			if !errors.As(err, &passing) || !passing.Temporary() {
				l.ended = err
				close(l.broken)
				return
			}
			// Such as too many open files: who serves waits and asks again.
			select {
			case l.failed <- err:
			case <-l.ending:
			}
			continue
		}
		c := &conn{Conn: raw, owner: l, from: Client(raw.RemoteAddr())}
		gone, err := l.pool.enter(c)
		if err != nil {
			_ = raw.Close()
			continue // until the listener is closed, too
		}
		l.refuse(gone, errNoRoom)
		if gone != c {
			l.group.Go(func() { l.hear(c) })
		}
	}
}

// hear waits for a connection's first byte and hands it on.
func (l *Listener) hear(c *conn) {
	_ = c.SetReadDeadline(time.Now().Add(silentTime))
	n, err := c.Conn.Read(c.first[:])
	if n == 0 || err != nil {
		_ = c.Close()
		return
	}
	_ = c.SetReadDeadline(time.Time{})
	c.heard = true
	gone, err := l.pool.speak(c, time.Now())
	if err != nil {
		_ = c.Close()
		return
	}
	l.refuse(gone, errNoRoom)
	if gone == c {
		return
	}
	select {
	case l.ready <- c:
	case <-l.ending:
		_ = c.Close()
	}
}

// refuse closes a connection that had to go.
func (l *Listener) refuse(gone *conn, reason error) {
	if gone != nil {
		_ = gone.Conn.Close()
		gone.owner.refused(gone.from, reason)
	}
}

// identify ends a connection's handshake; see [Pool.identify].
func (l *Listener) identify(c *conn, caller string) error {
	gone, err := l.pool.identify(c, caller)
	l.refuse(gone, errNewer)
	return err
}

// ConnState is for [http.Server]: the first request ends the handshake. HTTP
// clients are anonymous.
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

// Close implements net.Listener. It closes the connections that were not accepted
// yet, too, and returns when all goroutines have ended.
func (l *Listener) Close() error { return l.close() }

func (l *Listener) end() error {
	close(l.ending)
	err := l.Listener.Close()
	l.closeThose(func(c *conn) bool { return c.state == silent })
	l.group.Wait()
	return err
}

// closeAll closes every open connection. gRPC waits for those that are still in
// their handshake and cannot close them, so without this a client that says one word
// would hold up the end.
func (l *Listener) closeAll() {
	l.closeThose(func(*conn) bool { return true })
}

// closeThose closes the open connections that fit, and any that is accepted later.
func (l *Listener) closeThose(fits func(*conn) bool) {
	l.pool.mu.Lock()
	l.closed = true
	var open []*conn
	for c := range l.open {
		if fits(c) {
			open = append(open, c)
			l.pool.drop(c)
		}
	}
	l.pool.mu.Unlock()
	for _, c := range open {
		_ = c.Conn.Close()
	}
}
