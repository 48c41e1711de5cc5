package socket

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

const (
	// checkInterval is how often the socket file is looked at: one lstat(2).
	checkInterval = time.Second
	// maxListening is how many sockets are listened on, the one at the path and
	// those that were there before. A container into which the file itself was
	// mounted still connects to the one that it got.
	maxListening = 8
)

// Listener is a [net.Listener] of the Unix socket at a path. Connections stay
// what they are when the socket is made again. It is safe for concurrent use.
type Listener struct {
	path string
	mode fs.FileMode

	accepted chan accepted
	closing  chan struct{}
	accepts  sync.WaitGroup

	mu        sync.Mutex
	closed    bool
	listening []*net.UnixListener // the newest last
	file      fs.FileInfo         // of the socket that was made last
	err       error
}

type accepted struct {
	conn net.Conn
	err  error
}

var _ net.Listener = (*Listener)(nil)

func newListener(path string, mode fs.FileMode) *Listener {
	return &Listener{path: path, mode: mode, accepted: make(chan accepted), closing: make(chan struct{})}
}

// bind makes the socket file and accepts connections of it, too.
func (l *Listener) bind() error {
	lis, file, err := bind(l.path, l.mode)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return errors.Join(net.ErrClosed, os.Remove(l.path), lis.Close())
	}
	l.file = file
	l.listening = append(l.listening, lis)
	l.accepts.Go(func() { l.acceptFrom(lis) })
	if len(l.listening) > maxListening {
		_ = l.listening[0].Close()
		l.listening = l.listening[1:]
	}
	return nil
}

func (l *Listener) acceptFrom(lis *net.UnixListener) {
	for {
		conn, err := lis.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		select {
		case l.accepted <- accepted{conn, err}:
		case <-l.closing:
			if err == nil {
				conn.Close()
			}
			return
		}
	}
}

// Accept returns the next connection.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case a := <-l.accepted:
		return a.conn, a.err
	case <-l.closing:
		return nil, &net.OpError{Op: "accept", Net: "unix", Addr: l.Addr(), Err: net.ErrClosed}
	}
}

// Addr returns the socket's address.
func (l *Listener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

// Close ends listening and removes the socket file, unless another process has
// made one in its place.
func (l *Listener) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	close(l.closing)
	l.mu.Unlock()
	// From here on bind adds no other socket: what is in place now is the last.
	var errs []error
	if l.inPlace() {
		if err := os.Remove(l.path); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	for _, lis := range l.listening {
		errs = append(errs, lis.Close())
	}
	l.accepts.Wait()
	return errors.Join(errs...)
}

// inPlace reports whether callers who connect to the path reach this process. A
// file that is not as it was made has been renamed, linked or given other
// permissions, or it is another one under the same inode number.
func (l *Listener) inPlace() bool {
	l.mu.Lock()
	made := l.file
	l.mu.Unlock()
	found, err := os.Lstat(l.path)
	switch {
	case err != nil || found.Mode().Type() != fs.ModeSocket:
		return false
	case os.SameFile(made, found) && ctime(made) == ctime(found):
		return true
	case !listenedOnHere(l.path):
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.file = found
	return true
}

func ctime(info fs.FileInfo) syscall.Timespec { return info.Sys().(*syscall.Stat_t).Ctim }

// Err is nil while the socket file is in its place, as far as [Listener.Watch]
// knows. Otherwise it says why new callers do not reach this process.
func (l *Listener) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// Watch makes the socket again when its file was removed, until ctx is done. It
// leaves alone what another process listens on and what is no socket; then, and
// where the file cannot be made, it tries again until it can, and [Listener.Err]
// says why. Log gets one line for each of these events.
func (l *Listener) Watch(ctx context.Context, log *slog.Logger) {
	tick := time.NewTicker(checkInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.closing:
			return
		case <-tick.C:
			l.check(log)
		}
	}
}

// check looks at the socket file once.
func (l *Listener) check(log *slog.Logger) {
	before := l.Err()
	var err error
	if l.inPlace() {
		if before != nil {
			log.Info("socket file recovered", "path", l.path)
		}
	} else if err = l.bind(); err == nil {
		log.Warn("socket file recreated", "path", l.path)
	} else if before == nil && !errors.Is(err, net.ErrClosed) {
		log.Error("socket file missing", "path", l.path, "error", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.err = err
}
