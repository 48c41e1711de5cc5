package attest

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
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
	if errors.Is(err, unix.ESRCH) || (op == "open" && errors.Is(err, unix.ENOENT)) {
		return ErrGone
	}
	return &fs.PathError{Op: op, Path: p.Proc(name), Err: err}
}

func retry(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// Executable returns the path of the process's program as the kernel names it,
// without a check that the process is still the caller: for messages. It is
// empty when it cannot be told.
func (p *Peer) Executable() string {
	path, err := os.Readlink(p.Proc("exe"))
	if err != nil {
		return ""
	}
	return path
}

func (p *Peer) readStartTime() (uint64, error) {
	stat, err := p.ReadProc("stat", nil, 64<<10)
	if err != nil {
		return 0, err
	}
	started, err := parseStartTime(stat)
	if err != nil {
		return 0, &fs.PathError{Op: "parse", Path: p.Proc("stat"), Err: err}
	}
	return started, nil
}

// parseStartTime finds the start time, field 22 of /proc/PID/stat. Field 2 is
// the command in parentheses and may itself hold spaces and parentheses, so
// the fields are counted from the last one: proc_pid_stat(5).
func parseStartTime(stat []byte) (uint64, error) {
	end := bytes.LastIndexByte(stat, ')')
	if end < 0 {
		return 0, errors.New("no command name")
	}
	const afterCommand = 22 - 3
	n := 0
	for field := range bytes.FieldsSeq(stat[end+1:]) {
		if n == afterCommand {
			return strconv.ParseUint(string(field), 10, 64)
		}
		n++
	}
	return 0, errors.New("no start time")
}
