package rotation_test

import (
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/rotation"
)

// machine is a server whose wall clock a test sets while it is up.
type machine struct {
	up, off   time.Duration
	store     *store
	keysets   *keyset.Deployment
	scheduler *rotation.Scheduler
	log       logs
	heartbeat time.Time // of the store
	clock     *clock.Clock
}

func (m *machine) now() time.Time        { return start.Add(m.up + m.off) }
func (m *machine) uptime() time.Duration { return m.up }

// restart starts a process just after the last heartbeat, whatever the clock shows.
func (m *machine) restart(t testing.TB, f rotation.Facts) {
	t.Helper()
	m.keysets = open(t, keyset.Config{Storage: m.store, Now: m.now})
	m.clock = clock.New(m.now, m.uptime, m.heartbeat)
	var err error
	m.scheduler, err = rotation.New(rotation.Config{
		Keysets: m.keysets, Facts: f, Clock: m.clock, Log: slog.New(slog.NewTextHandler(&m.log, nil)),
	})
	check(t, err)
}

// runDue runs the scheduler until no more steps are due.
func (m *machine) runDue(t testing.TB) {
	t.Helper()
	for n := -1; n != len(m.store.saves); {
		n = len(m.store.saves)
		m.scheduler.RunDue(t.Context())
	}
}

// held are the facts if agents hold SVIDs of every keyset.
var held = facts{
	behind:  func() int { return 100 },
	holding: func(keyset.Keyset) rotation.Holding { return rotation.Holding{Agents: 100} },
}

// TestClockAheadForAMoment: a clock that is 91 days ahead causes no step, and is logged.
func TestClockAheadForAMoment(t *testing.T) {
	t.Parallel()
	m := &machine{store: new(store)}
	m.restart(t, held)
	first := m.keysets.Active()
	m.up = day
	m.runDue(t)
	m.off = 91 * day
	for range 48 {
		m.up += time.Hour
		m.runDue(t)
	}
	if p := m.scheduler.Automatic(); p.Next != "prepare" || p.WaitsFor != "the clock, which went ahead by 2184h0m0s" {
		t.Errorf("next is %+v", p)
	}
	lines := m.log.take()
	if len(lines) != 1 || !strings.Contains(lines[0], `msg="clock in doubt, automatic rotation waits until it is right, agrees with another machine's, or is confirmed" step_of_clock=2184h0m0s step=prepare`) {
		t.Errorf("logged %q", lines)
	}
	m.off = 0
	m.runDue(t)
	if k := m.keysets.Status().Keysets; len(k) != 1 || k[0].ID != first.ID || len(m.store.saves) != 1 {
		t.Errorf("keysets are %v", k)
	}
	// A clock that agrees with another machine's may be right. Still no step is done that
	// cannot be undone.
	m.off = 91 * day
	for range 23 * 60 {
		m.up += time.Minute
		m.runDue(t)
		m.clock.Heard(m.now())
	}
	if k := m.keysets.Status().Keysets; len(k) != 2 || k[0].State != keyset.Prepared || k[1].State != keyset.Active {
		t.Errorf("after 23 hours keysets are %v", k)
	}
}

// TestThresholdsAreNotSkipped: the clock goes ahead by two days, which is not in doubt, ten
// minutes after a keyset is prepared. It is activated when its age is certain, and not before
// every verifier had time to fetch it. The same applies to the taint of its predecessor.
func TestThresholdsAreNotSkipped(t *testing.T) {
	t.Parallel()
	m := &machine{store: new(store)}
	m.restart(t, facts{holding: func(keyset.Keyset) rotation.Holding { return rotation.Holding{Agents: 1} }})
	m.up = 76 * day
	m.runDue(t)
	expect := func(what string, want ...keyset.State) {
		t.Helper()
		var got []keyset.State
		for _, k := range m.keysets.Status().Keysets {
			got = append(got, k.State)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s, after %v: keysets are %v, want %v", what, m.up, got, want)
		}
	}
	run := func(d time.Duration) {
		for end := m.up + d; m.up < end; {
			m.up += time.Minute
			m.runDue(t)
		}
	}
	for _, step := range [][]keyset.State{{keyset.Active, keyset.Prepared}, {keyset.Prepared, keyset.Active}, {keyset.Tainted, keyset.Active}} {
		expect("before the step", step...)
		if step[0] == keyset.Tainted {
			break
		}
		run(10 * time.Minute)
		m.off += 2 * day
		run(23 * time.Hour)
		expect("two days ahead", step...)
		run(time.Hour)
	}
}

