package renew_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/renew/wave"
)

// skewed is a drill on a node whose clock is ahead of the server's by skew, in
// nanoseconds, and whose SVIDs live for an hour. The bubble's clock is the
// server's.
func skewed(t *testing.T, n int, skew *atomic.Int64, log *strings.Builder, f func(*rig)) {
	drill(t, n, func(r *rig) {
		r.server.life = time.Hour
		r.cfg.Now = func() time.Time { return time.Now().Round(0).Add(time.Duration(skew.Load())) }
		r.cache = cache.New(cache.Config{Limit: n + 1, Now: r.cfg.Now})
		r.cfg.Cache, r.cfg.Log = r.cache, logTo(log)
	}, f)
}

// valid reports whether an SVID is valid by both clocks.
func (r *rig) valid(s *cache.SVID) bool {
	for _, now := range []time.Time{time.Now(), r.cfg.Now()} {
		if now.Before(s.NotBefore) || !now.Before(s.NotAfter) {
			return false
		}
	}
	return true
}

// A node whose clock is wrong holds SVIDs that are valid by the server's clock,
// serves them, and renews them no more often than other nodes do.
func TestWrongClockKeepsIdentities(t *testing.T) {
	const n = 5
	for name, by := range map[string]time.Duration{
		"behind by 75 seconds":   -75 * time.Second,
		"behind by 40 minutes":   -40 * time.Minute,
		"behind by 3 hours":      -3 * time.Hour,
		"behind by 10 years":     -10 * 365 * 24 * time.Hour,
		"ahead by 75 seconds":    75 * time.Second,
		"ahead by a few minutes": 10 * time.Minute,
	} {
		t.Run(name, func(t *testing.T) {
			var skew atomic.Int64
			skew.Store(int64(by))
			var log strings.Builder
			skewed(t, n, &skew, &log, func(r *rig) {
				begin := time.Now()
				for range 4 * 60 {
					for i := range n {
						if v := r.cache.Match([]cache.Selector{selector(i)}); len(v.Identities) != 1 {
							t.Fatalf("after %v a workload has %d identities", time.Since(begin), len(v.Identities))
						} else if s := v.Identities[0].SVID; s.NotBefore.After(time.Now()) || !s.NotAfter.After(time.Now()) {
							t.Fatalf("after %v a workload has an SVID that is valid from %v to %v", time.Since(begin), s.NotBefore, s.NotAfter)
						} else if age := time.Since(s.NotBefore); age > 36*time.Minute {
							t.Fatalf("after %v a workload has an SVID that is %v old, which is more than half of its life", time.Since(begin), age)
						}
					}
					time.Sleep(time.Minute)
				}
				synctest.Wait()
				asked := 0
				for _, c := range r.server.since(time.Time{}) {
					asked += len(c.ids)
				}
				if asked < 8*n || asked > 13*n {
					t.Errorf("%d SVIDs were asked for in four hours, want each of %d at its half-life", asked, n)
				}
				warned := 0
				if by < 0 {
					warned = 1
					if lag := r.renewer.ClockLag(); lag > -by || lag < -by-15*time.Second {
						t.Errorf("the clock is said to lag by %v", lag)
					}
				}
				if k := strings.Count(log.String(), "level=WARN"); k != warned || strings.Count(log.String(), "clock lag detected") != warned {
					t.Errorf("%d warnings, want %d:\n%s", k, warned, log.String())
				}
			})
		})
	}
}

// While this node's clock is behind, the SVID held stays in use until the new one
// is valid by this clock, too, and is not minted repeatedly meanwhile.
func TestOldSVIDServesUntilTheNewOneIsValidHere(t *testing.T) {
	const n = 5
	var skew atomic.Int64
	var log strings.Builder
	skewed(t, n, &skew, &log, func(r *rig) {
		from := time.Now()
		r.sleepUntil(from.Add(6 * time.Minute))
		skew.Store(int64(-5 * time.Minute))
		first := mustItem(t, r.cache, "entry-0000").SVID
		for range 12 * 100 {
			for i := range n {
				v := r.cache.Match([]cache.Selector{selector(i)})
				if s := v.Identities[0].SVID; !r.valid(s) {
					t.Fatalf("after %v an SVID is shown that is valid from %v to %v, and it is %v here", time.Since(from), s.NotBefore, s.NotAfter, r.cfg.Now())
				}
			}
			r.sleepUntil(time.Now().Add(5 * time.Second))
		}
		asked := 0
		for _, c := range r.server.since(from) {
			asked += len(c.ids)
		}
		if asked < 2*n || asked > 4*n || mustItem(t, r.cache, "entry-0000").SVID == first {
			t.Errorf("%d SVIDs were asked for in 100 minutes, want each of %d at its half-life", asked, n)
		}
	})
}

