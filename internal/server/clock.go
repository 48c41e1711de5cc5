package server

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/loglimit"
	"github.com/renewd/renewd/internal/server/keyset"
)

// openClock makes the clock that the whole signing side shares. It starts from the
// store's heartbeat, a time that is known to have passed.
func (d *Domain) openClock() {
	d.clock = clock.New(d.cfg.Now, d.cfg.Uptime, d.store.Heartbeat())
	d.store.SetClock(d.clock)
}

const (
	// clockInterval is how often the state of the clock is read.
	clockInterval = time.Minute
	// heartbeatInterval is how often the store is written at least, so that the next
	// process knows that the time has passed.
	heartbeatInterval = time.Hour
)

// watchClock logs when a doubt about the clock begins and ends, and stores the heartbeat,
// until ctx is done.
func (d *Domain) watchClock(ctx context.Context) error {
	check, heartbeat := time.NewTicker(clockInterval), time.NewTicker(heartbeatInterval)
	defer check.Stop()
	defer heartbeat.Stop()
	lines := loglimit.New(d.cfg.Log, 24*time.Hour, 1)
	for {
		if s := d.clock.State(); s.Doubt != 0 {
			lines.Note(slog.LevelWarn, "clock in doubt, automatic rotation waits: compare it with the true time, set it or confirm it with server clock confirm",
				"", "clock", s.Shows.UTC(), "at_least", s.AtLeast.UTC(), "step_of_clock", s.Doubt)
		} else {
			lines.Over("", "clock no longer in doubt", "clock", s.Shows.UTC(), "at_least", s.AtLeast.UTC())
		}
		select {
		case <-ctx.Done():
			return nil
		case <-check.C:
			continue
		case <-heartbeat.C:
		}
		if err := d.store.StoreHeartbeat(ctx); err != nil && ctx.Err() == nil {
			d.cfg.Log.Error("heartbeat not stored", "delay", heartbeatInterval, "error", err)
		}
	}
}

// clockSetBack reports whether the clock is in doubt because it was set back.
func (d *Domain) clockSetBack() bool { return d.clock.State().Doubt < 0 }

// compareClock compares the clock with sentAt, the time that the clock of an agent or a
// remote operator showed at a call.
func (d *Domain) compareClock(spiffeID string, sentAt time.Time) {
	switch d.clock.Heard(sentAt) {
	case clock.Fits:
		d.cfg.Log.Info("clock in doubt agrees with a caller's, automatic rotation continues", "spiffe_id", spiffeID, "callers_clock", sentAt, "clock", d.cfg.Now().UTC())
	case clock.Denies:
		d.cfg.Log.Warn("clock in doubt differs from a caller's, automatic rotation waits", "spiffe_id", spiffeID, "callers_clock", sentAt, "clock", d.cfg.Now().UTC())
	}
}

// confirmClock records an operator's confirmation that the clock is right. The audit log
// of every deployment has it before it takes effect. It is stored when true is returned.
// If the clock differs from at by more than [clock.Skew], nothing is done and false is
// returned.
func (d *Domain) confirmClock(ctx context.Context, at time.Time) (bool, error) {
	s := d.clock.State()
	if s.Shows.Sub(at).Abs() > clock.Skew {
		return false, nil
	}
	for _, dep := range d.deployments {
		note := fmt.Sprintf("another clock showed %s; before, the time was known to be at least %s", clock.Text(at), clock.Text(s.AtLeast))
		if err := dep.keysets.Note(keyset.WithNote(ctx, note), "confirm clock"); err != nil {
			return false, fmt.Errorf("deployment %s: %w", dep.Name, err)
		}
	}
	if !d.clock.Confirm(at) {
		return false, nil
	}
	if err := d.store.StoreHeartbeat(ctx); err != nil {
		return true, fmt.Errorf("clock confirmed until the next restart only: %w", err)
	}
	return true, nil
}
