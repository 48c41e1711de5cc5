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

// An answer that gRPC has accepted may not have been read: gRPC queues what exceeds the
// client's flow control window, and the kernel what the client does not read. An answer
// was read if its last byte was written to the connection and the peer then had nothing
// left to read.

// peerConn is a connection that knows which answers its peer has read. It releases the
// process when it is closed.
type peerConn struct {
	coalescingConn
	close func()

	mu       sync.Mutex
	tracked  []*delivery
	finished bool // the peer read everything and then closed the connection
	broken   bool // what was written may be lost
}

// unreadCounter is a connection that knows how many written bytes the peer has not
// read. On others what was written counts as read.
type unreadCounter interface{ Unread() (int, error) }

// delivery is an answer that is being sent.
type delivery struct {
	answer  mem.Buffer // held, so that no other answer reuses its memory
	last    *byte      // the last byte of the answer, in the memory that gRPC writes
	written bool       // guarded by peerConn.mu
}

// track begins to track an answer that is passed to gRPC afterwards. gRPC must not copy
// it, so the server has no write buffer. The answer must not be empty or change. The
// caller keeps its reference.
func (c *peerConn) track(answer mem.Buffer) *delivery {
	answer.Ref()
	data := answer.ReadOnlyData()
	c.mu.Lock()
	defer c.mu.Unlock()
	d := &delivery{answer: answer, last: &data[len(data)-1]}
	c.tracked = append(c.tracked, d)
	return d
}

// untrack ends the tracking. It must be called once for each delivery.
func (c *peerConn) untrack(d *delivery) {
	c.mu.Lock()
	c.tracked = slices.DeleteFunc(c.tracked, func(e *delivery) bool { return e == d })
	c.mu.Unlock()
	d.answer.Free()
}

// wasRead reports whether the peer has read an answer.
func (c *peerConn) wasRead(d *delivery) bool {
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

// readGrace is about how long wasReadAtEnd waits until it is known what the client
// read.
const readGrace = 500 * time.Millisecond

// wasReadAtEnd is wasRead for a stream that its client has ended. A client that asks
// once ends the stream and closes the connection as soon as it has its answer. That may
// be before the write has returned here, and before gRPC has read the end of the
// connection, which tells what was read. So it polls for readGrace.
func (c *peerConn) wasReadAtEnd(d *delivery) bool {
	for pause := time.Millisecond; ; pause *= 2 {
		if c.wasRead(d) {
			return true
		}
		c.mu.Lock()
		broken := c.broken
		c.mu.Unlock()
		if broken || pause > readGrace/2 {
			return false
		}
		time.Sleep(pause)
	}
}

func (c *peerConn) Write(b []byte) (int, error) {
	n, err := c.coalescingConn.Write(b)
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case errors.Is(err, unix.EPIPE):
		// The peer has closed the connection. Read finds out what it had read.
	case err != nil:
		c.broken = true
	case n > 0:
		for _, d := range c.tracked {
			d.written = d.written || d.last == &b[n-1]
		}
	}
	return n, err
}

// Read records how the peer closes the connection. If it left something unread, that
// is ECONNRESET and not EOF: unix(7).
func (c *peerConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil {
		c.readFailed(err)
	}
	return n, err
}

// readFailed records whether the peer had read everything when reading ended with err.
func (c *peerConn) readFailed(err error) {
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

// unread returns how many bytes the peer has not read. It fails once the peer has closed
// the connection: the kernel then drops what is left.
func unread(conn net.Conn) (n int, err error) {
	uc, ok := conn.(*net.UnixConn)
	if !ok {
		return unreadOfClosed(conn)
	}
	err = control(uc, func(fd int) error {
		if n, err = unix.IoctlGetInt(fd, unix.SIOCOUTQ); err != nil || n > 0 {
			return err
		}
		// Poll last: the kernel marks the connection before it drops what is left.
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
	case unreadCounter:
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
		return fmt.Errorf("query unread bytes: %w", err)
	}
	return nil
}
