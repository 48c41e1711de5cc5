package workload

import (
	"context"
	"time"

	"google.golang.org/grpc/status"
)

// PushSpacing is the least time between two answers of one stream. Changes
// that come faster are told together.
const PushSpacing = 250 * time.Millisecond

// follow runs one stream: it calls look when woken and lets at least
// PushSpacing pass after each answer. look sends what has changed, if anything,
// and reports whether it did. A look that is to be repeated without a wake-up
// says so by again, the time until then; one is repeated in any case while the
// caller waits to be attested again.
func (s *service) follow(ctx context.Context, c *caller, wake func() <-chan struct{}, look func() (sent bool, again time.Duration, err error)) error {
	var last time.Time // of the last answer
	var again <-chan time.Time
	for {
		select {
		case <-wake():
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
				case <-wake():
				default:
				}
			}
		}
		sent, wait, err := look()
		if err != nil {
			return err
		}
		if wait == 0 && c.outdated() {
			wait = reattestPause
		}
		again = nil
		if wait > 0 {
			again = time.After(wait)
		}
		if sent {
			last = time.Now()
		}
	}
}
