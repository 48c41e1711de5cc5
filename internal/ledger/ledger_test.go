package ledger_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/internal/ledger"
)

const day = 24 * time.Hour

func TestRowsCountUntilTheyExpireOrAreSettled(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := open(t, nil, nil)
		now := time.Now()
		check(t, l.GiveX509(t.Context(),
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

// Of two SVIDs of one entry the agent may hold either.
func TestLaterExpiryStays(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		l := open(t, m, nil)
		late := time.Now().Add(day)
		check(t, l.GiveX509(t.Context(), row("A", "one", "x", late)))
		check(t, l.GiveX509(t.Context(), row("A", "one", "x", late.Add(-day/2))))
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

func TestReports(t *testing.T) {
	t.Parallel()
	report := func(tainted bool, pending, streams int, settled bool) ledger.AuthorityReport {
		return ledger.AuthorityReport{Authority: "A", Tainted: tainted, Pending: pending, Streams: streams, Settled: settled}
	}
	waiting := report(true, 2, 1, false)
	waiting.BeginsAt = time.Date(2000, 1, 1, 1, 0, 0, 0, time.UTC)
	for _, tt := range []struct {
		name    string
		rows    int
		reports []ledger.AuthorityReport
		svids   int
		streams int
		reason  string // empty: holds nothing
	}{
		{"settled", 3, []ledger.AuthorityReport{report(true, 0, 0, true)}, 0, 0, ""},
		{"pending", 3, []ledger.AuthorityReport{report(true, 2, 1, false)}, 2, 1, ledger.ReasonRenewing},
		{"waiting", 3, []ledger.AuthorityReport{waiting}, 2, 1, ledger.ReasonWaiting},
		{"streams", 3, []ledger.AuthorityReport{report(true, 0, 4, false)}, 1, 4, ledger.ReasonStreams},
		{"not settled", 3, []ledger.AuthorityReport{report(true, 0, 0, false)}, 1, 0, ledger.ReasonRenewing},
		{"contradiction", 3, []ledger.AuthorityReport{report(true, 1, 0, true)}, 1, 0, ledger.ReasonRenewing},
		{"contradiction of streams", 3, []ledger.AuthorityReport{report(true, 0, 1, true)}, 1, 1, ledger.ReasonStreams},
		{"negative", 3, []ledger.AuthorityReport{report(true, -1, 0, true)}, 1, 0, ledger.ReasonRenewing},
		{"settled twice, once not", 3, []ledger.AuthorityReport{report(true, 0, 0, true), report(true, 1, 0, false)}, 1, 0, ledger.ReasonRenewing},
		{"not settled, then settled", 3, []ledger.AuthorityReport{report(true, 0, 0, false), report(true, 0, 0, true)}, 1, 0, ledger.ReasonRenewing},
		{"settled without taint", 3, []ledger.AuthorityReport{report(false, 0, 0, true)}, 3, 0, ledger.ReasonBehind},
		{"nothing said", 3, nil, 3, 0, ledger.ReasonBehind},
		{"held without a row", 0, []ledger.AuthorityReport{report(true, 1, 0, false)}, 1, 0, ledger.ReasonRenewing},
		{"streams without a row", 0, []ledger.AuthorityReport{report(true, 0, 2, true)}, 1, 2, ledger.ReasonStreams},
		{"held of a removed one", 0, []ledger.AuthorityReport{report(false, 3, 0, false)}, 3, 0, ledger.ReasonRenewing},
		{"nothing without a row", 0, []ledger.AuthorityReport{report(true, 0, 0, false)}, 0, 0, ""},
		{"very many", 0, []ledger.AuthorityReport{report(true, 1<<62, 1<<62, false)}, 1<<31 - 1, 1<<31 - 1, ledger.ReasonRenewing},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				m := newMemory()
				l := open(t, m, nil)
				for i := range tt.rows {
					check(t, l.GiveX509(t.Context(), row("A", "one", fmt.Sprint(i), time.Now().Add(day))))
				}
				check(t, l.GiveX509(t.Context(), row("B", "one", "", time.Now().Add(day))))
				check(t, l.Report(t.Context(), "one", ledger.Report{Sequence: 4, Rate: 5, Authorities: tt.reports}))
				got, holders := l.X509("A", true), l.Holders("A")
				if tt.reason == "" {
					if !got.Clear || got.SVIDs != 0 || len(holders) != 0 || m.has("A", "one", "0") {
						t.Errorf("%+v, held by %+v, want nothing", got, holders)
					}
				} else if got.Clear || got.SVIDs != tt.svids || len(holders) != 1 || (tt.rows > 0 && !m.has("A", "one", "0")) {
					t.Errorf("%+v, held by %+v, want %d SVIDs of one agent", got, holders, tt.svids)
				} else if h := holders[0]; h.Agent != "one" || h.SVIDs != tt.svids || h.Streams != tt.streams || h.Reason != tt.reason ||
					h.Sequence != 4 || h.Rate != 5 || !h.LastReport.Equal(time.Now()) {
					t.Errorf("held by %+v, want %d SVIDs, %d streams, %s", h, tt.svids, tt.streams, tt.reason)
				}
				if !m.has("B", "one", "") {
					t.Error("a row of another authority is gone")
				}
				// The next report replaces all of it.
				check(t, l.Report(t.Context(), "one", ledger.Report{}))
				if got := l.X509("A", true); tt.reason != "" && got.SVIDs != tt.rows {
					t.Errorf("after a report of nothing: %+v, want the rows", got)
				}
			})
		})
	}
}