// TestClockStepsDuringAStep: the clock goes ahead after automatic rotation has decided on a
// step and before the step is done. It is not done.
func TestClockStepsDuringAStep(t *testing.T) {
	t.Parallel()
	m := &machine{store: new(store)}
	m.restart(t, facts{})
	m.up = 75 * day
	m.runDue(t)
	m.up = 76 * day
	loads := 0
	m.store.beforeLoad = func() {
		if loads++; loads == 2 { // the step loads the keysets again
			m.off = 91 * day
		}
	}
	m.scheduler.RunDue(t.Context())
	if loads != 2 || !errors.Is(m.scheduler.Failed(), rotation.ErrSuperseded) || len(m.store.saves) != 1 {
		t.Errorf("after %d loads %v, keysets are %v", loads, m.scheduler.Failed(), m.keysets.Status().Keysets)
	}
	m.off = 0
	m.up += time.Minute
	m.runDue(t)
	if len(m.store.saves) != 2 {
		t.Errorf("the clock is right again: %+v", m.store.saves)
	}
}

// TestRandomClockSteps repeatedly sets the clock, by minutes to years, at runtime and at
// starts, each time for less than a day. No step is done while the clock is in doubt. No
// keyset that agents depend on by the true time is removed. A minute after the clock is
// right again, the active keyset is valid.
func TestRandomClockSteps(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		m := &machine{store: new(store)}
		f := facts{holding: func(keyset.Keyset) rotation.Holding { return rotation.Holding{Agents: 1} }}
		m.restart(t, f)
		minutes := func(most int64) time.Duration {
			return time.Duration(rapid.Int64Range(1, most).Draw(rt, "minutes")) * time.Minute
		}
		run := func(d time.Duration) {
			for end := m.up + d; m.up < end; {
				m.up = min(m.up+max(d/8, time.Minute), end)
				m.runDue(t)
			}
		}
		for range rapid.IntRange(1, 6).Draw(rt, "steps") {
			m.off = 0
			run(time.Duration(rapid.Int64Range(1, 30).Draw(rt, "days")) * day)
			far := minutes([]int64{60, 24 * 60, 100 * 24 * 60, 5 * 365 * 24 * 60}[rapid.IntRange(0, 3).Draw(rt, "scale")])
			if rapid.Bool().Draw(rt, "behind") {
				far = -far
			}
			m.heartbeat = m.now()
			m.off = far
			if rapid.Bool().Draw(rt, "started") {
				m.restart(t, f)
			}
			saves := len(m.store.saves)
			run(minutes(23 * 60))
			if n := len(m.store.saves); n != saves && (far > 3*day || far < -5*time.Minute) {
				rt.Fatalf("%v after the start, clock is %v off: %+v", m.up, far, m.store.saves[saves:])
			}
			m.off = 0
			run(time.Minute)
			for _, c := range m.store.saves {
				if c.Operation == "remove" {
					rt.Fatalf("removed: %+v", c)
				}
			}
			a := m.keysets.Active()
			if now := m.now(); a.ValidFrom.After(now) || !a.ExpiresAt.After(now) {
				rt.Fatalf("%v after the start, clock was %v off: active is %v", m.up, far, a)
			}
		}
	})
}