// postponed is a drill in which the clock lags and the new SVID of the one entry is
// postponed.
func postponed(t *testing.T, f func(r *rig, skew *atomic.Int64, old *cache.SVID)) {
	postponedOf(t, 1, new(strings.Builder), f)
}

// postponedOf is postponed with n entries; old is that of the first.
func postponedOf(t *testing.T, n int, log *strings.Builder, f func(r *rig, skew *atomic.Int64, old *cache.SVID)) {
	var skew atomic.Int64
	skewed(t, n, &skew, log, func(r *rig) {
		r.sleepUntil(time.Now().Add(21 * time.Minute))
		skew.Store(int64(-20 * time.Minute))
		r.server.set(func() { r.server.signer = r.next })
		old := mustItem(t, r.cache, "entry-0000").SVID
		from := time.Now()
		r.sleepUntil(from.Add(34 * time.Minute)) // half of its life has passed by this clock
		if calls := r.server.since(from); len(calls) != n || mustItem(t, r.cache, "entry-0000").SVID != old {
			t.Fatalf("%d calls, want one for each entry, and the old SVID in use", len(calls))
		}
		f(r, &skew, old)
	})
}

// The postponed SVID is used as soon as the old one must not be used.
func TestPostponedSVIDIsUsedWhenTheOldOneMustNotBeUsed(t *testing.T) {
	for name, end := range map[string]func(*rig, *atomic.Int64, *cache.SVID){
		"it is about to end by the server's clock": func(r *rig, _ *atomic.Int64, old *cache.SVID) { r.sleepUntil(old.NotAfter.Add(-30 * time.Second)) },
		"its authority is tainted":                 func(r *rig, _ *atomic.Int64, _ *cache.SVID) { r.mark() },
		"its authority is removed": func(r *rig, _ *atomic.Int64, _ *cache.SVID) {
			r.cache.SetBundle(snapshot(r.t, trusted(r.next)...))
		},
		"the clock was set back further": func(_ *rig, skew *atomic.Int64, _ *cache.SVID) {
			skew.Store(int64(-40 * time.Minute))
			time.Sleep(time.Minute) // no sleep is longer, so by now it was noticed
		},
	} {
		t.Run(name, func(t *testing.T) {
			postponed(t, func(r *rig, skew *atomic.Int64, old *cache.SVID) {
				calls := len(r.server.since(time.Time{}))
				end(r, skew, old)
				synctest.Wait()
				if s := mustItem(t, r.cache, "entry-0000").SVID; s == old || len(r.server.since(time.Time{})) != calls {
					t.Errorf("the old SVID is in use: %t; %d calls more, want none", s == old, len(r.server.since(time.Time{}))-calls)
				}
			})
		})
	}
}

func TestPostponedSVIDIsUsedWhenTheClockWasSet(t *testing.T) {
	postponed(t, func(r *rig, skew *atomic.Int64, old *cache.SVID) {
		skew.Store(0)
		r.sleepUntil(time.Now().Add(time.Minute))
		if s := mustItem(t, r.cache, "entry-0000").SVID; s == old || !r.valid(s) {
			t.Errorf("in use is an SVID that is valid from %v, and it is %v", s.NotBefore, time.Now())
		}
		r.sleepUntil(time.Now().Add(time.Hour))
		if lag := r.renewer.ClockLag(); lag != 0 {
			t.Errorf("the clock is said to lag by %v after it was set and an SVID was minted", lag)
		}
	})
}

