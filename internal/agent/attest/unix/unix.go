// Package unix attests a process by the kernel's data about it. Its selectors are
// those of SPIRE's attestor of the same name:
//
//	unix:uid:1000                 effective user ID
//	unix:user:alice               its name
//	unix:gid:1000                 effective group ID
//	unix:group:staff              its name
//	unix:supplementary_gid:27     each supplementary group ID
//	unix:supplementary_group:sudo their names
//	unix:path:/usr/bin/app        the program's path in the process's mount namespace
//	unix:sha256:9f86d0...         the program's SHA-256 in hex
//
// A user may run any program under any path in another mount namespace: an entry that
// names a path should name the user or the hash as well.
package unix

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"sync"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/attest"
)

// Name is the attestor's name and the type of its selectors.
const Name = "unix"

// Config configures the attestor. The zero value is valid.
type Config struct {
	// SkipPath leaves out unix:path. Reading the path requires the same user or
	// CAP_SYS_PTRACE.
	SkipPath bool
	// SHA256Limit is the size in bytes above which an executable gets no
	// unix:sha256, because hashing would delay its workload. Zero means that none
	// gets one. The hash of a file is cached until the file changes.
	SHA256Limit int64
	// SHA256Needed reports whether an entry has a unix:sha256 selector; otherwise
	// nothing is hashed. It is called at each attestation. Nil: always.
	SHA256Needed func() bool
}

// Attestor is an [attest.Attestor]. Make it with [New], and close it.
type Attestor struct {
	cfg           Config
	users         *names
	groups        *names
	supplementary *names
	hashes        *hashes
}

var _ attest.Attestor = (*Attestor)(nil)

// New returns the attestor.
func New(cfg Config) *Attestor {
	if cfg.SHA256Needed == nil {
		cfg.SHA256Needed = func() bool { return true }
	}
	return &Attestor{
		cfg:           cfg,
		users:         newNames("uid:", "user:", lookupUser),
		groups:        newNames("gid:", "group:", lookupGroup),
		supplementary: newNames("supplementary_gid:", "supplementary_group:", lookupGroup),
		hashes:        newHashes(),
	}
}

// Close stops hashing and waits for it. Attestations that wait for a hash get none.
func (a *Attestor) Close() error {
	a.hashes.close()
	return nil
}

// Name returns "unix".
func (a *Attestor) Name() string { return Name }

// statusLimit exceeds the size of the status file with the most groups that Linux
// allows.
const statusLimit = 1 << 20

var buffers = sync.Pool{New: func() any { b := make([]byte, 4096); return &b }}

// Attest reads the process's credentials and executable. There are no selectors if the
// credentials cannot be read, or if the process runs as another user or group than it
// connected as. Any other failure only costs its own selectors.
func (a *Attestor) Attest(ctx context.Context, p *attest.Peer) ([]cache.Selector, error) {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	text, err := p.ReadProc("status", *buf, statusLimit)
	if err != nil {
		return nil, fmt.Errorf("read credentials: %w", err)
	}
	st, err := parseStatus(text)
	if err != nil {
		return nil, fmt.Errorf("read credentials: %s: %w", p.Proc("status"), err)
	}
	// The caller may have left the connection to a child and executed a set-user-ID
	// program, which is not the caller.
	if st.uid != p.UID() || st.gid != p.GID() {
		return nil, fmt.Errorf("process %d connected as user %d, group %d and now runs as user %d, group %d: connect again",
			p.PID(), p.UID(), p.GID(), st.uid, st.gid)
	}
	f := findings{selectors: make([]cache.Selector, 0, 6+2*len(st.groups))}
	a.users.add(&f, st.uid)
	a.groups.add(&f, st.gid)
	for _, g := range st.groups {
		a.supplementary.add(&f, g)
	}
	if st.moreGroups {
		f.addFailure(fmt.Errorf("process %d has more than %d supplementary groups: no selectors for the others", p.PID(), maxGroups))
	}
	hash := a.cfg.SHA256Limit > 0 && a.cfg.SHA256Needed()
	if hash || !a.cfg.SkipPath {
		a.executable(ctx, p, &f, hash)
	}
	return f.selectors, errors.Join(f.failures...)
}

// findings are the selectors and failures of one attestation.
type findings struct {
	selectors []cache.Selector
	failures  []error
}

func (f *findings) add(value string) {
	f.selectors = append(f.selectors, cache.Selector{Type: Name, Value: value})
}

func (f *findings) addFailure(err error) { f.failures = append(f.failures, err) }

// executable adds unix:path and unix:sha256.
func (a *Attestor) executable(ctx context.Context, p *attest.Peer, f *findings, hash bool) {
	exe, err := p.OpenExecutable()
	switch {
	case errors.Is(err, fs.ErrPermission):
		f.addFailure(fmt.Errorf("read executable: %w: run the agent as root or give it CAP_SYS_PTRACE, "+
			"or set unix.discover_path: false", err))
		return
	case err != nil:
		f.addFailure(fmt.Errorf("read executable: %w", err))
		return
	}
	defer exe.Close()
	if !a.cfg.SkipPath {
		path, err := pathOf(exe)
		if err != nil {
			f.addFailure(fmt.Errorf("read executable's path: %w", err))
		} else {
			f.add("path:" + path)
		}
	}
	if !hash {
		return
	}
	sum, err := a.hashes.hashOf(ctx, p.UID(), exe, a.cfg.SHA256Limit)
	switch {
	case errors.Is(err, fs.ErrPermission):
		f.addFailure(fmt.Errorf("hash executable: %w: run the agent as root or give it CAP_DAC_READ_SEARCH, "+
			"or set unix.sha256_size_limit: 0", err))
	case err != nil:
		f.addFailure(fmt.Errorf("hash executable: %w", err))
	default:
		f.add("sha256:" + sum)
	}
}

const deletedSuffix = " (deleted)"

// pathOf returns the path of an executable. If the file was replaced under the running
// process, as a package upgrade does, the kernel adds " (deleted)": the process is
// still the one that was started from that path. An executable without a file
// (memfd_create(2)) is named /memfd:NAME, which is no file's path in practice, and is
// "deleted" from the beginning.
func pathOf(exe *attest.Executable) (string, error) {
	path, err := exe.Path()
	if err != nil {
		return "", err
	}
	if name, found := strings.CutSuffix(path, deletedSuffix); found {
		// A file's name may end like that, too. Only a deleted file has no link.
		st, err := exe.Stat()
		if err != nil {
			return "", err
		}
		if st.Nlink == 0 {
			path = name
		}
	}
	return path, nil
}

func formatID(id uint32) string { return strconv.FormatUint(uint64(id), 10) }
