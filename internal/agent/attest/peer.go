package attest

import (
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/renewd/renewd/cache"
)

// ErrGone is returned if the calling process has exited. Its PID may belong to
// another process.
var ErrGone = errors.New("the process that opened the connection has exited")

// Peer is a calling process. It is safe for concurrent use and must be closed.
type Peer struct {
	pid      int
	uid, gid uint32
	proc     string // "/proc/PID/"

	mu     sync.RWMutex // keeps the pidfd open while it is polled
	pidfd  int          // -1 without one: startedAt identifies the process
	closed bool
	// startedAt is the process's start time in clock ticks after boot.
	startedAt uint64
	alive     func() error // see NewInProcess

	process func() cache.Process
}

// FromConn returns the process that connected conn. The kernel recorded it at
// connect: its PID, user and group (SO_PEERCRED) and, since Linux 6.5, a
// pidfd (SO_PEERPIDFD). On an older kernel FromConn opens a pidfd for the PID, and
// before Linux 5.3 it records the start time.
func FromConn(conn *net.UnixConn) (*Peer, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("identify the caller: %w", err)
	}
	var cred *unix.Ucred
	var credErr, pidfdErr error
	pidfd := -1
	err = raw.Control(func(fd uintptr) {
		if cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); credErr != nil {
			return
		}
		pidfd, pidfdErr = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	})
	if err = errors.Join(err, credErr); err != nil {
		return nil, fmt.Errorf("identify the caller: %w", err)
	}
	switch {
	case pidfdErr == nil:
		p := newPeer(int(cred.Pid), cred.Uid, cred.Gid)
		p.pidfd = pidfd
		if cred.Pid <= 0 {
			p.Close()
			return nil, errOtherNamespace
		}
		return p, nil
	case errors.Is(pidfdErr, unix.ENOPROTOOPT):
		return FromPID(int(cred.Pid), cred.Uid, cred.Gid)
	case cred.Pid <= 0:
		return nil, errOtherNamespace
	case errors.Is(pidfdErr, unix.ESRCH), errors.Is(pidfdErr, unix.EINVAL):
		return nil, ErrGone
	}
	return nil, fmt.Errorf("identify the caller: SO_PEERPIDFD: %w", pidfdErr)
}

var errOtherNamespace = errors.New("the caller's PID namespace is not visible to the agent: " +
	"run the agent in the host's PID namespace (hostPID: true in Kubernetes, --pid=host for containers)")

// FromPID returns the process that has this PID now, if the caller identified it by
// other means than a socket.
func FromPID(pid int, uid, gid uint32) (*Peer, error) {
	if pid <= 0 {
		return nil, errOtherNamespace
	}
	p := newPeer(pid, uid, gid)
	fd, err := unix.PidfdOpen(pid, 0)
	switch {
	case err == nil:
		p.pidfd = fd
		return p, nil
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EPERM):
		// EPERM: the seccomp filters of some container runtimes do not know the call.
		return p, p.recordStartTime()
	case errors.Is(err, unix.ESRCH), errors.Is(err, unix.EINVAL):
		return nil, ErrGone
	}
	return nil, fmt.Errorf("open pidfd of process %d: %w", pid, err)
}

func newPeer(pid int, uid, gid uint32) *Peer {
	p := &Peer{pid: pid, uid: uid, gid: gid, pidfd: -1, proc: "/proc/" + strconv.Itoa(pid) + "/"}
	p.process = sync.OnceValue(p.identify)
	return p
}

// NewInProcess returns a Peer for a workload that runs inside another process.
// [Peer.Alive] returns the result of alive.
func NewInProcess(process cache.Process, uid, gid uint32, alive func() error) *Peer {
	p := newPeer(process.PID, uid, gid)
	p.alive, p.process = alive, func() cache.Process { return process }
	return p
}

func (p *Peer) recordStartTime() (err error) {
	p.startedAt, _, err = p.readStat()
	return err
}

// PID is the process ID in the agent's PID namespace.
func (p *Peer) PID() int { return p.pid }

// Process identifies the process uniquely. Its start time is 0 if /proc does not show
// it.
func (p *Peer) Process() cache.Process { return p.process() }

func (p *Peer) identify() cache.Process {
	started, _, err := p.readStat()
	if err != nil || p.Alive() != nil { // it may be the start time of another process
		started = 0
	}
	return cache.Process{PID: p.pid, Started: started}
}

// Life reports whether the process runs, is stopped or has ended. It is Running if
// that is not known.
func Life(process cache.Process) cache.Life {
	if process.Started == 0 {
		return cache.Running
	}
	started, life, err := newPeer(process.PID, 0, 0).readStat()
	switch {
	case errors.Is(err, ErrGone), err == nil && started != process.Started:
		return cache.Ended
	case err != nil:
		return cache.Running
	}
	return life
}

// UID is the effective user ID at the time of the connect.
func (p *Peer) UID() uint32 { return p.uid }

// GID is the effective group ID at the time of the connect.
func (p *Peer) GID() uint32 { return p.gid }

// Alive returns nil while the process is alive, and [ErrGone] after it has exited,
// even if its PID was reused or its parent has not waited for it.
func (p *Peer) Alive() error {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if p.closed {
		return net.ErrClosed
	}
	if p.alive != nil {
		return p.alive()
	}
	if p.pidfd < 0 {
		started, _, err := p.readStat()
		if err == nil && started != p.startedAt {
			err = ErrGone
		}
		return err
	}
	fds := [1]unix.PollFd{{Fd: int32(p.pidfd), Events: unix.POLLIN}}
	for {
		// A pidfd becomes readable when its process ends: pidfd_open(2).
		n, err := unix.Poll(fds[:], 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("poll pidfd of process %d: %w", p.pid, err)
		case n > 0:
			return ErrGone
		}
		return nil
	}
}

// Close releases the process. It may be called more than once.
func (p *Peer) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil
	}
	p.closed = true
	if p.pidfd < 0 {
		return nil
	}
	return unix.Close(p.pidfd)
}
