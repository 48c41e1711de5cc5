package rotation

import (
	"context"
	"time"
)

// Look is one round of Run.
func (s *Scheduler) Look(ctx context.Context) time.Duration { return s.look(ctx) }
