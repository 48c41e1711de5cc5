package listen

import (
	"container/list"
	"errors"
	"net"
	"net/netip"
	"time"
)

// maxAnonymousBytes is how much an anonymous caller can send on one connection: a
// hundred times what an attestation takes, and what TLS adds. Each byte can cost
// the server many in memory before it is part of a message.
const maxAnonymousBytes = 256 << 10

var errTooMuch = errors.New("more was sent than an anonymous caller may send on one connection")

// conn is a connection that was accepted.
type conn struct {
	net.Conn
	owner *Listener
	from  netip.Prefix

	// Guarded by owner.pool.mu.
	state  state
	began  time.Time     // its handshake
	caller string        // of a known one
	waits  *list.Element // in the pool's list of a state before the handshake is done

	// The first byte, which was read before the connection was handed on, until it is
	// read again.
	first [1]byte
	heard bool

	// What an anonymous caller may still send, if it is bounded: set before the
	// first call is read, and used by the goroutine that reads.
	bounded bool
	left    int
}

// keys are what a connection counts for.
func (c *conn) keys() []key {
	keys := []key{{state: c.state}}
	if c.from.IsValid() {
		keys = append(keys, key{state: c.state, from: c.from})
		if site := Site(c.from); site.IsValid() && (c.state == handshaking || c.state == anonymous) {
			keys = append(keys, key{state: c.state, from: site})
		}
	}
	return keys
}

// Read implements net.Conn.
func (c *conn) Read(b []byte) (int, error) {
	if c.heard && len(b) > 0 {
		c.heard = false
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
	c.owner.pool.drop(c)
	c.owner.pool.mu.Unlock()
	return c.Conn.Close()
}

// Raw is the connection that a listener gave a [Listener], for c of that.
func Raw(c net.Conn) net.Conn {
	if accepted, ok := c.(*conn); ok {
		return accepted.Conn
	}
	return c
}
