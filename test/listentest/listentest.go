// Package listentest has listeners for tests of what depends on where a caller is.
package listentest

import "net"

// Elsewhere is an address on another machine.
var Elsewhere = &net.TCPAddr{IP: net.IPv4(192, 0, 2, 7), Port: 40000}

// From returns a listener that accepts the connections of l, each of which comes from
// that address.
func From(l net.Listener, from net.Addr) net.Listener { return listener{l, from} }

type listener struct {
	net.Listener
	from net.Addr
}

func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return conn{c, l.from}, nil
}

type conn struct {
	net.Conn
	from net.Addr
}

func (c conn) RemoteAddr() net.Addr { return c.from }
