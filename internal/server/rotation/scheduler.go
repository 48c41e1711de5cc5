package rotation

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/loglimit"
	"github.com/renewd/renewd/internal/refusal"
	"github.com/renewd/renewd/internal/server/keyset"
)

const (
	// longestSleep bounds the time between two checks, because there is no notification
	// of changed facts or of a clock that was set.
	longestSleep = time.Minute
	// The pause after a failed step doubles from firstPause to longestPause.
	firstPause   = time.Second
	longestPause = time.Minute
)

// Config configures a [Scheduler]. Keysets and Facts are required.
type Config struct {
	Keysets *keyset.Deployment
	Policy  Policy
	Facts   Facts
	Log     *slog.Logger // discarded when nil
	Clock   *clock.Clock // a new one of the machine when nil
}

// Scheduler rotates the keysets of one deployment. Create it with [New] and run it once.
type Scheduler struct {
	keysets *keyset.Deployment
	policy  atomic.Pointer[Policy]
	wake    chan struct{} // the policy has changed
	facts   Facts
	log     *slog.Logger
	clock   *clock.Clock

	failed atomic.Pointer[failure] // nil: the last attempt succeeded
	lines  *loglimit.Log           // of steps that wait
}

// failure is an attempt that did not succeed.
type failure struct {
	err   error
	at    time.Time
	pause time.Duration // until the next one
}

// New checks the policy against the lifetime of the deployment's keysets; see
// [Policy.For].
func New(c Config) (*Scheduler, error) {
	if c.Keysets == nil || c.Facts == nil {
		return nil, errors.New("rotation: no keysets or no facts")
	}
	log := cmp.Or(c.Log, slog.New(slog.DiscardHandler))
	s := &Scheduler{
		keysets: c.Keysets, wake: make(chan struct{}, 1), facts: c.Facts, log: log, lines: loglimit.New(log, 24*time.Hour, 16),
		clock: cmp.Or(c.Clock, clock.New(nil, nil, time.Time{})),
	}
	apply, err := s.Reload(c.Policy)
	if err != nil {
		return nil, err
	}
	apply()
	return s, nil
}

// Reload checks a policy as [New] does and returns the function that replaces the policy.
// A step that is being carried out is completed.
func (s *Scheduler) Reload(p Policy) (apply func(), err error) {
	if p, err = p.For(s.keysets.Lifetime()); err != nil {
		return nil, err
	}
	return func() {
		s.policy.Store(&p)
		select {
		case s.wake <- struct{}{}:
		default:
		}
	}, nil
}

// Run carries out due steps until ctx is done, and then returns nil. It checks the
// keysets when they change, when the next step is due, and at least once a minute. It
// logs a failure once and retries the step after a pause.
func (s *Scheduler) Run(ctx context.Context) error {
	for {
		changed := s.keysets.Status().Changed
		var due <-chan time.Time // never while rotation is off
		if s.policy.Load().Mode != Off {
			due = time.After(s.runDue(ctx))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-s.wake:
		case <-due:
		}
	}
}

// runDue carries out the next step if it is due, and returns how long to sleep if nothing
// changes.
func (s *Scheduler) runDue(ctx context.Context) time.Duration {
	now := s.clock.Now()
	last := s.failed.Load()
	if last != nil {
		// A clock that was set back must not make the pause longer.
		if left := last.retryAt().Sub(now); left > 0 && left <= last.pause {
			return left
		}
	}
	step, err := s.attempt(ctx, now)
	switch {
	case ctx.Err() != nil:
		return longestSleep
	case err != nil:
		f := &failure{err: err, at: now, pause: firstPause}
		if last != nil {
			f.pause = min(2*last.pause, longestPause)
		}
		s.failed.Store(f)
		s.logFailure(f, step, last)
		return f.pause
	}
	s.failed.Store(nil)
	return min(max(step.At.Sub(now), 0), longestSleep)
}

