package clock_test

import (
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/renewd/renewd/internal/clock"
)

const day = 24 * time.Hour

var start = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// machine has an uptime, and a wall clock that is off by a duration.
type machine struct {
	up, off time.Duration
}

func (m *machine) now() time.Time        { return start.Add(m.up + m.off) }
func (m *machine) uptime() time.Duration { return m.up }

func TestStepAhead(t *testing.T) {
	t.Parallel()
	m := new(machine)
	c := clock.New(m.now, m.uptime, time.Time{})
	atLeast := func(want time.Duration) {
		t.Helper()
		if got := c.AtLeast().Sub(start); got != want {
			t.Errorf("after %v, %v ahead: at least %v, want %v", m.up, m.off, got, want)
		}
	}
	past := func(of, want time.Duration) {
		t.Helper()
		if got := c.PastFor(start.Add(of)); got != want {
			t.Errorf("after %v, %v ahead: past %v for %v, want %v", m.up, m.off, of, got, want)
		}
	}
	m.up = 2 * day
	atLeast(2 * day)
	past(day, day)
	past(3*day, -day)
	past(-10*day, day) // the maximum
	m.off = 60 * time.Hour
	atLeast(2 * day)
	past(day, day)
	past(3*day, 0)
	past(5*day, -12*time.Hour)
	m.up += time.Minute
	past(3*day, time.Minute)
	m.off = 0 // right again
	atLeast(m.up)
	past(3*day, -day+time.Minute)
	m.off = 60 * time.Hour
	atLeast(m.up)
	m.up += day - time.Minute
	atLeast(m.up)
	past(3*day, day-time.Minute)
	m.up += time.Minute // held
	atLeast(m.up + m.off)
	past(3*day, day)
	m.off = -365 * day // set back
	atLeast(m.up + m.off)
	past(0, m.off+m.up)
}

// TestInDoubtIsNotTrusted: a clock that is too far ahead is not trusted, however long
// it is steady.
func TestInDoubtIsNotTrusted(t *testing.T) {
	t.Parallel()
	m := new(machine)
	c := clock.New(m.now, m.uptime, time.Time{})
	m.off = 91 * day
	for range 100 {
		m.up += day
		c.Heard(m.now())
		if got := c.AtLeast(); !got.Equal(start.Add(m.up)) {
			t.Fatalf("after %v: at least %v", m.up, got)
		}
		if got := c.PastFor(start.Add(m.up + time.Hour)); got != -time.Hour {
			t.Fatalf("after %v: an hour later has been past for %v", m.up, got)
		}
	}
	m.off = 0
	if s := c.State(); s.Doubt != 0 || !s.AtLeast.Equal(start.Add(m.up)) {
		t.Errorf("right again: %+v", s)
	}
}

// TestRandomSteps compares the clock with a model that remembers all samples.
func TestRandomSteps(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		m := new(machine)
		c := clock.New(m.now, m.uptime, time.Time{})
		type sample struct{ up, off time.Duration }
		all := []sample{{}}
		floor, lowest := time.Duration(0), time.Duration(0)
		minutes := rapid.Int64Range(0, 3000)
		for range rapid.IntRange(1, 60).Draw(t, "samples") {
			m.up += time.Duration(minutes.Draw(t, "later")) * time.Minute
			if rapid.Bool().Draw(t, "step") {
				m.off = time.Duration(rapid.Int64Range(-200, 200).Draw(t, "hours")) * time.Hour
			}
			// An offset that is in doubt because the clock is ahead is not used.
			off, doubt := m.off, m.off < floor-clock.Skew || m.off > floor+3*day
			if doubt && off > floor {
				off = lowest
			}
			all = append(all, sample{m.up, off})
			at := time.Duration(rapid.Int64Range(-1000, 2000).Draw(t, "t")) * time.Hour
			since := max(0, at-off)
			lowest = off
			for _, s := range all {
				if m.up-s.up < clock.Hold {
					lowest = min(lowest, s.off)
				}
				since = max(since, min(at-s.off, s.up)) // that clock showed a time before at
			}
			if !doubt {
				floor = max(min(floor, off), lowest)
			}
			if got := c.AtLeast(); !got.Equal(start.Add(m.up + lowest)) {
				t.Fatalf("at least %v, want %v", got, start.Add(m.up+lowest))
			}
			if got := c.State().Doubt != 0; got != doubt {
				t.Fatalf("%v off, floor %v: in doubt is %v", m.off, floor, got)
			}
			if got, want := c.PastFor(start.Add(at)), min(m.up-since, clock.Hold); got != want {
				t.Fatalf("past %v for %v, want %v; %+v", at, got, want, all)
			}
		}
	})
}

