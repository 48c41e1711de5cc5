package listen

import (
	"container/list"
	"fmt"
	"net"
	"net/netip"
	"time"
)

// maxAnonymousBytes is how much an anonymous caller may send on one connection, TLS
// included: a hundred times an attestation. Each byte can take the server many bytes
// of memory before it is part of a message.
const maxAnonymousBytes = 256 << 10

var errTooMuch = fmt.Errorf("anonymous caller has sent more than %d bytes on one connection", maxAnonymousBytes)

// conn is an accepted connection.
type conn struct {
	net.Conn
	owner *Listener
	from  netip.Prefix // changes only at the start of the handshake

	// Guarded by owner.pool.mu.
	state  state
	began  time.Time     // start of the handshake, then its end
	caller string        // empty unless known
	waits  *list.Element // in the pool's list for its state, until it is known

	// The first byte, which was read before the connection was accepted, until the
	// server reads it.
	first    [1]byte
	buffered bool

	// How much an anonymous caller may still send, if it is bounded: set before the
	// first call is read, and used by the reading goroutine.
	bounded bool
	left    int
}

// keysLocked returns the keys that a connection is counted by, the widest last.
func (c *conn) keysLocked() (keys []key) {
	if c.from.IsValid() {
		keys = append(keys, key{state: c.state, from: c.from})
		if site := Site(c.from); site.IsValid() && (c.state == handshaking || c.state == anonymous) {
			keys = append(keys, key{state: c.state, from: site})
		}
	}
	return append(keys, key{state: c.state})
}

// Read implements net.Conn.
func (c *conn) Read(b []byte) (int, error) {
	if c.buffered && len(b) > 0 {
		c.buffered = false
		b[0] = c.first[0]
		return 1, nil
	}
	n, err := c.Conn.Read(b)
	if !c.bounded {
		return n, err
	}
	if c.left -= n; c.left < 0 {
		c.owner.refused(c.from, errTooMuch)
		_ = c.Close()
		return 0, errTooMuch
	}
	return n, err
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.owner.pool.mu.Lock()
	c.owner.pool.dropLocked(c)
	c.owner.pool.mu.Unlock()
	return c.Conn.Close()
}

// Raw returns the underlying connection of c, if c is from a [Listener], and c
// otherwise.
func Raw(c net.Conn) net.Conn {
	if accepted, ok := c.(*conn); ok {
		return accepted.Conn
	}
	return c
}
