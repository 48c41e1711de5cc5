package workload

import "net"

// coalescingConn is a connection that writes the parts of an answer together. Without a
// write buffer gRPC writes the HEADERS frame, the header of the DATA frame, the header
// of the message and the message one by one: four system calls, each of which wakes the
// client. Write must not be called concurrently.
type coalescingConn struct {
	net.Conn
	left int // bytes to come of the current DATA frame

	held   []byte // written before the next bytes
	room   [heldMax]byte
	vector [2][]byte
	both   net.Buffers // of vector
}

const (
	// heldMax bounds what is copied. The headers of an answer are shorter.
	heldMax = 64

	// RFC 9113, sections 4.1, 6.1 and 6.2.
	frameHeader    = 9
	typeData       = 0
	typeHeaders    = 1
	flagsEndStream = 1
)

// Write holds b back if more must follow: the rest of a DATA frame, or the first
// DATA frame after HEADERS. It writes all else, and the end of a frame, at once.
func (c *coalescingConn) Write(b []byte) (int, error) {
	if c.continued(b) && len(c.held)+len(b) <= heldMax {
		if c.held == nil {
			c.held = c.room[:0]
		}
		c.held = append(c.held, b...)
		return len(b), nil
	}
	if len(c.held) == 0 {
		return c.Conn.Write(b)
	}
	c.vector = [2][]byte{c.held, b}
	c.both = c.vector[:]
	n, err := c.both.WriteTo(c.Conn)
	n -= int64(len(c.held))
	c.held, c.vector = c.held[:0], [2][]byte{}
	return int(max(n, 0)), err
}

// continued reports whether more must follow after b.
func (c *coalescingConn) continued(b []byte) bool {
	switch {
	case c.left > 0:
		c.left -= min(len(b), c.left)
		return c.left > 0
	case len(b) == frameHeader && b[3] == typeData:
		c.left = int(b[0])<<16 | int(b[1])<<8 | int(b[2])
		return c.left > 0
	}
	return len(b) > frameHeader && b[3] == typeHeaders && b[4]&flagsEndStream == 0
}
