package ledger_test

import (
	"context"
	"maps"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/server/ledger"
)

// TestModel compares the ledger with a model of rows and last reports.
func TestModel(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		const skew = 5 * time.Minute
		now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
		begin := now
		wall := func() time.Time { return now }
		uptime := func() time.Duration { return now.Sub(begin) }
		m := newMemory()
		openNow := func() *ledger.Ledger {
			l, err := ledger.Open(context.Background(), ledger.Config{Storage: m, Clock: clock.New(wall, uptime, time.Time{})})
			if err != nil {
				t.Fatal(err)
			}
			return l
		}
		l, ctx := openNow(), context.Background()
		rows := map[key]time.Time{}
		pending := map[[2]string]int{} // by authority and agent, if reported
		noError := func(err error) {
			if err != nil {
				t.Fatal(err)
			}
		}
		authority, agent := rapid.SampledFrom([]string{"A", "B"}), rapid.SampledFrom([]string{"one", "two", "three"})
		entry, life := rapid.SampledFrom([]string{"", "x", "y"}), rapid.IntRange(1, 72)
		of := func(match func(key) bool) {
			maps.DeleteFunc(rows, func(k key, _ time.Time) bool { return match(k) })
			maps.DeleteFunc(pending, func(k [2]string, _ int) bool { return match(key{k[0], k[1], ""}) })
		}
		t.Repeat(map[string]func(*rapid.T){
			"give": func(t *rapid.T) {
				r := row(authority.Draw(t, "authority"), agent.Draw(t, "agent"), entry.Draw(t, "entry"),
					now.Add(time.Duration(life.Draw(t, "hours"))*time.Hour))
				noError(l.RecordX509(ctx, r))
				if k := (key{r.Authority, r.Agent, r.Entry}); r.NotAfter.After(rows[k]) {
					rows[k] = r.NotAfter
				}
			},
			"report": func(t *rapid.T) {
				a, g, n := authority.Draw(t, "authority"), agent.Draw(t, "agent"), rapid.IntRange(0, 3).Draw(t, "pending")
				settled := rapid.Bool().Draw(t, "settled")
				noError(l.Report(ctx, g, says(a, n, 0, settled)))
				maps.DeleteFunc(pending, func(k [2]string, _ int) bool { return k[1] == g })
				if n == 0 && settled {
					of(func(k key) bool { return k.authority == a && k.agent == g })
					return
				}
				known := n > 0
				for k := range rows {
					known = known || (k.authority == a && k.agent == g)
				}
				if known { // a claim without rows is ignored
					pending[[2]string{a, g}] = n
				}
			},
			"gone": func(t *rapid.T) {
				g := agent.Draw(t, "agent")
				noError(l.RemoveAgent(ctx, g))
				of(func(k key) bool { return k.agent == g })
			},
			"removed": func(t *rapid.T) {
				a := authority.Draw(t, "authority")
				noError(l.Removed(ctx, a, ""))
				of(func(k key) bool { return k.authority == a })
			},
			"restart": func(*rapid.T) {
				l = openNow()
				clear(pending)
			},
			"sweep": func(*rapid.T) {
				_, err := ledger.Sweep(l, ctx)
				noError(err)
			},
			"time passes": func(t *rapid.T) {
				now = now.Add(time.Duration(life.Draw(t, "hours"))*time.Hour + skew)
				before := maps.Clone(pending)
				for k, end := range rows {
					if now.Before(end.Add(skew)) {
						delete(before, [2]string{k.authority, k.agent})
					}
				}
				for k, end := range rows {
					if !now.Before(end.Add(skew)) {
						delete(rows, k)
						if _, last := before[[2]string{k.authority, k.agent}]; last {
							delete(pending, [2]string{k.authority, k.agent})
						}
					}
				}
				// Claims without a row are kept for a week.
				for _, g := range []string{"one", "two", "three"} {
					if c, ok := l.Contact(g); ok && now.Sub(c.At) < 6*day {
						continue
					}
					maps.DeleteFunc(pending, func(k [2]string, _ int) bool { return k[1] == g })
					noError(l.Report(ctx, g, ledger.Report{}))
				}
			},
			"": func(t *rapid.T) {
				for _, a := range []string{"A", "B"} {
					want := map[string]int{}
					var latest time.Time
					for k, end := range rows {
						if k.authority == a {
							want[k.agent]++
							if end.After(latest) {
								latest = end
							}
						}
					}
					for k, n := range pending {
						if k[0] == a && (n > 0 || want[k[1]] > 0) {
							want[k[1]] = max(n, 1)
						}
					}
					sum := 0
					for _, n := range want {
						sum += n
					}
					h := l.X509(a, true)
					if h.SVIDs != sum || h.Agents != len(want) || h.Clear != (len(want) == 0) || !h.Latest.Equal(latest) {
						t.Fatalf("%s at %v: %+v, want %v until %v", a, now, h, want, latest)
					}
					got := map[string]int{}
					for _, h := range l.Holders(a) {
						got[h.Agent] = h.SVIDs
					}
					if !maps.Equal(got, want) {
						t.Fatalf("%s is held by %v, want %v", a, got, want)
					}
				}
			},
		})
	})
}
