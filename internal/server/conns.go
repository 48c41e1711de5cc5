package server

import (
	"net"
	"net/netip"
	"sync"
)

// conns is a listener that knows its open connections. gRPC waits for
// connections that are still in their handshake and cannot close them, so
// without this a client that never says a word would hold up the end.
//
// It also closes those of a client that has maxConnections open. A handshake
// ends after connectTime and a connection after ConnectionAge and graceAge, so
// that no client holds them for ever.
type conns struct {
	net.Listener
	refuse func(from netip.Prefix) // told of every connection that is closed for that

	mu     sync.Mutex
	open   map[*conn]struct{}
	by     map[netip.Prefix]int // open ones of each client that is limited
	closed bool
}

type conn struct {
	net.Conn
	owner *conns
	from  netip.Prefix
}

func newConns(lis net.Listener, refuse func(netip.Prefix)) *conns {
	return &conns{Listener: lis, refuse: refuse, open: make(map[*conn]struct{}), by: make(map[netip.Prefix]int)}
}

// Accept implements net.Listener.
func (l *conns) Accept() (net.Conn, error) {
	for {
		raw, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		c := &conn{Conn: raw, owner: l, from: clientOf(raw.RemoteAddr())}
		room, closed := l.enter(c)
		switch {
		case closed:
			_ = raw.Close()
			return nil, net.ErrClosed
		case room:
			return c, nil
		}
		_ = raw.Close()
		l.refuse(c.from)
	}
}

func (l *conns) enter(c *conn) (room, closed bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.closed:
		return false, true
	case c.from.IsValid() && l.by[c.from] == maxConnections:
		return false, false
	}
	l.open[c] = struct{}{}
	if c.from.IsValid() {
		l.by[c.from]++
	}
	return true, false
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.owner.leave(c)
	return c.Conn.Close()
}

func (l *conns) leave(c *conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, open := l.open[c]; !open {
		return // closed before
	}
	delete(l.open, c)
	if l.by[c.from]--; l.by[c.from] <= 0 {
		delete(l.by, c.from)
	}
}

// closeAll closes every open connection and any that is accepted later.
func (l *conns) closeAll() {
	l.mu.Lock()
	l.closed = true
	open := l.open
	l.open = make(map[*conn]struct{})
	l.mu.Unlock()
	for c := range open {
		_ = c.Conn.Close()
	}
}
