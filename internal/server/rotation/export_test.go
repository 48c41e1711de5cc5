package rotation

import (
	"context"
	"time"
)

// ErrOvertaken is what an attempt ends with that came too late.
var ErrOvertaken = errOvertaken

// Look is one round of Run.
func (s *Scheduler) Look(ctx context.Context) time.Duration { return s.look(ctx) }

// Failed is what the last attempt failed with.
func (s *Scheduler) Failed() error {
	if f := s.failed.Load(); f != nil {
		return f.err
	}
	return nil
}
