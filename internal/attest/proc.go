package attest

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"strconv"

	"golang.org/x/sys/unix"
)

// Proc returns the path of a file of the process under /proc, such as
// "status". What is read there is the caller's only if [Peer.Alive] says so
// afterwards.
func (p *Peer) Proc(name string) string { return p.proc + name }

// ReadProc reads a file of the process under /proc into buf, which may be nil,
// and returns the part that was filled, or a longer slice where buf was too
// short. A file of more than limit bytes is an error. [ErrGone] means that the
// process has ended.
func (p *Peer) ReadProc(name string, buf []byte, limit int) ([]byte, error) {
	// Not os.ReadFile: this is done for each call of a workload, and files of
	// /proc never block.
	fd, err := retry(func() (int, error) { return unix.Open(p.Proc(name), unix.O_RDONLY|unix.O_CLOEXEC, 0) })
	if err != nil {
		return nil, p.procError("open", name, err)
	}
	defer unix.Close(fd)
	buf = buf[:cap(buf)]
	if len(buf) == 0 {
		buf = make([]byte, 4096)
	}
	used := 0
	for {
		if used == len(buf) {
			if used > limit {
				return nil, p.procError("read", name, fmt.Errorf("more than %d bytes", limit))
			}
			buf = append(buf, make([]byte, len(buf))...)
		}
		n, err := retry(func() (int, error) { return unix.Read(fd, buf[used:]) })
		if err != nil {
			return nil, p.procError("read", name, err)
		}
		if n <= 0 {
			break
		}
		used += n
	}
	if used > limit {
		return nil, p.procError("read", name, fmt.Errorf("more than %d bytes", limit))
	}
	return buf[:used], nil
}

func (p *Peer) procError(op, name string, err error) error {
	failed := &fs.PathError{Op: op, Path: p.Proc(name), Err: err}
	switch {
	case errors.Is(err, unix.ESRCH), op == "open" && errors.Is(err, unix.ENOENT):
		// A process that lives and is not in /proc is hidden from the agent. By
		// the pidfd only: without one, it is /proc that tells who lives.
		if p.pidfd >= 0 && p.Alive() == nil {
			return fmt.Errorf("%w: the process lives, but /proc hides it: %s", failed, showProc)
		}
		return ErrGone
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: %s", failed, showProc)
	}
	return failed
}

const showProc = "let the agent see every process (no hidepid option on /proc, ProtectProc=default in its unit)"

func retry(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// readStartTime returns when the process started, and [ErrGone] when no thread
// of it runs any more.
func (p *Peer) readStartTime() (uint64, error) {
	stat, err := p.ReadProc("stat", nil, 64<<10)
	if err != nil {
		return 0, err
	}
	started, ended, err := parseStat(stat)
	switch {
	case err != nil:
		return 0, &fs.PathError{Op: "parse", Path: p.Proc("stat"), Err: err}
	case ended:
		return 0, ErrGone
	}
	return started, nil
}

// parseStat finds the start time, field 22 of /proc/PID/stat, and whether the
// process has ended and waits for its parent: its main thread is a zombie
// (field 3) and no other thread is left (field 20). Field 2 is the command in
// parentheses and may itself hold spaces and parentheses, so the fields are
// counted from the last one: proc_pid_stat(5).
func parseStat(stat []byte) (started uint64, ended bool, err error) {
	const state, threads, start = 3, 20, 22
	end := bytes.LastIndexByte(stat, ')')
	if end < 0 {
		return 0, false, errors.New("no command name")
	}
	zombie, n := false, state
	for field := range bytes.FieldsSeq(stat[end+1:]) {
		switch n {
		case state:
			zombie = string(field) == "Z" || string(field) == "X"
		case threads:
			count := string(field)
			ended = zombie && (count == "1" || count == "0")
		case start:
			started, err = strconv.ParseUint(string(field), 10, 64)
			return started, ended, err
		}
		n++
	}
	return 0, false, errors.New("no start time")
}
