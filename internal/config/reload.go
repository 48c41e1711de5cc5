package config

import (
	"io/fs"
	"os"
	"slices"
	"sync"
	"sync/atomic"
)

// Reloaded is what was loaded from files. It is loaded again when one of them is replaced.
// It is safe for concurrent use. Make it with [Reload].
type Reloaded[T any] struct {
	names  []string
	load   func() (*T, error)
	report func(*T, error)

	loaded atomic.Pointer[T]
	mu     sync.Mutex
	read   []fs.FileInfo // at the last attempt to load
}

// Reload returns what load makes of the files with these names. After the first success
// report receives the result of each further attempt to load, for the log.
func Reload[T any](names []string, load func() (*T, error), report func(*T, error)) *Reloaded[T] {
	return &Reloaded[T]{names: names, load: load, report: report}
}

// Get returns the value, after loading files that have changed. Files that cannot be used
// are reported once, and the previous value stays in use; it is an error if there is none.
// One caller at a time checks the files; the others wait only for the first value.
func (r *Reloaded[T]) Get() (*T, error) {
	before := r.loaded.Load()
	if before == nil {
		r.mu.Lock()
	} else if !r.mu.TryLock() {
		return before, nil
	}
	defer r.mu.Unlock()
	now := make([]fs.FileInfo, len(r.names))
	for i, name := range r.names {
		// A file that is missing, perhaps for a moment, is nil.
		now[i], _ = os.Stat(name)
	}
	if before != nil && slices.EqualFunc(now, r.read, sameFile) {
		return before, nil
	}
	r.read = now
	v, err := r.load()
	switch {
	case err == nil:
		if before != nil {
			r.report(v, nil)
		}
		r.loaded.Store(v)
	case before == nil:
		return nil, err
	default:
		r.report(nil, err)
	}
	return r.loaded.Load(), nil
}

func sameFile(a, b fs.FileInfo) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	return os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size()
}