// attempt carries out the next step if it is due, and returns it.
func (s *Scheduler) attempt(ctx context.Context, now time.Time) (Step, error) {
	// List reads the storage, because the outcome of a failed mutation may be unknown.
	keysets, err := s.keysets.List(ctx)
	if err != nil {
		return Step{}, err
	}
	policy := s.policy.Load()
	step := Next(now, s.clock, *policy, keysets, s.facts)
	c := s.clock.State()
	if !c.Waits {
		s.lines.Over("clock", "")
	}
	switch {
	case !step.Due(now):
	case c.Waits:
		s.lines.Note(slog.LevelWarn, "clock in doubt, automatic rotation waits until it is right, agrees with another machine's, or is confirmed",
			"clock", "step_of_clock", c.Doubt, "step", step.String(), "reason", step.Why)
		step.At = now.Add(longestSleep)
	case policy.Mode == Paused:
		s.lines.Note(slog.LevelWarn, "automatic rotation paused, step is due and not carried out", step.String(), "step", step.String(), "reason", step.Why)
		step.At = now.Add(longestSleep)
	default:
		return step, s.do(ctx, step)
	}
	return step, nil
}

// errSuperseded is the error of a step that was no longer the next one when its mutation
// began.
var errSuperseded = errors.New("the keysets, the policy or what depends on the keysets have changed")

func (s *Scheduler) do(ctx context.Context, step Step) error {
	ctx = keyset.WithNote(keyset.WithActor(ctx, Actor), step.Why)
	stillNext := func(keysets []keyset.Keyset) error {
		now := s.clock.Now()
		policy := s.policy.Load()
		again := Next(now, s.clock, *policy, keysets, s.facts)
		if policy.Mode != On || s.clock.State().Waits || !again.Due(now) || again.String() != step.String() {
			return errSuperseded
		}
		return nil
	}
	var err error
	id := step.Keyset
	switch step.Action {
	case Prepare:
		var k keyset.Keyset
		k, err = s.keysets.Prepare(ctx, stillNext)
		id = k.ID
	case Activate:
		err = s.keysets.Activate(ctx, id, stillNext)
	case Taint:
		err = s.keysets.Taint(ctx, id, stillNext)
	case Remove:
		err = s.keysets.Remove(ctx, id, stillNext)
	}
	if err != nil {
		return err
	}
	s.log.Info("automatic rotation step completed", "step", string(step.Action), "keyset_id", id, "reason", step.Why)
	return nil
}

// logFailure logs a failure that differs from the last one.
func (s *Scheduler) logFailure(f *failure, step Step, last *failure) {
	switch {
	case errors.Is(f.err, errSuperseded):
	case last != nil && last.err.Error() == f.err.Error():
	case errors.Is(f.err, refusal.ErrBusy):
		s.log.Info("automatic rotation step delayed, another change of the keysets is in flight", "step", step.String(), "delay", f.pause)
	default:
		s.log.Error("automatic rotation step failed", "step", step.String(), "delay", f.pause, "error", f.err)
	}
}

func (f *failure) retryAt() time.Time { return f.at.Add(f.pause) }

// Preview is the next step of a [Scheduler].
type Preview struct {
	Mode, Next string    // Next is a step such as "activate ks_abc1234xyz"; empty: none
	At         time.Time // see [Step]; in the past if it is due
	WaitsFor   string
}

// Automatic returns the next step. It may be called at any time.
func (s *Scheduler) Automatic() Preview {
	now := s.clock.Now()
	policy := s.policy.Load()
	step := Next(now, s.clock, *policy, s.keysets.Status().Keysets, s.facts)
	p := Preview{Mode: string(policy.Mode), Next: step.String(), At: step.At, WaitsFor: step.WaitsFor}
	if f := s.failed.Load(); f != nil && step.Due(now) {
		p.At, p.WaitsFor = f.retryAt(), fmt.Sprintf("another attempt: %v", f.err)
	}
	if c := s.clock.State(); c.Waits {
		p.WaitsFor = fmt.Sprintf("the clock, which went ahead by %v", c.Doubt.Round(time.Minute))
		if c.Doubt < 0 {
			p.WaitsFor = fmt.Sprintf("the clock, which was set back by %v", -c.Doubt.Round(time.Minute))
		}
	}
	return p
}
