package rotation

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/refusal"
	"github.com/renewd/renewd/internal/server/keyset"
)

const (
	// longestSleep bounds the time between two looks: facts change without
	// anybody saying so, and the clock may be set.
	longestSleep = time.Minute
	// The pause after a step that failed doubles from the first to the longest.
	firstPause   = time.Second
	longestPause = time.Minute
)

// Config says what to rotate. Keysets and Facts are required.
type Config struct {
	Keysets *keyset.Deployment
	Policy  Policy
	Facts   Facts
	Log     *slog.Logger // discarded when nil
	Clock   *clock.Clock // one of the machine's, of which nothing is known, when nil
}

// Scheduler rotates the keysets of one deployment. Make it with [New], run it
// once.
type Scheduler struct {
	keysets *keyset.Deployment
	policy  Policy
	facts   Facts
	log     *slog.Logger
	clock   *clock.Clock

	failed atomic.Pointer[failure] // nil: the last attempt succeeded
	// Run's own.
	told    string // the step that a pause was last told to hold up
	doubted bool   // it was told that the clock is in doubt
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
	policy, err := c.Policy.For(c.Keysets.Lifetime())
	if err != nil {
		return nil, err
	}
	s := &Scheduler{keysets: c.Keysets, policy: policy, facts: c.Facts, log: c.Log, clock: c.Clock}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.clock == nil {
		s.clock = clock.New(nil, nil, time.Time{})
	}
	return s, nil
}

// Run does what is due until ctx is done, and returns nil then. It looks at the
// keysets when they change, when the next step is due, and at least once a
// minute. What fails is logged once and tried again after a pause.
func (s *Scheduler) Run(ctx context.Context) error {
	if s.policy.Mode == Off {
		<-ctx.Done()
		return nil
	}
	for {
		changed := s.keysets.Status().Changed
		timer := time.NewTimer(s.look(ctx))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-changed:
			timer.Stop()
		case <-timer.C:
		}
	}
}

// look does what is due and returns how long to sleep if nothing changes.
func (s *Scheduler) look(ctx context.Context) time.Duration {
	now := s.clock.Now()
	last := s.failed.Load()
	if last != nil {
		// A clock that was set back must not make the pause longer.
		if left := last.again().Sub(now); left > 0 && left <= last.pause {
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
		s.complain(step, last, err)
		return f.pause
	}
	s.failed.Store(nil)
	return min(max(step.At.Sub(now), 0), longestSleep)
}

// attempt does the next step if it is due, and returns it.
func (s *Scheduler) attempt(ctx context.Context, now time.Time) (Step, error) {
	// Read, because the outcome of somebody's mutation may be unknown.
	keysets, err := s.keysets.List(ctx)
	if err != nil {
		return Step{}, err
	}
	step := Next(now, s.clock.PastFor, s.policy, keysets, s.facts)
	c := s.clock.State()
	if !c.Waits {
		s.doubted = false
	}
	switch {
	case !step.Due(now):
	case c.Waits:
		if !s.doubted {
			s.doubted = true
			s.log.Warn("clock in doubt, automatic rotation waits until it is right, fits another machine's, or is confirmed",
				"step_of_clock", c.Doubt, "step", step.String(), "reason", step.Why)
		}
		step.At = now.Add(longestSleep)
	case s.policy.Mode == Paused:
		if s.told != step.String() {
			s.told = step.String()
			s.log.Warn("automatic rotation is paused and does not do what is due", "step", s.told, "reason", step.Why)
		}
		step.At = now.Add(longestSleep)
	default:
		return step, s.do(ctx, step)
	}
	return step, nil
}

// errOvertaken says that a step was no longer the next one when it came to it.
var errOvertaken = errors.New("the keysets or what hangs on them have changed meanwhile")

func (s *Scheduler) do(ctx context.Context, step Step) error {
	ctx = keyset.WithNote(keyset.WithActor(ctx, Actor), step.Why)
	still := func(keysets []keyset.Keyset) error {
		now := s.clock.Now()
		again := Next(now, s.clock.PastFor, s.policy, keysets, s.facts)
		if s.clock.State().Waits || !again.Due(now) || again.String() != step.String() {
			return errOvertaken
		}
		return nil
	}
	var err error
	id, done := step.Keyset, ""
	switch step.Action {
	case Prepare:
		var k keyset.Keyset
		k, err = s.keysets.Prepare(ctx, still)
		id, done = k.ID, "prepared"
	case Activate:
		err, done = s.keysets.Activate(ctx, id, still), "activated"
	case Taint:
		err, done = s.keysets.Taint(ctx, id, still), "tainted"
	case Remove:
		err, done = s.keysets.Remove(ctx, id, still), "removed"
	}
	if err != nil {
		return err
	}
	s.log.Info("automatic rotation: keyset "+done, "keyset", id, "reason", step.Why)
	return nil
}

// complain logs a failure, unless it is that of the last time again.
func (s *Scheduler) complain(step Step, last *failure, err error) {
	switch {
	case errors.Is(err, errOvertaken):
	case last != nil && last.err.Error() == err.Error():
	case errors.Is(err, refusal.ErrBusy):
		s.log.Info("automatic rotation: somebody else changes the keysets; they are looked at again", "step", step.String())
	default:
		s.log.Error("automatic rotation failed and is tried again", "step", step.String(), "error", err)
	}
}

func (f *failure) again() time.Time { return f.at.Add(f.pause) }

// Preview is what a [Scheduler] is about to do.
type Preview struct {
	Mode, Next string    // Next is such as "activate ks_abc1234xyz"; empty: nothing
	At         time.Time // see [Step]; past when it is due
	WaitsFor   string
}

// Automatic says what comes next. It may be called at any time.
func (s *Scheduler) Automatic() Preview {
	now := s.clock.Now()
	step := Next(now, s.clock.PastFor, s.policy, s.keysets.Status().Keysets, s.facts)
	p := Preview{Mode: string(s.policy.Mode), Next: step.String(), At: step.At, WaitsFor: step.WaitsFor}
	if f := s.failed.Load(); f != nil && step.Due(now) {
		p.At, p.WaitsFor = f.again(), fmt.Sprintf("another attempt: %v", f.err)
	}
	if c := s.clock.State(); c.Waits {
		p.WaitsFor = fmt.Sprintf("the clock, which went ahead by %v", c.Doubt.Round(time.Minute))
		if c.Doubt < 0 {
			p.WaitsFor = fmt.Sprintf("the clock, which was set back by %v", -c.Doubt.Round(time.Minute))
		}
	}
	return p
}
