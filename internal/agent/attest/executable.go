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
// does meanwhile. It is the caller's only if [Peer.Alive] says so afterwards.
// It has to be closed.
type Executable struct{ fd int }

// OpenExecutable holds what the process runs. It fails with [ErrGone] when the
// process has ended, with [fs.ErrNotExist] while it is ending, and otherwise where
// the kernel does not let the agent look.
func (p *Peer) OpenExecutable() (*Executable, error) {
	const name = "exe"
	fd, err := p.openExe(name)
	if errors.Is(err, unix.ENOENT) {
		fd, err = p.openThreadExe()
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
	return retry(func() (int, error) { return unix.Open(p.Proc(name), unix.O_PATH|unix.O_CLOEXEC, 0) })
}

const (
	// threadTries is how often the threads are listed again when all of them
	// have ended since.
	threadTries = 5
	// maxThreads bounds the work that one process can ask for. Threads that have
	// ended are listed only while a debugger holds them.
	maxThreads = 1024
)

// openThreadExe opens the executable at a thread other than the main one. The
// kernel drops a thread's memory when the thread ends, and with it its "exe",
// although the main thread stays visible for as long as the process lives. All
// threads share one memory (clone(2), CLONE_THREAD), and only those of this
// process are found below its "task".
func (p *Peer) openThreadExe() (int, error) {
	for range threadTries {
		threads, err := p.threads()
		if err != nil {
			return -1, err
		}
		for _, tid := range threads {
			fd, err := p.openExe("task/" + tid + "/exe")
			if err == nil || !ended(err) {
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

// ended reports whether err is what /proc says of a thread or process that has
// ended.
func ended(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) }

// Path is the file's path as the kernel names it. Where the file was deleted or
// replaced while it runs, " (deleted)" follows.
func (e *Executable) Path() (string, error) { return os.Readlink(e.self()) }

// Stat describes the file.
func (e *Executable) Stat() (unix.Stat_t, error) {
	var st unix.Stat_t
	_, err := retry(func() (int, error) { return 0, unix.Fstat(e.fd, &st) })
	if err != nil {
		return st, &fs.PathError{Op: "fstat", Path: e.name(), Err: err}
	}
	return st, nil
}

// Open opens the file for reading, which needs the permission to read it.
func (e *Executable) Open() (*os.File, error) {
	fd, err := retry(func() (int, error) { return unix.Open(e.self(), unix.O_RDONLY|unix.O_CLOEXEC, 0) })
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: e.name(), Err: err}
	}
	return os.NewFile(uintptr(fd), e.name()), nil
}

// Close lets go of the file.
func (e *Executable) Close() error { return unix.Close(e.fd) }

func (e *Executable) self() string { return "/proc/self/fd/" + strconv.Itoa(e.fd) }

// name is the file's name for a message.
func (e *Executable) name() string {
	if path, err := e.Path(); err == nil {
		return path
	}
	return e.self()
}

// Executable returns the path of the process's executable as the kernel names
// it, without a check that the process is still the caller: for messages. It is
// empty when it cannot be told.
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
