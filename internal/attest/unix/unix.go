// Package unix attests a process by what the kernel says of it. Its selectors
// are those of SPIRE's attestor of the same name:
//
//	unix:uid:1000                 effective user ID
//	unix:user:alice               its name
//	unix:gid:1000                 effective group ID
//	unix:group:staff              its name
//	unix:supplementary_gid:27     each supplementary group ID
//	unix:supplementary_group:sudo their names
//	unix:path:/usr/bin/app        the program, as the process's mount namespace has it
//	unix:sha256:9f86d0...         the program's SHA-256 in hex
//
// A user may run any program under any path in a mount namespace of his own:
// an entry that names a path should name the user or the hash as well.
package unix

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/attest"
)

// Name is the attestor's name and the type of its selectors.
const Name = "unix"

// DefaultSHA256Limit is the size above which programs are not hashed.
const DefaultSHA256Limit = 1 << 30

// Config sets up the attestor. The zero value works.
type Config struct {
	// SkipPath leaves out unix:path. By default it is there whenever the
	// program's name can be read, which takes the same user or CAP_SYS_PTRACE.
	SkipPath bool
	// SHA256 adds unix:sha256. The hash of a program is computed once and kept
	// for as long as the file does not change.
	SHA256 bool
	// SHA256Limit is the size in bytes above which a program gets no
	// unix:sha256, since hashing it would hold its workload up. Zero means
	// DefaultSHA256Limit, a negative number no limit.
	SHA256Limit int64
	// Log gets a warning for what keeps selectors from being found. Nil: none.
	Log *slog.Logger
}

// Attestor is an [attest.Attestor]. Make it with [New].
type Attestor struct {
	cfg      Config
	log      *slog.Logger
	users    *names
	groups   *names
	suppl    *names
	programs *programs
	warnings sync.Map // of those given already, by what they are about
}

var _ attest.Attestor = (*Attestor)(nil)

// New returns the attestor.
func New(cfg Config) *Attestor {
	if cfg.SHA256Limit == 0 {
		cfg.SHA256Limit = DefaultSHA256Limit
	}
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Attestor{
		cfg:      cfg,
		log:      log,
		users:    newNames("uid:", "user:", lookupUser),
		groups:   newNames("gid:", "group:", lookupGroup),
		suppl:    newNames("supplementary_gid:", "supplementary_group:", lookupGroup),
		programs: newPrograms(),
	}
}

// Name returns "unix".
func (a *Attestor) Name() string { return Name }

// statusLimit is more than the status of a process with maxGroups groups.
const statusLimit = 256 << 10

var buffers = sync.Pool{New: func() any { b := make([]byte, 4096); return &b }}

// Attest reads the process's status and program. It fails when the process has
// ended, runs as another user or group than it connected as, or when the user database cannot be asked and the name is not known
// from an earlier answer. A program that may not be read costs only its own
// selectors and is reported once.
func (a *Attestor) Attest(ctx context.Context, p *attest.Peer) ([]cache.Selector, error) {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	text, err := p.ReadProc("status", *buf, statusLimit)
	if err != nil {
		return nil, fmt.Errorf("read the credentials: %w", err)
	}
	st, err := parseStatus(text)
	if err != nil {
		return nil, fmt.Errorf("read the credentials: %s: %w", p.Proc("status"), err)
	}
	// A set-user-ID program that the caller has become meanwhile, leaving the
	// connection to a child, is not the caller.
	if st.uid != p.UID() || st.gid != p.GID() {
		return nil, fmt.Errorf("process %d connected as user %d, group %d and runs as user %d, group %d now: it has to connect again",
			p.PID(), p.UID(), p.GID(), st.uid, st.gid)
	}
	out := make([]cache.Selector, 0, 6+2*len(st.groups))
	if out, err = a.users.add(out, st.uid); err != nil {
		return nil, err
	}
	if out, err = a.groups.add(out, st.gid); err != nil {
		return nil, err
	}
	for _, g := range st.groups {
		if out, err = a.suppl.add(out, g); err != nil {
			return nil, err
		}
	}
	return a.program(ctx, p, out)
}

// program adds unix:path and unix:sha256.
func (a *Attestor) program(ctx context.Context, p *attest.Peer, out []cache.Selector) ([]cache.Selector, error) {
	if !a.cfg.SkipPath {
		path, err := executable(p)
		switch {
		case err == nil:
			out = append(out, cache.Selector{Type: Name, Value: "path:" + path})
		case errors.Is(err, fs.ErrPermission):
			a.warn("path", "workloads' programs cannot be read, unix:path and unix:sha256 selectors are missing: "+
				"run the agent as root or give it CAP_SYS_PTRACE", slog.Any("error", err))
		case !errors.Is(err, fs.ErrNotExist): // a kernel thread has none
			return nil, fmt.Errorf("read the program's path: %w", err)
		}
	}
	if !a.cfg.SHA256 {
		return out, nil
	}
	sum, err := a.programs.sha256(ctx, p, a.cfg.SHA256Limit)
	switch {
	case err == nil:
		out = append(out, cache.Selector{Type: Name, Value: "sha256:" + sum})
	case errors.Is(err, errTooLarge):
		path := p.Executable()
		a.warn(path, "a workload's program is larger than unix.sha256_size_limit and gets no unix:sha256 selector",
			slog.String("path", path), slog.Int64("limit", a.cfg.SHA256Limit))
	case errors.Is(err, fs.ErrPermission):
		a.warn("path", "workloads' programs cannot be read, unix:path and unix:sha256 selectors are missing: "+
			"run the agent as root or give it CAP_SYS_PTRACE", slog.Any("error", err))
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("hash the program: %w", err)
	}
	return out, nil
}

// warn reports each problem once.
func (a *Attestor) warn(about, message string, attrs ...any) {
	// What a workload is called is up to the workload: past some number of
	// different ones the log would not become clearer.
	const most = 100
	n := 0
	a.warnings.Range(func(any, any) bool { n++; return n < most })
	if n >= most {
		return
	}
	if _, given := a.warnings.LoadOrStore(about, struct{}{}); !given {
		a.log.Warn(message, attrs...)
	}
}

const deleted = " (deleted)"

// executable returns the path of the process's program. Where the file was
// replaced under the running process, as a package upgrade does, the kernel
// adds " (deleted)": the process is still the one that was started from there.
func executable(p *attest.Peer) (string, error) {
	link := p.Proc("exe")
	path, err := os.Readlink(link)
	if err != nil {
		return "", err
	}
	if name, found := strings.CutSuffix(path, deleted); found {
		// A file may also be called that; only a deleted one has no link.
		var st syscall.Stat_t
		if err := syscall.Stat(link, &st); err != nil {
			return "", &fs.PathError{Op: "stat", Path: link, Err: err}
		}
		if st.Nlink == 0 {
			path = name
		}
	}
	return path, nil
}

func formatID(id uint32) string { return strconv.FormatUint(uint64(id), 10) }
