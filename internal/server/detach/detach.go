// Package detach lets a caller return from work that hangs.
//
// A disk can hang for long, in a read or in a commit, and nothing can interrupt that.
// So work that may wait for a disk runs on its own goroutine, and its caller returns
// at its deadline. The work is not canceled: it ends as if the caller had waited, with
// all its effects. The caller only knows that the outcome is open.
package detach

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
)

// ErrOpen is returned to a caller whose context is done before its work: the outcome
// of the work is unknown. The error wraps the context's error, too.
var ErrOpen = errors.New("storage does not answer in time, the outcome is open")

// ErrStuck is returned without starting the work, when too much detached work hangs.
var ErrStuck = errors.New("storage does not answer, nothing was done")

// maxDetached is how much work may hang after its callers have returned: as much as
// one commit of the store takes at most.
const maxDetached = 4096

// Group owns the goroutines of detached work. The zero value is ready to use. All
// functions may be called concurrently.
type Group struct {
	work sync.WaitGroup
	left atomic.Int64
}

// Do runs work and returns its results, or ErrOpen as soon as ctx is done. After that
// the caller must not touch data that work uses. A panic in work ends the process.
func Do[T any](ctx context.Context, g *Group, work func() (T, error)) (T, error) {
	var none T
	if g.left.Load() >= maxDetached {
		return none, ErrStuck
	}
	type outcome struct {
		value T
		err   error
	}
	done := make(chan outcome, 1)
	var ends atomic.Bool // set by whichever ends first, the work or the caller
	g.work.Go(func() {
		o := outcome{err: errGone}
		defer func() {
			done <- o
			if ends.Swap(true) {
				g.left.Add(-1)
			}
		}()
		o.value, o.err = work()
	})
	select {
	case o := <-done:
		return o.value, o.err
	case <-ctx.Done():
		g.left.Add(1)
		if ends.Swap(true) {
			g.left.Add(-1) // it has ended meanwhile
		}
		return none, fmt.Errorf("%w: %w", ErrOpen, ctx.Err())
	}
}

// errGone is returned if work calls runtime.Goexit, as a failing test does.
var errGone = errors.New("work ended its goroutine")

// Wait returns when all work has ended. Do must not be called at the same time.
func (g *Group) Wait() { g.work.Wait() }
