package workload

import (
	"context"
	"time"

	"google.golang.org/grpc/status"
)

// PushSpacing is the least time between two answers of one stream. Changes
// that come faster are told together.
const PushSpacing = 250 * time.Millisecond

// outcome is what one look at what a stream is to be told has come to.
type outcome struct {
	sent  bool          // there was something to tell
	again time.Duration // when to look without a wake-up; 0: not before one
}

// follow runs one stream: it calls look when woken and lets at least
// PushSpacing pass after each answer. look sends what has changed, if anything.
// It is repeated in any case while the caller waits to be attested again. before is
// the outcome of a look that was done already, zero for none.
func (s *service) follow(ctx context.Context, c *caller, before outcome, wake <-chan struct{}, look func() (outcome, error)) error {
	var last time.Time // of the last answer
	for {
		if before.sent {
			last = time.Now()
		}
		var again <-chan time.Time
		switch {
		case before.again > 0:
			again = time.After(before.again)
		case c.outdated():
			again = time.After(reattestPause)
		}
		select {
		case <-wake:
		case <-again:
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-s.stopping.Done():
			return errStopping
		}
		if !last.IsZero() {
			if wait := PushSpacing - time.Since(last); wait > 0 {
				timer := time.NewTimer(wait)
				select {
				case <-timer.C:
				case <-ctx.Done():
					timer.Stop()
					return status.FromContextError(ctx.Err()).Err()
				case <-s.stopping.Done():
					timer.Stop()
					return errStopping
				}
				// What came meanwhile is part of what look reads.
				select {
				case <-wake:
				default:
				}
			}
		}
		var err error
		if before, err = look(); err != nil {
			return err
		}
	}
}
