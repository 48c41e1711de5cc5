package ledger_test

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/internal/server/ledger"
)

func TestReports(t *testing.T) {
	t.Parallel()
	report := func(tainted bool, pending, streams int, settled bool) ledger.AuthorityReport {
		return ledger.AuthorityReport{Authority: "A", Tainted: tainted, Pending: pending, Streams: streams, Settled: settled}
	}
	waiting := report(true, 2, 1, false)
	waiting.BeginsAt = time.Date(2000, 1, 1, 1, 0, 0, 0, time.UTC)
	early := report(true, 0, 4, false)
	early.BeginsAt = waiting.BeginsAt
	for _, tt := range []struct {
		name    string
		rows    int
		reports []ledger.AuthorityReport
		svids   int
		streams int
		reason  string // empty: no holder
	}{
		{"settled", 3, []ledger.AuthorityReport{report(true, 0, 0, true)}, 0, 0, ""},
		{"pending", 3, []ledger.AuthorityReport{report(true, 2, 1, false)}, 2, 1, ledger.ReasonRenewing},
		{"waiting", 3, []ledger.AuthorityReport{waiting}, 2, 1, ledger.ReasonWaiting},
		{"streams", 3, []ledger.AuthorityReport{report(true, 0, 4, false)}, 1, 4, ledger.ReasonStreams},
		{"streams before the wave", 3, []ledger.AuthorityReport{early}, 1, 4, ledger.ReasonStreams},
		{"not settled", 3, []ledger.AuthorityReport{report(true, 0, 0, false)}, 1, 0, ledger.ReasonSettling},
		{"contradiction", 3, []ledger.AuthorityReport{report(true, 1, 0, true)}, 1, 0, ledger.ReasonRenewing},
		{"contradiction of streams", 3, []ledger.AuthorityReport{report(true, 0, 1, true)}, 1, 1, ledger.ReasonStreams},
		{"negative", 3, []ledger.AuthorityReport{report(true, -1, 0, true)}, 1, 0, ledger.ReasonSettling},
		{"settled twice, once not", 3, []ledger.AuthorityReport{report(true, 0, 0, true), report(true, 1, 0, false)}, 1, 0, ledger.ReasonRenewing},
		{"not settled, then settled", 3, []ledger.AuthorityReport{report(true, 0, 0, false), report(true, 0, 0, true)}, 1, 0, ledger.ReasonSettling},
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
					check(t, l.RecordX509(t.Context(), row("A", "one", fmt.Sprint(i), time.Now().Add(day))))
				}
				check(t, l.RecordX509(t.Context(), row("B", "one", "", time.Now().Add(day))))
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
				// The next report replaces it.
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
		check(t, l.RecordX509(t.Context(), row("A", "never", "", time.Now().Add(day)), row("A", "away", "", time.Now().Add(day)),
			row("A", "posts", "", time.Now().Add(day))))
		check(t, l.Report(t.Context(), "away", says("A", 1, 0, false)))
		time.Sleep(3 * time.Minute)
		if h := l.Holders("A"); len(h) != 3 || h[0].Agent != "away" || h[0].Reason != ledger.ReasonRenewing {
			t.Errorf("three minutes after a report: %+v", h)
		}
		time.Sleep(time.Minute)
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
		check(t, l.RecordX509(t.Context(), row("A", "one", "", time.Now().Add(day))))
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
		l.Applied("one", 0)
		if c, ok := l.Contact("one"); !ok || c.Sequence != 5 {
			t.Errorf("after a status without a sequence number: %+v", c)
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

// A claim without a row counts until the SVIDs must have expired.
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

// A hostile agent can only keep a key from being clear.
func TestReportIsBounded(t *testing.T) {
	t.Parallel()
	l := open(t, nil, nil)
	check(t, l.RecordX509(t.Context(), row("A", "one", "", time.Now().Add(day))))
	var r ledger.Report
	for i := range 100_000 {
		r.Authorities = append(r.Authorities, ledger.AuthorityReport{Authority: fmt.Sprint(i), Tainted: true, Pending: 1})
	}
	r.Authorities = append(r.Authorities, ledger.AuthorityReport{Authority: "A", Tainted: true, Pending: 3},
		ledger.AuthorityReport{Authority: strings.Repeat("x", 1000), Tainted: true, Pending: 1})
	check(t, l.Report(t.Context(), "one", r))
	if h := l.X509("A", true); h.SVIDs != 3 {
		t.Errorf("%+v: unknown authorities excluded a known one", h)
	}
	remembered := 0
	for _, a := range r.Authorities {
		remembered += l.X509(a.Authority, false).Agents
	}
	if remembered != 32 {
		t.Errorf("%d authorities of one agent stored", remembered)
	}
	check(t, l.Report(t.Context(), "one", ledger.Report{}))
	for _, a := range r.Authorities[:100_000] {
		if h := l.X509(a.Authority, false); h.Agents != 0 {
			t.Fatalf("%s is held although the last report does not have it: %+v", a.Authority, h)
		}
	}
}

// A report that changes no row writes nothing.
func TestReportWithoutRowsIsNotStored(t *testing.T) {
	t.Parallel()
	m := newMemory()
	l := open(t, m, nil)
	check(t, l.Report(t.Context(), "one", says("A", 1, 0, false)))
	check(t, l.Report(t.Context(), "one", says("A", 0, 0, true)))
	if h := l.X509("A", true); !h.Clear || m.saves != 0 {
		t.Errorf("%+v after %d writes", h, m.saves)
	}
}

// The ID of an authority that the ledger does not have is stored up to a length.
func TestReportOfAnUnknownAuthority(t *testing.T) {
	t.Parallel()
	l := open(t, nil, nil)
	for n, agents := range map[int]int{128: 1, 129: 0} {
		id := strings.Repeat("x", n)
		check(t, l.Report(t.Context(), "one", says(id, 1, 0, false)))
		if h := l.X509(id, false); h.Agents != agents {
			t.Errorf("an ID of %d bytes: %+v, want %d agents", n, h, agents)
		}
	}
}
