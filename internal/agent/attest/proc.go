package attest

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/renewd/renewd/cache"
)

// Proc returns the path of a file of the process under /proc, such as
// "status". Its content is the caller's only if [Peer.Alive] returns nil afterwards.
func (p *Peer) Proc(name string) string { return p.proc + name }

// ReadProc reads a file of the process under /proc into buf, which may be nil,
// and returns the part that was filled, or a longer slice if buf is too short. A file
// of more than limit bytes is an error. [ErrGone] means that the process has exited.
func (p *Peer) ReadProc(name string, buf []byte, limit int) ([]byte, error) {
	// Not os.ReadFile: every call of a workload needs this, and files of /proc never
	// block.
	fd, err := retryInterrupted(func() (int, error) { return unix.Open(p.Proc(name), unix.O_RDONLY|unix.O_CLOEXEC, 0) })
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
		n, err := retryInterrupted(func() (int, error) { return unix.Read(fd, buf[used:]) })
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
		// A process that is alive by its pidfd and not in /proc is hidden from the
		// agent. Without a pidfd, Alive itself reads /proc.
		if p.pidfd >= 0 && p.Alive() == nil {
			return fmt.Errorf("%w: /proc hides the process: %s", failed, procRemedy)
		}
		return ErrGone
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: %s", failed, procRemedy)
	}
	return failed
}

const procRemedy = "let the agent see every process (no hidepid option on /proc, ProtectProc=default in its unit)"

func retryInterrupted(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// readStat returns when the process started and whether it runs or is stopped, and
// [ErrGone] if it has no thread left.
func (p *Peer) readStat() (started uint64, life cache.Life, err error) {
	// Most files have some 300 bytes, and every connection needs one.
	stat, err := p.ReadProc("stat", make([]byte, 512), 64<<10)
	if err != nil {
		return 0, cache.Running, err
	}
	started, life, err = parseStat(stat)
	switch {
	case err != nil:
		return 0, cache.Running, &fs.PathError{Op: "parse", Path: p.Proc("stat"), Err: err}
	case life == cache.Ended:
		return 0, life, ErrGone
	}
	return started, life, nil
}

// parseStat returns the start time, field 22 of /proc/PID/stat, and the life of the
// process by the state of its main thread, field 3: stopped, or ended if no other
// thread is left (field 20). Field 2 is the command in parentheses and may contain
// spaces and parentheses, so the fields are counted from the last parenthesis:
// proc_pid_stat(5).
func parseStat(stat []byte) (started uint64, life cache.Life, err error) {
	const state, threads, start = 3, 20, 22
	end := bytes.LastIndexByte(stat, ')')
	if end < 0 {
		return 0, cache.Running, errors.New("no command name")
	}
	zombie, n := false, state
	for field := range bytes.FieldsSeq(stat[end+1:]) {
		switch n {
		case state:
			switch string(field) {
			case "Z", "X":
				zombie = true
			case "T", "t":
				life = cache.Stopped
			}
		case threads:
			if count := string(field); zombie && (count == "1" || count == "0") {
				life = cache.Ended
			}
		case start:
			started, err = strconv.ParseUint(string(field), 10, 64)
			return started, life, err
		}
		n++
	}
	return 0, cache.Running, errors.New("no start time")
}

// Running returns the process that has this PID now, with the user and the group that it
// runs as: for an operator who names it.
func Running(pid int) (*Peer, error) {
	p, err := FromPID(pid, 0, 0)
	if err != nil {
		return nil, err
	}
	text, err := p.ReadProc("status", nil, maxStatus)
	if err == nil {
		err = p.Alive()
	}
	if err == nil {
		p.uid, err = effectiveID(text, "Uid")
	}
	if err == nil {
		p.gid, err = effectiveID(text, "Gid")
	}
	if err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

// InAgentsPIDNamespace reports whether the process sees the node's processes as the agent
// does. A process in a container usually does not, also if it is root's.
func (p *Peer) InAgentsPIDNamespace() (bool, error) {
	text, err := p.ReadProc("status", nil, maxStatus)
	if err == nil {
		err = p.Alive()
	}
	if err != nil {
		return false, err
	}
	// One PID for each namespace, from the agent's inwards.
	return len(statusFields(text, "NSpid")) == 1, nil
}

// maxStatus exceeds the size of the status file with the most groups that Linux allows.
const maxStatus = 1 << 20

// statusFields returns the values in a line of /proc/PID/status; none without the line.
func statusFields(text []byte, name string) [][]byte {
	for line := range bytes.Lines(text) {
		if found, value, ok := bytes.Cut(line, []byte(":")); ok && string(found) == name {
			return bytes.Fields(value)
		}
	}
	return nil
}

// effectiveID returns the second of the four IDs real, effective, saved, file system.
func effectiveID(text []byte, name string) (uint32, error) {
	ids := statusFields(text, name)
	if len(ids) != 4 {
		return 0, fmt.Errorf("status of the process has no line %s with four IDs", name)
	}
	id, err := strconv.ParseUint(string(ids[1]), 10, 32)
	return uint32(id), err
}
