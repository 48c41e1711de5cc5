package attest

import (
	"errors"
	"io/fs"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// Executable is the file that a process runs, held open: its path, its identity
// and its content are those of one file, whatever the process or the file system
// does. It is the caller's only if [Peer.Alive] returns nil afterwards.
// It must be closed.
type Executable struct{ fd int }

// OpenExecutable opens the executable of the process. It fails with [ErrGone] if the
// process has exited, with [fs.ErrNotExist] while it is exiting, and with the kernel's
// error if the agent lacks the permission.
func (p *Peer) OpenExecutable() (*Executable, error) {
	const name = "exe"
	fd, err := p.openExe(name)
	if errors.Is(err, unix.ENOENT) {
		fd, err = p.openExeOfThread()
	}
	switch {
	case err == nil:
		return &Executable{fd}, nil
	case p.Alive() != nil:
		return nil, ErrGone
	}
	return nil, &fs.PathError{Op: "open", Path: p.Proc(name), Err: err}
}

// openExe needs no permission on the file itself: open(2), O_PATH.
func (p *Peer) openExe(name string) (int, error) {
	return retryInterrupted(func() (int, error) { return unix.Open(p.Proc(name), unix.O_PATH|unix.O_CLOEXEC, 0) })
}

const (
	// threadTries is how often the threads are listed if all of them exit before
	// they are read.
	threadTries = 5
	// maxThreads bounds the work that one process can cause. Threads that have
	// exited are listed only while a debugger holds them.
	maxThreads = 1024
)

// openExeOfThread opens the executable through another thread than the main one. The
// kernel drops the memory of a thread that exits, and with it its "exe", although the
// main thread stays visible while the process is alive. All threads share one memory
// (clone(2), CLONE_THREAD), and "task" lists only those of this process.
func (p *Peer) openExeOfThread() (int, error) {
	for range threadTries {
		threads, err := p.threads()
		if err != nil {
			return -1, err
		}
		for _, tid := range threads {
			fd, err := p.openExe("task/" + tid + "/exe")
			if err == nil || !isEnded(err) {
				return fd, err
			}
		}
		if p.Alive() != nil {
			break
		}
	}
	return -1, unix.ENOENT
}

func (p *Peer) threads() ([]string, error) {
	dir, err := os.Open(p.Proc("task"))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return dir.Readdirnames(maxThreads)
}

// isEnded reports whether err is the error of /proc for a thread or process that has
// exited.
func isEnded(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) }

// Path is the file's path as the kernel names it, followed by " (deleted)" if the file
// was deleted or replaced.
func (e *Executable) Path() (string, error) { return os.Readlink(e.self()) }

// Stat describes the file.
func (e *Executable) Stat() (unix.Stat_t, error) {
	var st unix.Stat_t
	_, err := retryInterrupted(func() (int, error) { return 0, unix.Fstat(e.fd, &st) })
	if err != nil {
		return st, &fs.PathError{Op: "fstat", Path: e.name(), Err: err}
	}
	return st, nil
}

// Open opens the file for reading, which requires the permission to read it.
func (e *Executable) Open() (*os.File, error) {
	fd, err := retryInterrupted(func() (int, error) { return unix.Open(e.self(), unix.O_RDONLY|unix.O_CLOEXEC, 0) })
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: e.name(), Err: err}
	}
	return os.NewFile(uintptr(fd), e.name()), nil
}

// Close closes the file.
func (e *Executable) Close() error { return unix.Close(e.fd) }

func (e *Executable) self() string { return "/proc/self/fd/" + strconv.Itoa(e.fd) }

// name is the file's name for error messages.
func (e *Executable) name() string {
	if path, err := e.Path(); err == nil {
		return path
	}
	return e.self()
}

// Executable returns the path of the process's executable as the kernel names it, for
// log messages: it does not check that the process is still the caller. It is empty if
// the path cannot be read.
func (p *Peer) Executable() string {
	exe, err := p.OpenExecutable()
	if err != nil {
		return ""
	}
	defer exe.Close()
	path, err := exe.Path()
	if err != nil {
		return ""
	}
	return path
}
