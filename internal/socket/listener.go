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
	// checkInterval is how often the socket file is checked, with one lstat(2).
	checkInterval = time.Second
	// maxListening bounds the sockets that are served: the one at the path and earlier
	// ones. A container that has the file itself mounted connects to the socket that
	// was at the path then.
	maxListening = 8
)

// Listener is a [net.Listener] of the Unix socket at a path. Recreating the socket file
// does not affect open connections. It is safe for concurrent use.
type Listener struct {
	path string
	mode fs.FileMode

	accepted chan accepted
	closing  chan struct{}
	accepts  sync.WaitGroup

	mu        sync.Mutex
	closed    bool
	listening []*net.UnixListener // the newest last
	file      fs.FileInfo         // of the newest socket
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

// bind creates the socket file and accepts its connections, too.
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

// Close stops listening and removes the socket file, unless another process has replaced
// it.
func (l *Listener) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	close(l.closing)
	l.mu.Unlock()
	// Since closed is set, bind adds no other socket.
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

// inPlace reports whether a client that connects to the path reaches this process. If the
// file's ctime has changed, the file was renamed, linked or given other permissions, or it
// is another file with the same inode number.
func (l *Listener) inPlace() bool {
	l.mu.Lock()
	created := l.file
	l.mu.Unlock()
	found, err := os.Lstat(l.path)
	switch {
	case err != nil || found.Mode().Type() != fs.ModeSocket:
		return false
	case os.SameFile(created, found) && ctime(created) == ctime(found):
		return true
	case !isOurs(l.path):
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.file = found
	return true
}

func ctime(info fs.FileInfo) syscall.Timespec { return info.Sys().(*syscall.Stat_t).Ctim }

// Err returns nil if the socket file was in place at the last check of [Listener.Watch],
// otherwise why new clients do not reach this process.
func (l *Listener) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// Watch recreates the socket when its file was removed, until ctx is done. It does not
// replace the socket of another process or a file that is not a socket. In that case, or if
// the file cannot be created, it retries, and [Listener.Err] returns the cause. It logs
// each of these events once.
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

// check checks the socket file once and recreates it if needed.
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
