// Package detach lets a caller leave work that hangs.
//
// A disk can be stuck for longer than anybody waits, in a read as in a commit, and
// nothing can interrupt that. So what may wait for a disk runs on a goroutine of its
// own, and its caller leaves when its time is over. The work is not cut off: it ends
// as if the caller had waited, and what follows from it happens then. The caller can
// only say that the outcome is open.
package detach

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
)

// ErrOpen is what a caller gets who has left: whether the work succeeds, or has, is
// open. It wraps the error of the context, too.
var ErrOpen = errors.New("storage does not answer in time, the outcome is open")

// ErrStuck is what a caller gets when so many have left that nothing more is begun.
var ErrStuck = errors.New("storage does not answer, nothing was done")

// most is how many pieces of work may hang whose callers have left: as many as one
// commit of the store takes at most.
const most = 4096

// Group owns the work whose callers have left. The zero value is ready. All functions
// may be called concurrently.
type Group struct {
	work sync.WaitGroup
	left atomic.Int64
}

// Do runs work and returns what it returns, or ErrOpen as soon as ctx is done. What
// work uses must be its own from then on. A panic in it ends the process.
func Do[T any](ctx context.Context, g *Group, work func() (T, error)) (T, error) {
	var none T
	if g.left.Load() >= most {
		return none, ErrStuck
	}
	type outcome struct {
		value T
		err   error
	}
	done := make(chan outcome, 1)
	var ends atomic.Bool // set by the first of the two that leave
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

// errGone is what a caller gets whose work has ended its goroutine, as a test does
// that fails.
var errGone = errors.New("the work has ended its goroutine")

// Wait returns when all work has ended. Nothing may be begun then.
func (g *Group) Wait() { g.work.Wait() }
