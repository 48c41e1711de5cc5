package ledger_test

import (
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/server/ledger"
)

// machine is a server whose wall clock is off by a duration.
type machine struct {
	up, off   time.Duration
	heartbeat time.Time
	memory    *memory
}

var boot = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func (m *machine) now() time.Time        { return boot.Add(m.up + m.off) }
func (m *machine) uptime() time.Duration { return m.up }

func (m *machine) open(t testing.TB) *ledger.Ledger {
	t.Helper()
	l, err := ledger.Open(t.Context(), ledger.Config{Storage: m.memory, Clock: clock.New(m.now, m.uptime, m.heartbeat)})
	check(t, err)
	return l
}

// TestClockAheadForAMoment: a clock that is 25 hours ahead once expires no row. One that
// stays there is trusted after a day.
func TestClockAheadForAMoment(t *testing.T) {
	t.Parallel()
	m := &machine{memory: newMemory()}
	l := m.open(t)
	check(t, l.RecordX509(t.Context(), row("A", "silent", "x", boot.Add(36*time.Hour))))
	check(t, l.RecordJWT(t.Context(), "a", boot.Add(36*time.Hour)))
	safe := func(want bool) {
		t.Helper()
		h := l.X509("A", true)
		jwt, jwtSafe := l.JWT("a", true)
		if h.Clear != want || jwtSafe != want || jwt.IsZero() != want || len(l.Holders("A")) > 0 == want {
			t.Errorf("after %v, %v ahead: %+v, JWT %v %v, want safe %v", m.up, m.off, h, jwt, jwtSafe, want)
		}
	}
	m.off = 48 * time.Hour
	safe(false)
	m.up += time.Hour
	m.off = 0
	safe(false)
	m.off = 48 * time.Hour
	m.up += 23 * time.Hour
	safe(false)
	m.up += time.Hour // a day after the step
	safe(true)
}

// TestRandomClockSteps sets the clock, by minutes to years, while the server is up and
// while it is started, each time for less than a day. As long as an SVID is valid by
// the true time its authority is not safe; a day after all have expired it is.
func TestRandomClockSteps(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		m := &machine{memory: newMemory()}
		l := m.open(t)
		var last time.Time // expiry by the true clock
		minutes := func(name string, most int) time.Duration {
			return time.Duration(rapid.IntRange(1, most).Draw(rt, name)) * time.Minute
		}
		looks := func(d time.Duration) {
			for end := m.up + d; m.up < end; {
				m.up = min(m.up+max(d/8, time.Minute), end)
				safe := l.X509("A", true).Clear
				if left := last.Sub(boot.Add(m.up)); left > 0 && safe {
					rt.Fatalf("after %v, %v off: safe, and an SVID is valid for %v", m.up, m.off, left)
				}
			}
		}
		for range rapid.IntRange(1, 6).Draw(rt, "steps") {
			m.off = 0
			looks(minutes("right", 3*24*60))
			notAfter := m.now().Add(minutes("life", 48*60))
			if notAfter.After(last) {
				last = notAfter
			}
			check(t, l.RecordX509(t.Context(), row("A", "silent", notAfter.String(), notAfter)))
			m.heartbeat = m.now()
			m.off = minutes("far", []int{60, 24 * 60, 100 * 24 * 60, 5 * 365 * 24 * 60}[rapid.IntRange(0, 3).Draw(rt, "scale")])
			if rapid.Bool().Draw(rt, "behind") {
				m.off = -m.off
			}
			if rapid.Bool().Draw(rt, "started") {
				l = m.open(t)
			}
			looks(minutes("wrong", 23*60))
		}
		m.off = 0
		looks(time.Minute)
		m.up += max(0, last.Sub(m.now()))
		looks(24*time.Hour + 10*time.Minute)
		if !l.X509("A", true).Clear {
			rt.Fatalf("after %v, SVIDs until %v: %+v", m.up, last, l.X509("A", true))
		}
	})
}
