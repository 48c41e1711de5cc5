package server

import (
	"context"
	"fmt"
	"time"

	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/server/keyset"
)

// openClock makes the one clock of the signing side, after the store has said which
// time is known to have passed.
func (d *Domain) openClock() {
	var heartbeat time.Time
	if d.store != nil {
		heartbeat = d.store.Heartbeat()
	}
	d.clock = clock.New(d.cfg.Now, d.cfg.Uptime, heartbeat)
	if d.store != nil {
		d.store.Follow(d.clock)
	}
}

const (
	// lookTime is how often the clock is looked at, at least.
	lookTime = time.Minute
	// beatTime is how often the store is written at least, so that the next process
	// knows that the time has passed.
	beatTime = time.Hour
)

// watchClock says when the clock is in doubt and when that is over, and writes the
// store's heartbeat, until ctx is done.
func (d *Domain) watchClock(ctx context.Context) error {
	look, beat := time.NewTicker(lookTime), time.NewTicker(beatTime)
	defer look.Stop()
	defer beat.Stop()
	for doubted := false; ; {
		if s := d.clock.State(); (s.Doubt != 0) != doubted {
			doubted = !doubted
			if doubted {
				d.cfg.Log.Warn("clock in doubt, automatic rotation waits: compare it with the true time, set it or confirm it with server clock confirm",
					"clock", s.Shows.UTC(), "at_least", s.AtLeast.UTC(), "step_of_clock", s.Doubt)
			} else {
				d.cfg.Log.Info("clock no longer in doubt", "clock", s.Shows.UTC(), "at_least", s.AtLeast.UTC())
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-look.C:
			continue
		case <-beat.C:
		}
		if err := d.beat(ctx); err != nil && ctx.Err() == nil {
			d.cfg.Log.Error("heartbeat not stored, tried again in an hour", "error", err)
		}
	}
}

func (d *Domain) beat(ctx context.Context) error {
	if d.store == nil {
		return nil
	}
	return d.store.Beat(ctx)
}

// heard compares the clock with what that of an agent or an operator elsewhere showed
// at a call.
func (d *Domain) heard(who string, sentAt time.Time) {
	switch d.clock.Heard(sentAt) {
	case clock.Fits:
		d.cfg.Log.Info("clock in doubt fits that of a caller, automatic rotation goes on", "spiffe_id", who, "callers_clock", sentAt, "clock", d.cfg.Now().UTC())
	case clock.Denies:
		d.cfg.Log.Warn("clock in doubt differs from that of a caller, automatic rotation waits", "spiffe_id", who, "callers_clock", sentAt, "clock", d.cfg.Now().UTC())
	}
}

// confirmClock takes an operator's word that the clock is right. It is in the audit log
// of every deployment before it counts, and stored before it returns true. It returns
// false, with nothing done, where the clock does not show about this time.
func (d *Domain) confirmClock(ctx context.Context, at time.Time) (bool, error) {
	s := d.clock.State()
	if s.Shows.Sub(at).Abs() > clock.Skew {
		return false, nil
	}
	for _, dep := range d.deployments {
		note := fmt.Sprintf("by another clock it was %s UTC; what was sure before is %s UTC", at.UTC().Format(time.DateTime), s.AtLeast.UTC().Format(time.DateTime))
		if err := dep.keysets.Note(keyset.WithNote(ctx, note), "confirm clock"); err != nil {
			return false, fmt.Errorf("deployment %s: %w", dep.Name, err)
		}
	}
	if !d.clock.Confirm(at) {
		return false, nil
	}
	if err := d.beat(ctx); err != nil {
		return true, fmt.Errorf("the clock is confirmed until the server is started again: %w", err)
	}
	return true, nil
}