// If the entry changes while its new SVID is postponed, another one is minted.
func TestPostponedSVIDOfAnotherRevisionIsNotUsed(t *testing.T) {
	postponed(t, func(r *rig, _ *atomic.Int64, _ *cache.SVID) {
		changed := *mustItem(t, r.cache, "entry-0000").Entry
		changed.Revision++
		changed.X509TTL = time.Hour
		r.cache.Update([]*cache.Entry{&changed}, nil)
		synctest.Wait()
		if s := mustItem(t, r.cache, "entry-0000").SVID; s.Revision != changed.Revision {
			t.Errorf("the SVID in use is of revision %d, want %d", s.Revision, changed.Revision)
		}
	})
}

// markNext taints the authority of the postponed SVID and returns when this node learned
// of it by its own clock. The third authority signs from now on.
func (r *rig) markNext(third *ca) time.Time {
	r.server.set(func() { r.server.signer = third })
	seen := r.cfg.Now()
	r.cache.SetBundle(snapshot(r.t, append(tainted(seen, r.next), trusted(r.ca, third)...)...))
	synctest.Wait()
	return seen
}

// A postponed SVID depends on its authority like one in use: it is counted until the
// wave replaces it, before it is used.
func TestPostponedSVIDOfATaintedAuthorityIsReplaced(t *testing.T) {
	postponed(t, func(r *rig, _ *atomic.Int64, old *cache.SVID) {
		third := newCA(t, "third")
		since, seen := time.Now(), r.markNext(third)
		begin := wave.Delay(r.cfg.Seed, r.next.id, r.cfg.MaxDelay)
		r.sleepUntil(since.Add(begin - time.Second))
		if n := r.renewer.InFlight(r.next.id, seen); n != 1 || len(r.server.since(since)) != 0 {
			t.Errorf("before the wave: %d SVIDs may still come from the tainted authority, want 1; %d calls, want none", n, len(r.server.since(since)))
		}
		r.sleepUntil(since.Add(begin + time.Second))
		if n := r.renewer.InFlight(r.next.id, seen); n != 0 || len(r.server.since(since)) != 1 {
			t.Errorf("after the wave: %d SVIDs may still come from the tainted authority, want none; %d calls, want 1", n, len(r.server.since(since)))
		}
		for s := old; s == old; s = mustItem(t, r.cache, entryID(0)).SVID {
			r.sleepUntil(time.Now().Add(time.Second))
		}
		if s := mustItem(t, r.cache, entryID(0)).SVID; s.Authority != third.id || len(r.server.since(since)) != 1 {
			t.Errorf("the old SVID was replaced by one of %s after %d calls, want one of the third authority", s.Authority, len(r.server.since(since)))
		}
	})
}

// An authority is not settled while a postponed SVID depends on it.
func TestTaintIsNotSettledWhilePostponedSVIDsDependOnIt(t *testing.T) {
	var log strings.Builder
	const settled = "no X.509-SVID depends on the tainted authority"
	postponedOf(t, 2, &log, func(r *rig, _ *atomic.Int64, _ *cache.SVID) {
		begin, seen := time.Now().Add(wave.Delay(r.cfg.Seed, r.next.id, r.cfg.MaxDelay)), r.markNext(newCA(t, "third"))
		r.sleepUntil(begin.Add(25 * time.Millisecond)) // between the first and the second of the wave
		early := log.String()                          // before InFlight, whose lock orders it before what is logged later
		if n := r.renewer.InFlight(r.next.id, seen); n != 1 || strings.Contains(early, settled) {
			t.Errorf("%d of 2 are left, want 1, and not settled:\n%s", n, early)
		}
		r.sleepUntil(begin.Add(time.Second))
		if n := r.renewer.InFlight(r.next.id, seen); n != 0 || !strings.Contains(log.String(), settled) {
			t.Errorf("%d of 2 are left, want none, and settled:\n%s", n, log.String())
		}
	})
}

