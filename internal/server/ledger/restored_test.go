package ledger_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/server/ledger"
)

// restoredLedger returns a ledger without rows of A, that was restored from a copy of an
// hour ago: X.509-SVIDs signed since are valid for a day, and JWT-SVIDs for ten.
func restoredLedger(t *testing.T, m *memory) (l *ledger.Ledger, copied, until time.Time) {
	t.Helper()
	copied, until = time.Now().Add(-time.Hour).UTC(), time.Now().Add(day).UTC()
	l, err := ledger.Open(t.Context(), ledger.Config{Storage: m, Restored: []ledger.Restored{{
		CopiedAt: copied, X509: map[string]time.Time{"A": until}, JWT: map[string]time.Time{"a": until.Add(9 * day)},
	}}})
	check(t, err)
	return l, copied, until
}

// TestRestored: SVIDs that were signed after the copy have no row. They count until they
// have expired, whatever agents report.
func TestRestored(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l, copied, until := restoredLedger(t, newMemory())
		ctx := t.Context()
		unknown := func(what string) {
			t.Helper()
			h := l.X509("A", true)
			if h.Clear || !h.UnknownSince.Equal(copied) || !h.UnknownUntil.Equal(until) || h.SVIDs != 0 || h.Agents != 0 {
				t.Errorf("%s: %+v", what, h)
			}
			if got := l.Holders("A"); len(got) != 1 || got[0] != (ledger.Holder{Latest: until, LastReport: copied, Reason: ledger.ReasonRestored}) {
				t.Errorf("%s: holders %+v", what, got)
			}
		}
		unknown("at first")
		// An agent that was known before the copy, and one that attested after it.
		for _, agent := range []string{"one", "two"} {
			check(t, l.Report(ctx, agent, says("A", 2, 0, false)))
			if h := l.X509("A", true); h.Clear || h.SVIDs != 2 || h.Agents != 1 || h.UnknownUntil.IsZero() || len(l.Holders("A")) != 2 {
				t.Errorf("%s holds: %+v", agent, h)
			}
			check(t, l.Report(ctx, agent, says("A", 0, 0, true)))
			unknown(agent + " has settled")
		}
		check(t, l.RemoveAgent(ctx, "one"))
		check(t, l.RemoveAgent(ctx, ""))
		unknown("all are gone")
		time.Sleep(day + 4*time.Minute)
		unknown("expired, by this clock")
		time.Sleep(time.Minute)
		if h := l.X509("A", true); h != (ledger.Holding{Clear: true}) || len(l.Holders("A")) != 0 {
			t.Errorf("expired: %+v, %+v", h, l.Holders("A"))
		}
		if h := l.X509("A", false); h.Clear {
			t.Errorf("not tainted: %+v", h)
		}
	})
}

// TestNotConcernedByARestore: a keyset that was made after the restore, or is not tainted.
func TestNotConcernedByARestore(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l, copied, until := restoredLedger(t, newMemory())
		if h := l.X509("B", true); h != (ledger.Holding{Clear: true}) || len(l.Holders("B")) != 0 {
			t.Errorf("another: %+v", h)
		}
		if latest, clear := l.JWT("b", true); !latest.IsZero() || !clear {
			t.Errorf("another's JWT-SVIDs: %v, %v", latest, clear)
		}
		// The period is also returned for the active keyset.
		if h := l.X509("A", false); h != (ledger.Holding{UnknownSince: copied, UnknownUntil: until}) {
			t.Errorf("active: %+v", h)
		}
		if latest, clear := l.JWT("a", false); !latest.Equal(until.Add(9*day)) || clear {
			t.Errorf("its JWT-SVIDs: %v, %v", latest, clear)
		}
	})
}

// TestRestoredTwice: SVIDs that were signed before either restore count, each for its own
// time.
func TestRestoredTwice(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		first, now := time.Now().UTC(), time.Now().Add(2*day).UTC()
		time.Sleep(2 * day)
		restored := func(copied time.Time, authority string, until time.Time) ledger.Restored {
			return ledger.Restored{CopiedAt: copied, X509: map[string]time.Time{authority: until}, JWT: map[string]time.Time{authority: until.Add(day)}}
		}
		for name, all := range map[string][]ledger.Restored{
			"in order": {restored(first, "A", now.Add(day)), restored(first.Add(day), "A", now.Add(2*day)), restored(now, "B", now.Add(day))},
			// The clock was set back between the two.
			"the first ends last": {restored(first.Add(day), "A", now.Add(2*day)), restored(first, "A", now.Add(day)), restored(now, "B", now.Add(day))},
		} {
			for after, since := range map[time.Duration]time.Time{0: first, day + time.Hour: first.Add(day), 2*day + time.Hour: {}} {
				l, err := ledger.Open(t.Context(), ledger.Config{Storage: newMemory(), Restored: all, Clock: clock.New(func() time.Time { return now.Add(after) }, nil, time.Time{})})
				check(t, err)
				h, want := l.X509("A", true), ledger.Holding{UnknownSince: since, UnknownUntil: now.Add(2 * day), Clear: since.IsZero()}
				if since.IsZero() {
					want.UnknownUntil = time.Time{}
				}
				if h != want {
					t.Errorf("%s, after %v: %+v, want %+v", name, after, h, want)
				}
				if got := l.Holders("A"); since.IsZero() && len(got) != 0 || !since.IsZero() && (len(got) != 1 || !got[0].LastReport.Equal(since) || !got[0].Latest.Equal(now.Add(2*day))) {
					t.Errorf("%s, after %v: holders %+v", name, after, got)
				}
				if latest, clear := l.JWT("A", true); !latest.Equal(now.Add(3*day)) || clear {
					t.Errorf("%s, after %v: JWT-SVIDs until %v, clear %v", name, after, latest, clear)
				}
			}
		}
	})
}

// TestRestoredBehind: at the last restore the clock was behind. The SVIDs of that
// restore count for longer, those of an earlier one do not.
func TestRestoredBehind(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		now := time.Now().UTC()
		l, err := ledger.Open(t.Context(), ledger.Config{
			Storage: newMemory(),
			Restored: []ledger.Restored{
				{CopiedAt: now.Add(-2 * day), X509: map[string]time.Time{"A": now.Add(day)}},
				{CopiedAt: now.Add(-day), X509: map[string]time.Time{"B": now.Add(2 * day)}},
			},
			RestoredAt: now.Add(-time.Hour),
		})
		check(t, err)
		for authority, until := range map[string]time.Time{"A": now.Add(day), "B": now.Add(2*day + time.Hour), "C": {}} {
			if h := l.X509(authority, true); !h.UnknownUntil.Equal(until) {
				t.Errorf("%s: unknown until %v, want %v", authority, h.UnknownUntil, until)
			}
		}
	})
}

// TestRestoredJWT: recorded and unknown JWT-SVIDs count, whichever expire later.
func TestRestoredJWT(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		m.jwt["a"] = time.Now().Add(day)
		l, _, until := restoredLedger(t, m)
		want := func(latest time.Time, clear bool) {
			t.Helper()
			if got, c := l.JWT("a", true); !got.Equal(latest) || c != clear {
				t.Errorf("%v, %v, want %v, %v", got, c, latest, clear)
			}
		}
		want(until.Add(9*day), false)
		check(t, l.RecordJWT(t.Context(), "a", until.Add(10*day)))
		want(until.Add(10*day), false)
		time.Sleep(11*day + 5*time.Minute)
		want(time.Time{}, true)

		l, _, until = restoredLedger(t, newMemory())
		want(until.Add(9*day), false)
	})
}
