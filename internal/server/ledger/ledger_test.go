package ledger_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/server/ledger"
)

const day = 24 * time.Hour

func TestRowsCountUntilTheyExpireOrAreSettled(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := open(t, nil, nil)
		now := time.Now()
		check(t, l.RecordX509(t.Context(),
			row("A", "one", "", now.Add(day)), row("A", "one", "x", now.Add(day/2)),
			row("A", "two", "", now.Add(2*day)), row("B", "two", "", now.Add(day))))
		want := func(what string, tainted bool, svids, agents int, latest time.Duration, clear bool) {
			t.Helper()
			h := l.X509("A", tainted)
			if h.SVIDs != svids || h.Agents != agents || h.Clear != clear || (latest == 0) != h.Latest.IsZero() ||
				(latest != 0 && !h.Latest.Equal(now.Add(latest))) {
				t.Errorf("%s: %+v, want %d SVIDs of %d agents, the last after %v, clear %v", what, h, svids, agents, latest, clear)
			}
		}
		want("given", false, 3, 2, 2*day, false)
		if h := l.X509("B", false); h.SVIDs != 1 || h.Agents != 1 {
			t.Errorf("the other authority: %+v", h)
		}
		want("tainted", true, 3, 2, 2*day, false)

		check(t, l.Report(t.Context(), "two", says("A", 0, 0, true)))
		want("one has settled", true, 2, 1, day, false)
		time.Sleep(day/2 + 6*time.Minute)
		want("half expired", true, 1, 1, day, false)
		time.Sleep(day / 2)
		want("all expired", true, 0, 0, 0, true)
		want("never clear before it is tainted", false, 0, 0, 0, false)
		if h := l.X509("B", false); h.SVIDs != 0 {
			t.Errorf("the other authority: %+v", h)
		}
	})
}

// The agent may hold either of two SVIDs of one entry.
func TestLaterExpiryStays(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		l := open(t, m, nil)
		late := time.Now().Add(day)
		check(t, l.RecordX509(t.Context(), row("A", "one", "x", late)))
		check(t, l.RecordX509(t.Context(), row("A", "one", "x", late.Add(-day/2))))
		for _, l := range []*ledger.Ledger{l, open(t, m, nil)} {
			if h := l.X509("A", true); !h.Latest.Equal(late) || h.SVIDs != 1 {
				t.Errorf("%+v, want one until %v", h, late)
			}
		}
		time.Sleep(day - time.Minute)
		if h := l.X509("A", true); h.Clear {
			t.Errorf("clear while the first could still be held: %+v", h)
		}
	})
}

func TestRemoveAgent(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		l := open(t, m, nil)
		check(t, l.RecordX509(t.Context(), row("A", "one", "x", time.Now().Add(day)), row("A", "two", "x", time.Now().Add(day)),
			row("B", "one", "x", time.Now().Add(day))))
		check(t, l.Report(t.Context(), "one", says("C", 1, 0, false)))
		l.Applied("three", 7)
		for id, want := range map[string]bool{"nobody": false, "one": true, "two": true, "three": true} {
			if got := l.Knows(id); got != want {
				t.Errorf("knows %s: %v", id, got)
			}
		}
		check(t, l.RemoveAgent(t.Context(), "nobody"))
		check(t, l.RemoveAgent(t.Context(), "one"))
		check(t, l.RemoveAgent(t.Context(), "three"))
		if l.Knows("one") || l.Knows("three") {
			t.Error("knows an agent that was removed")
		}
		if _, ok := l.Contact("one"); ok || m.count() != 1 || !m.has("A", "two", "x") {
			t.Errorf("kept: %v", m.rows)
		}
		for authority, agents := range map[string]int{"A": 1, "B": 0, "C": 0} {
			if h := l.X509(authority, true); h.Agents != agents {
				t.Errorf("%s: %+v, want %d agents", authority, h, agents)
			}
		}
		// The node exists after all.
		check(t, l.Report(t.Context(), "one", says("B", 1, 0, false)))
		if h := l.X509("B", true); h.Clear {
			t.Errorf("%+v of an agent that reports after its removal", h)
		}
	})
}

