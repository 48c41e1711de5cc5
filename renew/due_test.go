package renew_test

import (
	"crypto/rand"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/renew"
)

func TestNewNeedsCacheAndMinter(t *testing.T) {
	for name, cfg := range map[string]renew.Config{
		"no cache":  {Minter: &fakeServer{}},
		"no minter": {Cache: cache.New(cache.Config{})},
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", name)
				}
			}()
			renew.New(cfg)
		}()
	}
}

func TestDue(t *testing.T) {
	ca := newCA(t, "a")
	other := newCA(t, "b")
	now := time.Now()
	half := now.Add(time.Hour)
	policy := renew.Policy{Delay: func(string) time.Duration { return 30 * time.Second }}
	entry := &cache.Entry{ID: "e", Revision: 2, X509TTL: 2 * time.Hour}
	held := func(mutate func(*cache.SVID)) *cache.SVID {
		s := &cache.SVID{EntryID: "e", Revision: 2, Authority: ca.id, RenewAt: half, NotAfter: now.Add(2 * time.Hour)}
		if mutate != nil {
			mutate(s)
		}
		return s
	}
	seen := now.Add(-10 * time.Second)
	for _, tt := range []struct {
		name   string
		svid   *cache.SVID
		cas    []authorityState
		at     time.Time
		want   time.Time
		reason renew.Reason
	}{
		{"none held", nil, trusted(ca), now, time.Time{}, renew.ReasonFirst},
		{"half-life ahead", held(nil), trusted(ca), now, half, renew.ReasonHalfLife},
		{"half-life passed", held(nil), trusted(ca), half.Add(1), half, renew.ReasonHalfLife},
		{"entry changed", held(func(s *cache.SVID) { s.Revision = 1 }), trusted(ca), now, time.Time{}, renew.ReasonEntry},
		{"entry changed in what no SVID has", held(func(s *cache.SVID) { s.Revision, s.TTL = 1, 2*time.Hour }), trusted(ca), now, half, renew.ReasonHalfLife},
		{"authority gone", held(nil), trusted(other), now, time.Time{}, renew.ReasonRemoved},
		{"tainted", held(nil), tainted(seen, ca), now, seen.Add(30 * time.Second), renew.ReasonTaint},
		{"another authority tainted", held(nil), append(tainted(seen, other), trusted(ca)...), now, half, renew.ReasonHalfLife},
		{"tainted, half-life before the delay is over", held(func(s *cache.SVID) { s.RenewAt = now.Add(5 * time.Second) }),
			tainted(seen, ca), now, now.Add(5 * time.Second), renew.ReasonHalfLife},
		{"tainted, half-life passes in the queue", held(nil), tainted(seen, ca), half, half, renew.ReasonHalfLife},
		{"tainted, clock set back before the mark", held(nil), tainted(now.Add(time.Hour), ca), now, now, renew.ReasonTaint},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, reason := renew.Due(cache.Item{Entry: entry, SVID: tt.svid}, snapshot(t, tt.cas...), policy, tt.at)
			if !got.Equal(tt.want) || reason != tt.reason {
				t.Errorf("Due = %v, %v; want %v, %v", got, reason, tt.want, tt.reason)
			}
		})
	}
}

// No SVID may be due later than its half-life, whatever the marks:
// taint and clock can only make it earlier.
func TestDueNeverAfterHalfLife(t *testing.T) {
	ca := newCA(t, "a")
	base := time.Now()
	rapid.Check(t, func(rt *rapid.T) {
		offset := func(label string) time.Duration {
			return time.Duration(rapid.Int64Range(-int64(48*time.Hour), int64(48*time.Hour)).Draw(rt, label))
		}
		svid := &cache.SVID{Authority: ca.id, RenewAt: base.Add(offset("half")), NotAfter: base.Add(96 * time.Hour)}
		delay := time.Duration(rapid.Int64Range(0, int64(time.Minute)).Draw(rt, "delay"))
		states := trusted(ca)
		if rapid.Bool().Draw(rt, "tainted") {
			states = tainted(base.Add(offset("seen")), ca)
		}
		when, reason := renew.Due(cache.Item{Entry: &cache.Entry{}, SVID: svid}, snapshot(t, states...),
			renew.Policy{Delay: func(string) time.Duration { return delay }}, base.Add(offset("now")))
		if when.After(svid.RenewAt) {
			rt.Fatalf("due at %v (%s), after its half-life %v", when, reason, svid.RenewAt)
		}
	})
}

func TestRenewAtIsAroundHalfLife(t *testing.T) {
	from := time.Unix(0, 0)
	to := from.Add(time.Hour)
	for f, want := range map[float64]time.Duration{0: 27 * time.Minute, 0.5: 30 * time.Minute, 0.999999: 33 * time.Minute} {
		got := renew.RenewAt(from, to, f).Sub(from)
		if (got - want).Abs() > time.Second {
			t.Errorf("RenewAt(%v) = %v into an hour, want %v", f, got, want)
		}
	}
}

func randomSerial(t testing.TB) []byte {
	t.Helper()
	b := make([]byte, 16)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return b
}