func TestReasonSilent(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := open(t, nil, nil)
		check(t, l.GiveX509(t.Context(), row("A", "never", "", time.Now().Add(day)), row("A", "away", "", time.Now().Add(day)),
			row("A", "posts", "", time.Now().Add(day))))
		check(t, l.Report(t.Context(), "away", says("A", 1, 0, false)))
		time.Sleep(4 * time.Minute)
		l.Applied("posts", 9)
		var got []string
		for _, h := range l.Holders("A") {
			got = append(got, fmt.Sprint(h.Agent, " ", h.Reason, " ", h.Sequence))
		}
		if want := "away silent 7, never silent 0, posts silent 9"; strings.Join(got, ", ") != want {
			t.Errorf("held by %v, want %s", got, want)
		}
	})
}

func TestContact(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := open(t, nil, nil)
		check(t, l.GiveX509(t.Context(), row("A", "one", "", time.Now().Add(day))))
		if c, ok := l.Contact("one"); ok {
			t.Errorf("before any: %+v", c)
		}
		l.Applied("one", 3)
		if c, ok := l.Contact("one"); !ok || c != (ledger.Contact{Sequence: 3, At: time.Now()}) {
			t.Errorf("after a status: %+v", c)
		}
		check(t, l.Report(t.Context(), "one", ledger.Report{Sequence: 4}))
		time.Sleep(time.Second)
		l.Applied("one", 5)
		if c, ok := l.Contact("one"); !ok || c != (ledger.Contact{Sequence: 5, At: time.Now(), Reports: true}) {
			t.Errorf("after a report and a status: %+v", c)
		}
		for range 8 {
			time.Sleep(day)
			l.X509("A", false)
		}
		if c, ok := l.Contact("one"); ok {
			t.Errorf("for ever: %+v", c)
		}
	})
}

// What an agent says that it holds, and the ledger knows no row of, counts
// until it must have expired.
func TestClaimWithoutRowEnds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := open(t, nil, nil)
		check(t, l.Report(t.Context(), "one", says("A", 1, 0, false)))
		time.Sleep(day)
		check(t, l.Report(t.Context(), "one", says("A", 1, 0, false)))
		time.Sleep(7 * day)
		if h := l.X509("A", true); h.Clear {
			t.Errorf("after 7 days: %+v", h)
		}
		time.Sleep(10 * time.Minute)
		if h := l.X509("A", true); !h.Clear {
			t.Errorf("after more than the longest life: %+v", h)
		}
	})
}

func TestGone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		l := open(t, m, nil)
		check(t, l.GiveX509(t.Context(), row("A", "one", "x", time.Now().Add(day)), row("A", "two", "x", time.Now().Add(day)),
			row("B", "one", "x", time.Now().Add(day))))
		check(t, l.Report(t.Context(), "one", says("C", 1, 0, false)))
		check(t, l.Gone(t.Context(), "nobody"))
		check(t, l.Gone(t.Context(), "one"))
		if _, ok := l.Contact("one"); ok || m.count() != 1 || !m.has("A", "two", "x") {
			t.Errorf("kept: %v", m.rows)
		}
		for authority, agents := range map[string]int{"A": 1, "B": 0, "C": 0} {
			if h := l.X509(authority, true); h.Agents != agents {
				t.Errorf("%s: %+v, want %d agents", authority, h, agents)
			}
		}
		// The word was wrong.
		check(t, l.Report(t.Context(), "one", says("B", 1, 0, false)))
		if h := l.X509("B", true); h.Clear {
			t.Errorf("%+v of an agent that is there after all", h)
		}
	})
}

