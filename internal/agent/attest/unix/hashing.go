package unix

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"time"
)

// sliceSize is how many bytes are hashed in one turn: some hundredths of a
// second.
const sliceSize = 4 << 20

// file is an open file to hash.
type file interface {
	io.ReadCloser
	id() (fileID, error) // of its state now
}

// hashing is one file that is being hashed or was.
type hashing struct {
	id   fileID
	file file

	// Guarded by sums.mu.
	users   []uint32 // who have waited for it
	waiters int      // callers
	begun   bool
	from    time.Time // when it was begun
	busy    bool      // a worker has it

	// Of the worker that has it.
	hash hash.Hash
	left int64 // bytes

	// May be read once done is closed.
	done chan struct{}
	sum  string
	err  error
}

func newHashing(id fileID, f file) *hashing {
	return &hashing{id: id, file: f, hash: sha256.New(), left: id.size, done: make(chan struct{})}
}

// slice hashes the next part of the file. It reports whether there is more.
func (j *hashing) slice(buf []byte) (sum string, more bool, err error) {
	part := min(j.left, sliceSize)
	n, err := io.CopyBuffer(j.hash, io.LimitReader(j.file, part), buf)
	j.left -= n
	switch {
	case err != nil:
		return "", false, fmt.Errorf("read the executable: %w", err)
	case n < part:
		return "", false, errChanged
	case j.left > 0:
		return "", true, nil
	}
	// Of the open file, which a process that replaces itself cannot swap.
	after, err := j.file.id()
	switch {
	case err != nil:
		return "", false, err
	case after != j.id:
		return "", false, errChanged
	}
	return hex.EncodeToString(j.hash.Sum(nil)), false, nil
}

func (j *hashing) finish(sum string, err error) {
	j.sum, j.err, j.file, j.hash = sum, err, nil, nil
	close(j.done)
}

// settled reports whether the hash is that of the file for as long as its ID
// stays the same. A file that was changed just before it was read could be
// changed again within the same unit of time and have the same ctime. Such a
// hash is good for those who wait for it, and is not kept.
func (j *hashing) settled() bool {
	changed := time.Unix(j.id.ctime.Unix())
	unit := fineUnit
	if changed.Nanosecond() == 0 {
		unit = coarseUnit
	}
	return j.from.Sub(changed) > unit
}
