package unix

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"time"
)

// sliceSize is how many bytes are hashed in one turn, which takes some hundredths of a
// second.
const sliceSize = 4 << 20

// file is an open file to hash.
type file interface {
	io.ReadCloser
	id() (fileID, error) // of its state now
}

// hashJob is one file to hash, and its hash.
type hashJob struct {
	id   fileID
	file file

	// Guarded by sums.mu.
	users     []uint32 // that have waited for it
	waiters   int      // callers
	started   bool
	startedAt time.Time
	busy      bool // a worker has it

	// Owned by the worker that has it.
	hash hash.Hash
	left int64 // bytes

	// May be read once done is closed.
	done chan struct{}
	sum  string
	err  error
}

func newHashJob(id fileID, f file) *hashJob {
	return &hashJob{id: id, file: f, hash: sha256.New(), left: id.size, done: make(chan struct{})}
}

// slice hashes the next part of the file. It reports whether there is more.
func (j *hashJob) slice(buf []byte) (sum string, more bool, err error) {
	part := min(j.left, sliceSize)
	n, err := io.CopyBuffer(j.hash, io.LimitReader(j.file, part), buf)
	j.left -= n
	switch {
	case err != nil:
		return "", false, fmt.Errorf("read executable: %w", err)
	case n < part:
		return "", false, errChanged
	case j.left > 0:
		return "", true, nil
	}
	// The ID of the open file: a process cannot replace that one.
	after, err := j.file.id()
	switch {
	case err != nil:
		return "", false, err
	case after != j.id:
		return "", false, errChanged
	}
	return hex.EncodeToString(j.hash.Sum(nil)), false, nil
}

func (j *hashJob) finish(sum string, err error) {
	j.sum, j.err, j.file, j.hash = sum, err, nil, nil
	close(j.done)
}

// cacheable reports whether the hash is valid for as long as the file's ID stays the
// same. A file that was changed just before it was read could be changed again within
// the same unit of time and keep its ctime. Such a hash is only for the callers that
// wait for it.
func (j *hashJob) cacheable() bool {
	changed := time.Unix(j.id.ctime.Unix())
	unit := fineTimeUnit
	if changed.Nanosecond() == 0 {
		unit = coarseTimeUnit
	}
	return j.startedAt.Sub(changed) > unit
}
