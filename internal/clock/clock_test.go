package clock_test

import (
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/renewd/renewd/internal/clock"
)

const day = 24 * time.Hour

var start = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// machine has a wall clock that a test sets, and uptime.
type machine struct {
	up, off time.Duration
}

func (m *machine) now() time.Time        { return start.Add(m.up + m.off) }
func (m *machine) uptime() time.Duration { return m.up }

func TestStepAhead(t *testing.T) {
	t.Parallel()
	m := new(machine)
	c := clock.New(m.now, m.uptime, time.Time{})
	sure := func(want time.Duration) {
		t.Helper()
		if got := c.Sure().Sub(start); got != want {
			t.Errorf("after %v, %v ahead: sure is %v, want %v", m.up, m.off, got, want)
		}
	}
	past := func(of, want time.Duration) {
		t.Helper()
		if got := c.PastFor(start.Add(of)); got != want {
			t.Errorf("after %v, %v ahead: past %v for %v, want %v", m.up, m.off, of, got, want)
		}
	}
	m.up = 2 * day
	sure(2 * day)
	past(day, day)
	past(3*day, -day)
	past(-10*day, day) // it says no more
	m.off = 91 * day
	sure(2 * day)
	past(day, day)
	past(3*day, 0)
	past(94*day, -day)
	m.up += time.Minute
	past(3*day, time.Minute)
	m.off = 0 // right again
	sure(m.up)
	past(3*day, -day+time.Minute)
	m.off = 91 * day
	sure(m.up)
	m.up += day - time.Minute
	sure(m.up)
	past(3*day, day-time.Minute)
	m.up += time.Minute // held
	sure(m.up + m.off)
	past(3*day, day)
	m.off = -365 * day // set back
	sure(m.up + m.off)
	past(0, m.off+m.up)
}

// TestRandomSteps compares the clock with one that remembers everything.
func TestRandomSteps(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		m := new(machine)
		c := clock.New(m.now, m.uptime, time.Time{})
		type sight struct{ up, off time.Duration }
		all := []sight{{}}
		minutes := rapid.Int64Range(0, 3000)
		for range rapid.IntRange(1, 60).Draw(t, "looks") {
			m.up += time.Duration(minutes.Draw(t, "later")) * time.Minute
			if rapid.Bool().Draw(t, "step") {
				m.off = time.Duration(rapid.Int64Range(-1000, 1000).Draw(t, "hours")) * time.Hour
			}
			all = append(all, sight{m.up, m.off})
			at := time.Duration(rapid.Int64Range(-1000, 2000).Draw(t, "t")) * time.Hour
			sure, since := m.off, max(0, at-m.off)
			for _, s := range all {
				if m.up-s.up < clock.Hold {
					sure = min(sure, s.off)
				}
				since = max(since, min(at-s.off, s.up)) // before it by that clock
			}
			if got := c.Sure(); !got.Equal(start.Add(m.up + sure)) {
				t.Fatalf("sure is %v, want %v", got, start.Add(m.up+sure))
			}
			if got, want := c.PastFor(start.Add(at)), min(m.up-since, clock.Hold); got != want {
				t.Fatalf("past %v for %v, want %v; %+v", at, got, want, all)
			}
		}
	})
}

// TestDoubt: an hour is what a clock has to prove that it went ahead by days with
// reason, and a day that it was set back.
func TestDoubt(t *testing.T) {
	t.Parallel()
	m := &machine{up: time.Hour}
	c := clock.New(m.now, m.uptime, time.Time{})
	doubt := func(want time.Duration) {
		t.Helper()
		if got := c.Doubt(); got != want {
			t.Errorf("after %v: in doubt by %v, want %v", m.up, got, want)
		}
	}
	doubt(0)
	m.off = -5 * time.Minute
	doubt(0)
	m.off = 3*day - 5*time.Minute
	doubt(0)
	const far = 91*day + 5*time.Minute // from the lowest
	m.off = 91 * day
	doubt(far)
	m.up += 59 * time.Minute
	doubt(far)
	m.off = 0 // right again
	doubt(0)
	m.off = 91 * day
	doubt(far)
	m.up += time.Hour
	doubt(0)
	m.off = 0 // right again, though the other was no longer in doubt
	doubt(0)
	m.off = -day
	doubt(-day + 5*time.Minute)
	m.up += day - time.Minute
	doubt(-day + 5*time.Minute)
	m.off = -2 * day // another step, another day
	doubt(-2*day + 5*time.Minute)
	m.up += day - time.Minute
	doubt(-2*day + 5*time.Minute)
	m.up += time.Minute
	doubt(0)
}

// TestHeartbeat: what is known of the time before the start is what the clock is
// measured by.
func TestHeartbeat(t *testing.T) {
	t.Parallel()
	for off, want := range map[time.Duration]time.Duration{
		-time.Hour: -time.Hour, -time.Minute: 0, 0: 0, 2 * day: 0, 91 * day: 91 * day,
	} {
		m := &machine{up: time.Hour, off: off}
		c := clock.New(m.now, m.uptime, start.Add(time.Hour))
		m.up += time.Minute
		if got := c.Doubt(); got != want {
			t.Errorf("%v off: in doubt by %v, want %v", off, got, want)
		}
		if got := c.Sure().Sub(start.Add(m.up)); got != min(off, 0) {
			t.Errorf("%v off: sure is %v off", off, got)
		}
		if got := c.PastFor(start.Add(day)); off > day && got != time.Minute {
			t.Errorf("%v off: past the next day for %v", off, got)
		}
	}
}

// TestNextHeartbeat: what is kept for the next process is the time that is not in
// doubt.
func TestNextHeartbeat(t *testing.T) {
	t.Parallel()
	m := &machine{up: time.Hour}
	c := clock.New(m.now, m.uptime, start.Add(time.Hour))
	for _, row := range []struct{ later, off, want time.Duration }{
		{0, 91 * day, 0}, {time.Hour, 91 * day, 0}, {0, -time.Hour, 0}, {23 * time.Hour, -time.Hour, 0},
		{time.Hour, -time.Hour, -time.Hour}, {time.Hour, 0, -time.Hour}, {day, 0, 0},
	} {
		m.up += row.later
		m.off = row.off
		if got := c.Heartbeat().Sub(start.Add(m.up)); got != row.want {
			t.Errorf("after %v, %v off: heartbeat is %v off, want %v", m.up, m.off, got, row.want)
		}
	}
}