// TestDoubt: a clock is in doubt while it is more than three days ahead of the lowest
// offset of a day, or more than five minutes behind. Steps continue when it has been
// steady, for an hour or a day, and then another clock agrees.
func TestDoubt(t *testing.T) {
	t.Parallel()
	m := &machine{up: time.Hour}
	c := clock.New(m.now, m.uptime, time.Time{})
	doubt := func(want time.Duration, waits bool) {
		t.Helper()
		if s := c.State(); s.Doubt != want || s.Waits != waits {
			t.Errorf("after %v: in doubt by %v, waits %v, want %v, %v", m.up, s.Doubt, s.Waits, want, waits)
		}
	}
	heard := func(off time.Duration, want clock.Verdict) {
		t.Helper()
		if got := c.Heard(m.now().Add(off)); got != want {
			t.Errorf("after %v: a clock that is %v off says %v, want %v", m.up, off, got, want)
		}
	}
	doubt(0, false)
	m.off = -5 * time.Minute
	doubt(0, false)
	m.off = 3*day - 5*time.Minute
	doubt(0, false)
	heard(day, clock.Unheard)
	const far = 91*day + 5*time.Minute // from the lowest
	m.off = 91 * day
	doubt(far, true)
	m.up += 59 * time.Minute
	heard(0, clock.Unheard) // too early
	m.up += time.Minute
	doubt(far, true)
	heard(5*time.Minute, clock.Fits)
	doubt(far, false)
	heard(0, clock.Unheard) // known
	heard(-6*time.Minute, clock.Denies)
	doubt(far, true)
	m.up += time.Minute
	heard(time.Hour, clock.Unheard) // returned before
	heard(0, clock.Unheard)         // another clock disagrees
	m.up += time.Hour
	heard(0, clock.Fits)
	doubt(far, false)
	m.off += time.Minute // another step, another hour
	heard(0, clock.Unheard)
	doubt(far+time.Minute, true)
	m.off = 0 // right again
	doubt(0, false)
	m.off = -day
	doubt(-day+5*time.Minute, true)
	m.up += day - time.Minute
	heard(0, clock.Unheard)
	m.up += time.Minute
	heard(0, clock.Fits)
	doubt(-day+5*time.Minute, false)
	m.off = 0 // right again
	doubt(0, false)
}

// TestConfirm: a confirmation ends the doubt at once. A time that has passed by the
// confirmed clock has been past for no uptime.
func TestConfirm(t *testing.T) {
	t.Parallel()
	for name, off := range map[string]time.Duration{"ahead": 91 * day, "behind": -91 * day, "ahead a little": day} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := &machine{up: time.Hour}
			c := clock.New(m.now, m.uptime, time.Time{})
			m.up, m.off = m.up+time.Hour, off
			if c.Confirm(start.Add(m.up)) || c.Confirm(m.now().Add(6*time.Minute)) || c.Confirm(m.now().Add(-6*time.Minute)) {
				t.Error("another time confirms it")
			}
			if s := c.State(); (s.Doubt != 0) != (off.Abs() > 3*day) {
				t.Errorf("refused: %+v", s)
			}
			if !c.Confirm(m.now().Add(5 * time.Minute)) {
				t.Error("the time does not confirm it")
			}
			m.up += time.Hour
			if s := c.State(); s.Doubt != 0 || s.Waits || !s.AtLeast.Equal(s.Shows) || !c.Heartbeat().Equal(s.Shows) {
				t.Errorf("confirmed: %+v", s)
			}
			if got := c.PastFor(start.Add(off - day)); got != time.Hour {
				t.Errorf("a day before has been past for %v", got)
			}
			m.off += 4 * day // it is what the next step is measured by
			if s := c.State(); s.Doubt != 4*day {
				t.Errorf("after the next step: %+v", s)
			}
		})
	}
}

// TestHeartbeat: the clock is compared with the heartbeat from before the start.
func TestHeartbeat(t *testing.T) {
	t.Parallel()
	for off, want := range map[time.Duration]time.Duration{
		-time.Hour: -time.Hour, -time.Minute: 0, 0: 0, 2 * day: 0, 91 * day: 91 * day,
	} {
		m := &machine{up: time.Hour, off: off}
		c := clock.New(m.now, m.uptime, start.Add(time.Hour))
		m.up += time.Minute
		if got := c.State().Doubt; got != want {
			t.Errorf("%v off: in doubt by %v, want %v", off, got, want)
		}
		if got := c.AtLeast().Sub(start.Add(m.up)); got != min(off, 0) {
			t.Errorf("%v off: the lower bound is %v off", off, got)
		}
		if got := c.PastFor(start.Add(day)); off == 2*day && got != time.Minute {
			t.Errorf("%v off: past the next day for %v", off, got)
		}
	}
}

// TestNextHeartbeat: the heartbeat for the next process follows the time that is not
// in doubt, whatever callers' clocks show. It is right as soon as the clock is.
func TestNextHeartbeat(t *testing.T) {
	t.Parallel()
	m := &machine{up: time.Hour}
	c := clock.New(m.now, m.uptime, start.Add(time.Hour))
	for _, row := range []struct{ later, off, want time.Duration }{
		{0, 91 * day, 0}, {time.Hour, 91 * day, 0}, {40 * day, 91 * day, 0}, {0, -time.Hour, 0}, {day, -time.Hour, 0},
		{0, -time.Minute, -time.Minute}, {day, -time.Minute, -time.Minute}, {0, day, -time.Minute}, {day, day, day},
	} {
		m.up += row.later
		m.off = row.off
		if got := c.Heartbeat().Sub(start.Add(m.up)); got != row.want {
			t.Errorf("after %v, %v off: heartbeat is %v off, want %v", m.up, m.off, got, row.want)
		}
		c.Heard(m.now())
	}
}
