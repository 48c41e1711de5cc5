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

// ErrGone is returned when the process that called has ended. Its PID may
// belong to another one by now.
var ErrGone = errors.New("the process that opened the connection has ended")

// Peer is a process that called. It is safe for concurrent use and has to be
// closed.
type Peer struct {
	pid      int
	uid, gid uint32
	proc     string // "/proc/PID/"

	mu     sync.RWMutex // keeps the pidfd open while it is polled
	pidfd  int          // -1 where the kernel has none: started counts then
	closed bool
	// started is the process's start time in clock ticks after boot, with
	// which the PID is compared where there is no pidfd.
	started uint64
	alive   func() error // see Made

	process func() cache.Process
}

// FromConn returns the process that connected conn. The kernel recorded it at
// connect: its PID, user and group (SO_PEERCRED) and, since Linux 6.5, a
// pidfd of it (SO_PEERPIDFD). An older kernel's PID is turned into a pidfd
// here, and before Linux 5.3 the start time has to do.
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
			return nil, errForeign
		}
		return p, nil
	case errors.Is(pidfdErr, unix.ENOPROTOOPT):
		return FromPID(int(cred.Pid), cred.Uid, cred.Gid)
	case cred.Pid <= 0:
		return nil, errForeign
	case errors.Is(pidfdErr, unix.ESRCH), errors.Is(pidfdErr, unix.EINVAL):
		return nil, ErrGone
	}
	return nil, fmt.Errorf("identify the caller: SO_PEERPIDFD: %w", pidfdErr)
}

var errForeign = errors.New("the caller runs in a PID namespace that is not visible here: " +
	"run the agent in the host's PID namespace (hostPID: true in Kubernetes, --pid=host for containers)")

// FromPID holds the process that has this PID now. It is for those who know
// the process by other means than a socket.
func FromPID(pid int, uid, gid uint32) (*Peer, error) {
	if pid <= 0 {
		return nil, errForeign
	}
	p := newPeer(pid, uid, gid)
	fd, err := unix.PidfdOpen(pid, 0)
	switch {
	case err == nil:
		p.pidfd = fd
		return p, nil
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EPERM):
		// EPERM: some container runtimes' seccomp filters do not know the call.
		return p, p.byStartTime()
	case errors.Is(err, unix.ESRCH), errors.Is(err, unix.EINVAL):
		return nil, ErrGone
	}
	return nil, fmt.Errorf("hold process %d: %w", pid, err)
}

func newPeer(pid int, uid, gid uint32) *Peer {
	p := &Peer{pid: pid, uid: uid, gid: gid, pidfd: -1, proc: "/proc/" + strconv.Itoa(pid) + "/"}
	p.process = sync.OnceValue(p.name)
	return p
}

// Made returns a process that the kernel does not know, for workloads that run inside
// another process. alive is what [Peer.Alive] returns.
func Made(process cache.Process, uid, gid uint32, alive func() error) *Peer {
	p := newPeer(process.PID, uid, gid)
	p.alive, p.process = alive, func() cache.Process { return process }
	return p
}

func (p *Peer) byStartTime() (err error) {
	p.started, _, err = p.readStat()
	return err
}

// PID is the process ID as seen from the agent's PID namespace.
func (p *Peer) PID() int { return p.pid }

// Process names the process so that no other is ever taken for it. Its start time is 0
// where /proc does not tell it.
func (p *Peer) Process() cache.Process { return p.process() }

func (p *Peer) name() cache.Process {
	started, _, err := p.readStat()
	if err != nil || p.Alive() != nil { // the start time may be that of another one
		started = 0
	}
	return cache.Process{PID: p.pid, Started: started}
}

// Life says what the process does.
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

// Alive returns nil while the process runs, and [ErrGone] from its end on,
// even when its PID was given to another process or nobody waited for it.
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
		if err == nil && started != p.started {
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
			return fmt.Errorf("look at process %d: %w", p.pid, err)
		case n > 0:
			return ErrGone
		}
		return nil
	}
}

// Close gives the process up. It may be called more than once.
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