func TestRemoved(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		l := open(t, m, nil)
		for i := range 10_000 {
			check(t, l.RecordX509(t.Context(), row("A", fmt.Sprint(i%100), fmt.Sprint(i), time.Now().Add(day))))
		}
		check(t, l.RecordX509(t.Context(), row("B", "0", "x", time.Now().Add(day))))
		check(t, l.RecordJWT(t.Context(), "a", time.Now().Add(day)))
		check(t, l.RecordJWT(t.Context(), "b", time.Now().Add(day)))
		l.X509("A", true)
		check(t, l.Removed(t.Context(), "A", "a"))
		if m.count() != 1 || len(m.jwt) != 1 || !m.has("B", "0", "x") {
			t.Errorf("%d rows and %v kept, want those of B", m.count(), m.jwt)
		}
		if h := l.X509("A", false); h != (ledger.Holding{}) || len(l.Holders("A")) != 0 {
			t.Errorf("still there: %+v", h)
		}
		if latest, _ := l.JWT("a", false); !latest.IsZero() {
			t.Errorf("JWT key still known until %v", latest)
		}
	})
}

// A call that began before the taint may still sign with the key.
func TestCallsInFlight(t *testing.T) {
	t.Parallel()
	l := open(t, nil, nil)
	first, second := l.Begin(), l.Begin()
	is := func(what string, clear bool, calls int) {
		t.Helper()
		h := l.X509("A", true)
		_, jwt := l.JWT("a", true)
		if h.Clear != clear || jwt != clear || h.SVIDs != calls {
			t.Errorf("%s: %+v, JWT %v, want clear %v and %d calls", what, h, jwt, clear, calls)
		}
		var on int
		for _, h := range l.Holders("A") {
			if h.Reason == ledger.ReasonSigning && h.Agent == "" {
				on += h.SVIDs
			}
		}
		if on != calls {
			t.Errorf("%s: %+v", what, l.Holders("A"))
		}
	}
	is("two began before", false, 2)
	third := l.Begin()
	is("one began after", false, 2)
	if h := l.X509("C", true); h.SVIDs != 3 {
		t.Errorf("of an authority that was tainted later: %+v, want all three", h)
	}
	first()
	first()
	is("one has ended, twice", false, 1)
	second()
	is("those of before have ended", true, 0)
	if h := l.X509("B", true); h.Clear {
		t.Errorf("of another authority: %+v", h)
	}
	third()
	if h := l.X509("B", true); !h.Clear {
		t.Errorf("all have ended: %+v", h)
	}
	defer l.Begin()()
	is("learned once", true, 0)
}

func TestJWT(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		l := open(t, m, nil)
		start := time.Now()
		for range 600 { // ten minutes
			check(t, l.RecordJWT(t.Context(), "a", time.Now().Add(time.Hour)))
			check(t, l.RecordJWT(t.Context(), "a", time.Now().Add(time.Minute)))
			time.Sleep(time.Second)
		}
		if m.saves != 11 {
			t.Errorf("%d writes in ten minutes, want 11", m.saves)
		}
		latest, clear := l.JWT("a", true)
		if want := start.Add(time.Hour + 10*time.Minute); !latest.Equal(want) || clear {
			t.Errorf("%v, clear %v, want %v", latest, clear, want)
		}
		if again, _ := open(t, m, nil).JWT("a", true); !again.Equal(latest) {
			t.Errorf("%v after a restart, want %v", again, latest)
		}
		time.Sleep(time.Hour + time.Minute)
		if _, clear := l.JWT("a", true); clear {
			t.Error("clear as soon as it has expired by this clock")
		}
		time.Sleep(5 * time.Minute)
		if latest, clear := l.JWT("a", true); !clear || !latest.IsZero() {
			t.Errorf("%v, clear %v after all has expired", latest, clear)
		}
		if _, clear := l.JWT("a", false); clear {
			t.Error("clear without a taint")
		}
		if _, clear := open(t, m, nil).JWT("b", true); !clear {
			t.Error("a key that signed nothing is not clear")
		}
		l = open(t, m, nil)
		check(t, l.RecordJWT(t.Context(), "b", time.Now().Add(time.Hour)))
		if _, kept := m.jwt["a"]; kept {
			t.Error("expired, but not deleted from storage")
		}
	})
}

// A restarted server has all keys with JWT-SVIDs that have not expired.
func TestReopenWithJWTKeys(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		for i := range 20 {
			m.jwt[fmt.Sprint("expired", i)], m.jwt[fmt.Sprint("valid", i)] = time.Now().Add(-day), time.Now().Add(day)
		}
		l := open(t, m, nil)
		for i := range 20 {
			if latest, clear := l.JWT(fmt.Sprint("expired", i), true); !latest.IsZero() || !clear {
				t.Errorf("an expired one: %v, clear %v", latest, clear)
			}
			if latest, clear := l.JWT(fmt.Sprint("valid", i), true); !latest.Equal(time.Now().Add(day)) || clear {
				t.Errorf("a valid one: %v, clear %v", latest, clear)
			}
		}
	})
}