// If the clock was set meanwhile, the SVID that replaces the postponed one is used at
// once, and none is postponed then.
func TestPostponedSVIDIsDroppedWhenAnotherIsUsed(t *testing.T) {
	var skew atomic.Int64
	skewed(t, 1, &skew, new(strings.Builder), func(r *rig) {
		r.sleepUntil(time.Now().Add(6 * time.Minute))
		skew.Store(int64(-5 * time.Minute))
		r.server.set(func() { r.server.signer = r.next })
		for from := time.Now(); len(r.server.since(from)) == 0; {
			r.sleepUntil(time.Now().Add(time.Second))
		}
		third, from := newCA(t, "third"), time.Now()
		skew.Store(0)
		r.markNext(third)
		r.sleepUntil(from.Add(10 * time.Minute))
		if s := mustItem(t, r.cache, entryID(0)).SVID; s.Authority != third.id || len(r.server.since(from)) != 1 {
			t.Errorf("in use is an SVID of %s after %d calls, want one of the third after one", s.Authority, len(r.server.since(from)))
		}
	})
}

// Without a replacement an SVID of a tainted authority is better than none.
func TestPostponedSVIDOfATaintedAuthorityIsUsedInAnOutage(t *testing.T) {
	postponed(t, func(r *rig, _ *atomic.Int64, old *cache.SVID) {
		third := newCA(t, "third")
		r.server.set(func() { r.server.down = errors.New("connection refused") })
		since := time.Now()
		r.markNext(third)
		r.sleepUntil(old.NotAfter)
		if s := mustItem(t, r.cache, entryID(0)).SVID; s.Authority != r.next.id || !s.NotAfter.After(time.Now()) {
			t.Errorf("in use is an SVID of %s that is valid until %v", s.Authority, s.NotAfter)
		}
		if calls := len(r.server.since(since)); calls > 40*12 {
			t.Errorf("%d calls in an outage of %v", calls, time.Since(since))
		}
		r.server.set(func() { r.server.down = nil })
		r.sleepUntil(time.Now().Add(2 * time.Minute))
		if s := mustItem(t, r.cache, entryID(0)).SVID; s.Authority != third.id {
			t.Errorf("in use is an SVID of %s after the server recovered", s.Authority)
		}
	})
}

// In any history of rotations and outages on a node whose clock is behind, no SVID that
// is served has expired by the server's clock, and a settled authority stays settled: no
// SVID of it comes into use later.
func TestSettledStaysSettledBehindALaggingClock(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 1))
	const n = 4
	var skew atomic.Int64
	skewed(t, n, &skew, new(strings.Builder), func(r *rig) {
		time.Sleep(30 * time.Minute)
		skew.Store(-random.Int64N(int64(25 * time.Minute)))
		signer, old := r.ca, []authorityState(nil)
		settled := make(map[string]bool)
		var outage time.Time
		for minute := range 240 {
			if random.IntN(15) == 0 { // a rotation
				old = append(old, trusted(signer)...)
				for i := range old {
					if !old[i].tainted && random.IntN(2) == 0 {
						old[i].tainted, old[i].since = true, r.cfg.Now()
					}
				}
				signer = newCA(t, fmt.Sprint("ca", minute))
				r.server.set(func() { r.server.signer = signer })
				r.cache.SetBundle(snapshot(t, append(trusted(signer), old...)...))
			}
			if random.IntN(20) == 0 {
				outage = time.Now().Add(time.Duration(random.Int64N(int64(10 * time.Minute))))
			}
			r.server.set(func() {
				if r.server.down = nil; time.Now().Before(outage) {
					r.server.down = errors.New("connection refused")
				}
			})
			for range 12 {
				r.sleepUntil(time.Now().Add(5 * time.Second))
				for i := range n {
					if s := mustItem(t, r.cache, entryID(i)).SVID; s == nil || !s.NotAfter.After(time.Now()) {
						t.Fatalf("minute %d: the SVID in use has ended", minute)
					}
				}
				for _, a := range old {
					if !a.tainted {
						continue
					}
					held := r.renewer.InFlight(a.id, a.since) + r.cache.Held(a.id)
					if settled[a.id] && held > 0 {
						t.Fatalf("minute %d: %d SVIDs of an authority that was settled", minute, held)
					}
					settled[a.id] = held == 0
				}
			}
		}
		if calls := len(r.server.since(time.Time{})); calls > 240*12 {
			t.Errorf("%d calls in four hours", calls)
		}
	})
}
