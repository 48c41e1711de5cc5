package workload

import (
	"context"
	"time"

	"google.golang.org/grpc/status"
)

// PushSpacing is the least time between two answers of one stream. Changes
// that come faster share an answer.
const PushSpacing = 250 * time.Millisecond

// outcome is the result of one update of a stream.
type outcome struct {
	sent  bool          // an answer was sent
	after time.Duration // until an update without a wake-up; 0: only when woken
}

// follow runs one stream: it calls update when woken and lets at least
// PushSpacing pass after each answer. update sends an answer if it differs from the
// last one. While the caller's attestation is incomplete, follow calls update at least
// every reattestPause. before is the outcome of an earlier update, zero if there was
// none.
func (s *service) follow(ctx context.Context, c *caller, before outcome, wake <-chan struct{}, update func() (outcome, error)) error {
	var last time.Time // of the last answer
	for {
		if before.sent {
			last = time.Now()
		}
		var due <-chan time.Time
		switch {
		case before.after > 0:
			due = time.After(before.after)
		case c.incomplete():
			due = time.After(reattestPause)
		}
		select {
		case <-wake:
		case <-due:
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
				// update reads the latest state: this wake-up is part of it.
				select {
				case <-wake:
				default:
				}
			}
		}
		var err error
		if before, err = update(); err != nil {
			return err
		}
	}
}