// A restarted server has the rows and no reports.
func TestReopen(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		l := open(t, m, nil)
		check(t, l.RecordX509(t.Context(), row("A", "one", "x", time.Now().Add(day)), row("A", "one", "y", time.Now().Add(time.Hour))))
		check(t, l.Report(t.Context(), "one", says("A", 1, 0, false)))
		time.Sleep(2 * time.Hour)
		l = open(t, m, nil)
		if h := l.X509("A", true); h.SVIDs != 1 || h.Clear {
			t.Errorf("%+v, want the row that has not expired", h)
		}
		if _, ok := l.Contact("one"); ok {
			t.Error("knows of a contact before it was opened")
		}
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- l.Run(ctx) }()
		time.Sleep(2 * time.Minute)
		if m.has("A", "one", "y") || !m.has("A", "one", "x") {
			t.Errorf("in storage: %v", m.rows)
		}
		stop()
		check(t, <-ended)
	})
}

// A row counts until it has expired by every machine's clock, and not for longer.
func TestRowExpiresToTheSecond(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := open(t, nil, nil)
		end := time.Now().Add(time.Hour)
		check(t, l.RecordX509(t.Context(), row("A", "one", "x", end)))
		time.Sleep(time.Until(clock.Over(end)) - 1)
		if h := l.X509("A", true); h.Clear {
			t.Errorf("before: %+v", h)
		}
		time.Sleep(time.Nanosecond)
		if h := l.X509("A", true); !h.Clear {
			t.Errorf("at its end: %+v", h)
		}
	})
}

// A read does not look at each row: it makes as much garbage with many as with one.
func TestReadsOfManyRows(t *testing.T) {
	l := open(t, nil, nil)
	for i := range 1000 {
		check(t, l.RecordX509(t.Context(), row("A", fmt.Sprint(i), "x", time.Now().Add(day))))
	}
	if n := testing.AllocsPerRun(10, func() { l.X509("A", true) }); n > 5 {
		t.Errorf("%v allocations", n)
	}
}

// Expired rows are deleted from storage, also after storage has failed for a while,
// unless they were recorded again.
func TestRun(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		var failing atomic.Bool
		m.hook = func(c ledger.Change, _ bool) error {
			if failing.Load() && len(c.Gone) > 0 {
				return errors.New("disk full")
			}
			return nil
		}
		var log strings.Builder
		l, err := ledger.Open(t.Context(), ledger.Config{Storage: m, Log: slog.New(slog.NewTextHandler(&log, nil))})
		check(t, err)
		go func() { _ = l.Run(t.Context()) }()
		for i := range 10_000 {
			check(t, l.RecordX509(t.Context(), row("A", fmt.Sprint(i%7), fmt.Sprint(i), time.Now().Add(time.Hour+time.Duration(i)*time.Second/10))))
		}
		wait := func(d time.Duration) { // and for the sweep of that moment
			time.Sleep(d)
			synctest.Wait()
		}
		wait(time.Hour)
		if failures := log.String(); l.X509("A", true).Clear || failures != "" {
			t.Errorf("before it fails:\n%s", failures)
		}
		failing.Store(true)
		wait(2 * time.Hour)
		if h := l.X509("A", true); !h.Clear || m.count() != 10_000 {
			t.Errorf("%+v and %d rows in storage, want reads not to wait for it", h, m.count())
		}
		check(t, l.RecordX509(t.Context(), row("A", "1", "1", time.Now().Add(time.Hour))))
		failures := strings.Count(log.String(), "expired rows not deleted")
		if failures < 10 || failures > 125 {
			t.Errorf("%d lines about the failures of two hours, want about one a minute", failures)
		}
		failing.Store(false)
		wait(2 * time.Minute)
		if n := strings.Count(log.String(), "expired rows not deleted"); n > failures {
			t.Errorf("%d lines more after storage has recovered", n-failures)
		}
		if m.count() != 1 || !m.has("A", "1", "1") {
			t.Errorf("%d rows in storage, want the one that has come back", m.count())
		}
	})
}
