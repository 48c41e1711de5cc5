package unix

import (
	"container/list"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"syscall"

	"github.com/renewd/renewd/internal/attest"
)

// maxPrograms bounds the hashes kept; the least recently used goes first.
const maxPrograms = 512

var errTooLarge = errors.New("larger than the limit")

// fileID is a file in one state. Its content cannot change without a change of
// ctime, which nobody can set.
type fileID struct {
	dev, ino     uint64
	size         int64
	mtime, ctime syscall.Timespec
}

// programs keeps hashes of programs. Safe for concurrent use.
type programs struct {
	// busy is held while a file is hashed: one at a time, so that workloads
	// cannot keep more than one core busy with it.
	busy chan struct{}

	mu     sync.Mutex
	sums   map[fileID]*list.Element // of program
	recent *list.List               // least recently used first
}

type program struct {
	id  fileID
	sum string
}

func newPrograms() *programs {
	return &programs{busy: make(chan struct{}, 1), sums: make(map[fileID]*list.Element), recent: list.New()}
}

// sha256 returns the hex SHA-256 of the process's program. What is hashed is
// the file that runs, also where its path leads elsewhere by now.
func (c *programs) sha256(ctx context.Context, p *attest.Peer, limit int64) (string, error) {
	id, err := statFile(p.Proc("exe"))
	if err != nil {
		return "", err
	}
	if limit >= 0 && id.size > limit {
		return "", errTooLarge
	}
	if sum, ok := c.get(id); ok {
		return sum, nil
	}
	select {
	case c.busy <- struct{}{}:
		defer func() { <-c.busy }()
	case <-ctx.Done():
		return "", ctx.Err()
	}
	if sum, ok := c.get(id); ok {
		return sum, nil
	}
	f, err := os.Open(p.Proc("exe"))
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, &reader{ctx: ctx, r: io.LimitReader(f, id.size)}); err != nil {
		return "", fmt.Errorf("read %s: %w", f.Name(), err)
	}
	// Of the open file, which a process that replaces itself cannot swap.
	after, err := fstat(f)
	if err != nil {
		return "", err
	}
	if after != id {
		return "", errors.New("the program changed while it was read")
	}
	sum := hex.EncodeToString(h.Sum(nil))
	c.put(id, sum)
	return sum, nil
}

func (c *programs) get(id fileID) (string, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	el := c.sums[id]
	if el == nil {
		return "", false
	}
	c.recent.MoveToBack(el)
	return el.Value.(program).sum, true
}

func (c *programs) put(id fileID, sum string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sums[id] = c.recent.PushBack(program{id, sum})
	if c.recent.Len() > maxPrograms {
		delete(c.sums, c.recent.Remove(c.recent.Front()).(program).id)
	}
}

// reader gives up with its context: hashing a large file takes seconds.
type reader struct {
	ctx context.Context
	r   io.Reader
}

func (r *reader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}

func statFile(path string) (fileID, error) {
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		return fileID{}, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return idOf(&st), nil
}

func fstat(f *os.File) (fileID, error) {
	var st syscall.Stat_t
	if err := syscall.Fstat(int(f.Fd()), &st); err != nil {
		return fileID{}, &fs.PathError{Op: "fstat", Path: f.Name(), Err: err}
	}
	return idOf(&st), nil
}

func idOf(st *syscall.Stat_t) fileID {
	return fileID{dev: st.Dev, ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}
}