func TestRemoved(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		l := open(t, m, nil)
		for i := range 10_000 {
			check(t, l.GiveX509(t.Context(), row("A", fmt.Sprint(i%100), fmt.Sprint(i), time.Now().Add(day))))
		}
		check(t, l.GiveX509(t.Context(), row("B", "0", "x", time.Now().Add(day))))
		check(t, l.GiveJWT(t.Context(), "a", time.Now().Add(day)))
		check(t, l.GiveJWT(t.Context(), "b", time.Now().Add(day)))
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

// A call that began before the taint may be signing with the key still.
func TestCallsOnTheirWay(t *testing.T) {
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
			check(t, l.GiveJWT(t.Context(), "a", time.Now().Add(time.Hour)))
			check(t, l.GiveJWT(t.Context(), "a", time.Now().Add(time.Minute)))
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
		check(t, l.GiveJWT(t.Context(), "b", time.Now().Add(time.Hour)))
		if _, kept := m.jwt["a"]; kept {
			t.Error("expired, and in storage for ever")
		}
	})
}

// A server that was restarted knows the rows and no reports.
func TestReopen(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		l := open(t, m, nil)
		check(t, l.GiveX509(t.Context(), row("A", "one", "x", time.Now().Add(day)), row("A", "one", "y", time.Now().Add(time.Hour))))
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

// What has expired goes from storage too, also after a time in which storage
// failed, unless it has come back.
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
		l := open(t, m, nil)
		go func() { _ = l.Run(t.Context()) }()
		for i := range 10_000 {
			check(t, l.GiveX509(t.Context(), row("A", fmt.Sprint(i%7), fmt.Sprint(i), time.Now().Add(time.Hour+time.Duration(i)*time.Second/10))))
		}
		failing.Store(true)
		time.Sleep(2 * time.Hour)
		if h := l.X509("A", true); !h.Clear || m.count() != 10_000 {
			t.Errorf("%+v and %d rows in storage, want reads not to wait for it", h, m.count())
		}
		check(t, l.GiveX509(t.Context(), row("A", "1", "1", time.Now().Add(time.Hour))))
		failing.Store(false)
		time.Sleep(2 * time.Minute)
		if m.count() != 1 || !m.has("A", "1", "1") {
			t.Errorf("%d rows in storage, want the one that has come back", m.count())
		}
	})
}

// A hostile agent can keep a key from being clear, and no more.
func TestReportIsBounded(t *testing.T) {
	t.Parallel()
	l := open(t, nil, nil)
	check(t, l.GiveX509(t.Context(), row("A", "one", "", time.Now().Add(day))))
	var r ledger.Report
	for i := range 100_000 {
		r.Authorities = append(r.Authorities, ledger.AuthorityReport{Authority: fmt.Sprint(i), Tainted: true, Pending: 1})
	}
	r.Authorities = append(r.Authorities, ledger.AuthorityReport{Authority: "A", Tainted: true, Pending: 3},
		ledger.AuthorityReport{Authority: strings.Repeat("x", 1000), Tainted: true, Pending: 1})
	check(t, l.Report(t.Context(), "one", r))
	if h := l.X509("A", true); h.SVIDs != 3 {
		t.Errorf("%+v: surplus was at the cost of what is known", h)
	}
	remembered := 0
	for _, a := range r.Authorities {
		remembered += l.X509(a.Authority, false).Agents
	}
	if remembered != 32 {
		t.Errorf("%d authorities of one agent remembered", remembered)
	}
	check(t, l.Report(t.Context(), "one", ledger.Report{}))
	for _, a := range r.Authorities[:100_000] {
		if h := l.X509(a.Authority, false); h.Agents != 0 {
			t.Fatalf("%s is held after the last report has said otherwise: %+v", a.Authority, h)
		}
	}
}
