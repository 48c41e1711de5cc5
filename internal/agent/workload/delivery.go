package workload

import (
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/mem"
)

// That gRPC has taken an answer says little: it queues what the client's flow control
// has no room for, and the kernel what the client does not read. An answer has been
// read when its last byte was written to the connection and the peer then had nothing
// left to read.

// peerConn is a connection that knows which answers its peer has read. It lets go of
// the process when it is closed.
type peerConn struct {
	joined
	close func()

	mu       sync.Mutex
	awaited  []*delivery
	finished bool // the peer has closed the connection after it had read everything
	broken   bool // what was written may be lost
}

// unreader is a connection that knows how much of what was written the peer has not
// read: 0 is nothing. On others what was written counts as read.
type unreader interface{ Unread() (int, error) }

// delivery is an answer on its way.
type delivery struct {
	answer  mem.Buffer // held, so that its memory is not another answer's meanwhile
	last    *byte      // the end of the answer as gRPC gets it
	written bool       // guarded by peerConn.mu
}

// await follows an answer that is about to be given to gRPC, which must not copy it:
// the server has no write buffer. It must not be empty, nor change. The reference to it
// stays the caller's.
func (c *peerConn) await(answer mem.Buffer) *delivery {
	answer.Ref()
	data := answer.ReadOnlyData()
	c.mu.Lock()
	defer c.mu.Unlock()
	d := &delivery{answer: answer, last: &data[len(data)-1]}
	c.awaited = append(c.awaited, d)
	return d
}

// forget ends what await has begun, once.
func (c *peerConn) forget(d *delivery) {
	c.mu.Lock()
	c.awaited = slices.DeleteFunc(c.awaited, func(e *delivery) bool { return e == d })
	c.mu.Unlock()
	d.answer.Free()
}

// read reports whether the peer has read an answer.
func (c *peerConn) read(d *delivery) bool {
	c.mu.Lock()
	written, finished, broken := d.written, c.finished, c.broken
	c.mu.Unlock()
	switch {
	case !written || broken:
		return false
	case finished:
		return true
	}
	n, err := unread(c.Conn)
	return err == nil && n == 0
}

// endGrace is about how long it may take until what a client has read before it ended
// a stream is known here.
const endGrace = 500 * time.Millisecond

// readAtEnd is read for a stream that its client has ended. A client that asks once
// does so, and closes the connection, as soon as it has its answer: before the write
// has returned here, and before gRPC has read that the connection ends, which
// alone tells what was read of a closed one. So it is looked at several times.
func (c *peerConn) readAtEnd(d *delivery) bool {
	for pause := time.Millisecond; ; pause *= 2 {
		if c.read(d) {
			return true
		}
		c.mu.Lock()
		broken := c.broken
		c.mu.Unlock()
		if broken || pause > endGrace/2 {
			return false
		}
		time.Sleep(pause)
	}
}

func (c *peerConn) Write(b []byte) (int, error) {
	n, err := c.joined.Write(b)
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case errors.Is(err, unix.EPIPE):
		// The peer has closed the connection. What it had read by then, Read tells.
	case err != nil:
		c.broken = true
	case n > 0:
		for _, d := range c.awaited {
			d.written = d.written || d.last == &b[n-1]
		}
	}
	return n, err
}

// Read notes how the peer closes the connection. A peer that had something left to
// read is no EOF but an error: unix(7) says ECONNRESET.
func (c *peerConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil {
		c.ended(err)
	}
	return n, err
}

// ended notes why nothing more can be read.
func (c *peerConn) ended(err error) {
	finished := false
	if errors.Is(err, io.EOF) {
		left, err := unreadOfClosed(c.Conn)
		finished = err == nil && left == 0
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if finished {
		c.finished = true
	} else {
		c.broken = true
	}
}

func (c *peerConn) Close() error {
	err := c.Conn.Close()
	c.close()
	return err
}

// unread is how much the peer has left to read, and an error once it has closed the
// connection: then nothing is left in the kernel, read or not.
func unread(conn net.Conn) (n int, err error) {
	uc, ok := conn.(*net.UnixConn)
	if !ok {
		return unreadOfClosed(conn)
	}
	err = control(uc, func(fd int) error {
		if n, err = unix.IoctlGetInt(fd, unix.SIOCOUTQ); err != nil || n > 0 {
			return err
		}
		// In this order: the kernel marks the connection before it drops what is left.
		fds := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		for {
			_, err := unix.Poll(fds[:], 0)
			switch {
			case errors.Is(err, unix.EINTR):
				continue
			case err == nil && fds[0].Revents != 0:
				return io.ErrClosedPipe
			}
			return err
		}
	})
	return n, err
}

// unreadOfClosed is unread for a connection that the peer has closed without an error.
func unreadOfClosed(conn net.Conn) (n int, err error) {
	switch conn := conn.(type) {
	case *net.UnixConn:
		err = control(conn, func(fd int) error {
			n, err = unix.IoctlGetInt(fd, unix.SIOCOUTQ)
			return err
		})
		return n, err
	case unreader:
		return conn.Unread()
	}
	return 0, nil
}

func control(conn *net.UnixConn, f func(fd int) error) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) { failed = f(int(fd)) })
	if err = errors.Join(err, failed); err != nil {
		return fmt.Errorf("ask what the peer has not read: %w", err)
	}
	return nil
}
