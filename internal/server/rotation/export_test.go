package rotation

import (
	"context"
	"time"
)

// ErrSuperseded is the error of a step that was no longer the next one.
var ErrSuperseded = errSuperseded

// RunDue is one iteration of Run.
func (s *Scheduler) RunDue(ctx context.Context) time.Duration { return s.runDue(ctx) }

// Failed returns the error of the last attempt.
func (s *Scheduler) Failed() error {
	if f := s.failed.Load(); f != nil {
		return f.err
	}
	return nil
}
