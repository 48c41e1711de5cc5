package server

import (
	"net"
	"sync"
)

// conns is a listener that knows its open connections. gRPC waits for
// connections that are still in their handshake and cannot close them, so
// without this a client that never says a word would hold up the end.
type conns struct {
	net.Listener

	mu     sync.Mutex
	open   map[*conn]struct{}
	closed bool
}

type conn struct {
	net.Conn
	owner *conns
}

func newConns(lis net.Listener) *conns {
	return &conns{Listener: lis, open: make(map[*conn]struct{})}
}

// Accept implements net.Listener.
func (l *conns) Accept() (net.Conn, error) {
	raw, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &conn{Conn: raw, owner: l}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		_ = raw.Close()
		return nil, net.ErrClosed
	}
	l.open[c] = struct{}{}
	return c, nil
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.owner.mu.Lock()
	delete(c.owner.open, c)
	c.owner.mu.Unlock()
	return c.Conn.Close()
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
