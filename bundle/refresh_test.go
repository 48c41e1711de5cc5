package bundle_test

import (
	"context"
	"errors"
	"math"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
)

// source is a Fetcher with settable answers.
type source struct {
	mu        sync.Mutex
	own       *bundle.Bundle
	err       error
	federated map[spiffeid.TrustDomain]*bundle.Bundle
	asked     []time.Time
	latency   time.Duration
	askedFed  int
}

func (s *source) FetchBundle(context.Context) (*bundle.Bundle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = append(s.asked, time.Now())
	own, err, latency := s.own, s.err, s.latency
	s.mu.Unlock()
	time.Sleep(latency)
	s.mu.Lock()
	return own, err
}

// since waits for all goroutines and returns the times of the requests for the own bundle
// at t or later.
func (s *source) since(t time.Time) []time.Time {
	synctest.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.asked, func(at time.Time) bool { return !at.Before(t) })
	if i < 0 {
		return nil
	}
	return slices.Clone(s.asked[i:])
}

func (s *source) setLatency(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.latency = d
}

func (s *source) FetchFederatedBundle(_ context.Context, td spiffeid.TrustDomain) (*bundle.Bundle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.askedFed++
	if b := s.federated[td]; b != nil {
		return b, nil
	}
	return nil, bundle.ErrNotFound
}

func (s *source) set(b *bundle.Bundle, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.own, s.err = b, err
}

// refreshing runs f beside a Refresher over src and returns what f published.
func refreshing(t *testing.T, cfg bundle.RefresherConfig, src bundle.Fetcher, f func(r *bundle.Refresher, published func() []*bundle.Snapshot)) {
	t.Helper()
	var mu sync.Mutex
	var got []*bundle.Snapshot
	cfg.Fetcher = src
	cfg.Publish = func(s *bundle.Snapshot) {
		mu.Lock()
		defer mu.Unlock()
		got = append(got, s)
	}
	r := bundle.NewRefresher(cfg)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	f(r, func() []*bundle.Snapshot {
		synctest.Wait()
		mu.Lock()
		defer mu.Unlock()
		return got
	})
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
}

func TestRefresherNeedsFetcherAndPublish(t *testing.T) {
	for name, cfg := range map[string]bundle.RefresherConfig{
		"no fetcher": {Publish: func(*bundle.Snapshot) {}},
		"no publish": {Fetcher: &source{}},
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", name)
				}
			}()
			bundle.NewRefresher(cfg)
		}()
	}
}

func TestRefreshPublishesOnlyChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newCA(t, "a", nil), newCA(t, "b", nil)
		src := &source{own: newBundle(t, 1, bundle.X509Authority{Certificate: a.cert})}
		refreshing(t, bundle.RefresherConfig{}, src, func(_ *bundle.Refresher, published func() []*bundle.Snapshot) {
			time.Sleep(10 * time.Minute)
			if n := len(published()); n != 1 {
				t.Fatalf("%d snapshots published for one unchanging bundle", n)
			}
			// 5 s ±10 %, drawn each time: never outside, and not always the same.
			lo, hi := time.Duration(math.MaxInt64), time.Duration(0)
			for i := 1; i < len(src.asked); i++ {
				d := src.asked[i].Sub(src.asked[i-1])
				lo, hi = min(lo, d), max(hi, d)
			}
			if lo < 4500*time.Millisecond || hi > 5500*time.Millisecond || hi-lo < 200*time.Millisecond {
				t.Errorf("refreshed every %v to %v, want 5 s ±10 %%", lo, hi)
			}
			marked := time.Now()
			src.set(newBundle(t, 2, bundle.X509Authority{Certificate: a.cert, Tainted: true}, bundle.X509Authority{Certificate: b.cert}), nil)
			time.Sleep(6 * time.Second)
			seen := published()[1].Own.X509()[0].TaintedSince
			if seen.Before(marked) || seen.Sub(marked) > 6*time.Second {
				t.Errorf("mark made at %v is seen at %v", marked, seen)
			}
			src.set(newBundle(t, 3, bundle.X509Authority{Certificate: a.cert, Tainted: true}), nil)
			time.Sleep(6 * time.Second)
			if again := published()[2].Own.X509()[0].TaintedSince; !again.Equal(seen) {
				t.Errorf("the time of the mark moved from %v to %v with an unrelated change", seen, again)
			}
		})
	})
}

func TestRefreshFailureKeepsTheBundle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newCA(t, "a", nil)
		src := &source{own: newBundle(t, 1, bundle.X509Authority{Certificate: a.cert})}
		outcomes := map[string]int{}
		cfg := bundle.RefresherConfig{Observe: func(o string, _ *bundle.Bundle) { outcomes[o]++ }}
		refreshing(t, cfg, src, func(r *bundle.Refresher, published func() []*bundle.Snapshot) {
			time.Sleep(time.Second)
			src.set(nil, errors.New("broken DER"))
			time.Sleep(time.Minute)
			if n := len(published()); n != 1 {
				t.Errorf("%d snapshots published, want the first only", n)
			}
			src.set(newBundle(t, 2, bundle.X509Authority{Certificate: a.cert, Tainted: true}), nil)
			r.Refresh()
			if n := len(published()); n != 2 {
				t.Errorf("%d snapshots right after Refresh, want 2", n)
			}
		})
		if outcomes[bundle.OutcomeApplied] != 2 || outcomes[bundle.OutcomeFailed] < 10 {
			t.Errorf("outcomes %v", outcomes)
		}
	})
}

// Repeated calls of Refresh cost the server hardly more than the polls do. The first one
// is served at once, and none is lost.
func TestRefreshHasAMinimumInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newCA(t, "a", nil)
		src := &source{own: newBundle(t, 1, bundle.X509Authority{Certificate: a.cert})}
		cfg := bundle.RefresherConfig{Interval: time.Hour}
		refreshing(t, cfg, src, func(r *bundle.Refresher, published func() []*bundle.Snapshot) {
			time.Sleep(10 * time.Minute)
			first := time.Now()
			for time.Since(first) < 59*time.Second {
				r.Refresh()
				time.Sleep(30 * time.Millisecond)
			}
			got := src.since(first)
			if len(got) != 12 || !got[0].Equal(first) {
				t.Fatalf("asked for %d times in a minute (%v), want at once and then every 5 s", len(got), got)
			}
			for i := 1; i < len(got); i++ {
				if d := got[i].Sub(got[i-1]); d != 5*time.Second {
					t.Errorf("asked for again after %v", d)
				}
			}
			// The last call is not lost: it is served when the interval has passed.
			src.set(newBundle(t, 2, bundle.X509Authority{Certificate: a.cert, Tainted: true}), nil)
			time.Sleep(5 * time.Second)
			if n := len(published()); n != 2 {
				t.Errorf("%d snapshots, want the one that was asked for last", n)
			}
			time.Sleep(time.Minute)
			src.setLatency(time.Second)
			asking := time.Now()
			r.Refresh()
			synctest.Wait()
			r.Refresh() // on the way of the answer to the first
			time.Sleep(10 * time.Second)
			if got := src.since(asking); len(got) != 2 {
				t.Errorf("asked for %d times, want one more for the call while an answer was in flight", len(got))
			}
		})
	})
}

// A replica that lags must not withdraw a taint mark, but the bundle of a restored data
// store must be applied after a minute.
func TestOlderBundleIsAppliedOnlyAfterAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newCA(t, "a", nil)
		older := newBundle(t, 7, bundle.X509Authority{Certificate: a.cert})
		newer := newBundle(t, 8, bundle.X509Authority{Certificate: a.cert, Tainted: true})
		src := &source{own: newer}
		refreshing(t, bundle.RefresherConfig{}, src, func(_ *bundle.Refresher, published func() []*bundle.Snapshot) {
			for range 20 { // it flaps for minutes
				time.Sleep(7 * time.Second)
				src.set(older, nil)
				time.Sleep(20 * time.Second)
				src.set(newer, nil)
			}
			if n := len(published()); n != 1 {
				t.Fatalf("a flapping replica led to %d snapshots", n)
			}
			time.Sleep(6 * time.Second)
			src.set(older, nil)
			time.Sleep(50 * time.Second)
			if n := len(published()); n != 1 {
				t.Fatalf("an older bundle was followed after 50 s")
			}
			time.Sleep(30 * time.Second)
			if got := published(); len(got) != 2 || got[1].Own.Sequence() != 7 {
				t.Errorf("an older bundle that stays was not followed")
			}
		})
	})
}

// Of the time between two answers at most two intervals count, and a minute of it is
// enough.
func TestMinuteOfSlowOlderAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newCA(t, "a", nil)
		src := &source{own: newBundle(t, 8, bundle.X509Authority{Certificate: a.cert})}
		var answers []string
		cfg := bundle.RefresherConfig{Observe: func(outcome string, _ *bundle.Bundle) { answers = append(answers, outcome) }}
		refreshing(t, cfg, src, func(_ *bundle.Refresher, published func() []*bundle.Snapshot) {
			time.Sleep(time.Second)
			src.set(newBundle(t, 7, bundle.X509Authority{Certificate: a.cert}), nil)
			src.setLatency(20 * time.Second)
			time.Sleep(5 * time.Minute)
			published()
			// The first is the answer before, and each after the second counts 10 s.
			if i := slices.Index(answers[1:], bundle.OutcomeApplied); i != 6 {
				t.Errorf("the outcomes are %v, want the seventh older answer applied", answers)
			}
		})
	})
}

func TestInitialKeepsTheTimeOfTheMark(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newCA(t, "a", nil)
		since := time.Now().Add(-time.Hour).Round(0)
		src := &source{own: newBundle(t, 1, bundle.X509Authority{Certificate: a.cert, Tainted: true})}
		cfg := bundle.RefresherConfig{Initial: newBundle(t, 1, bundle.X509Authority{Certificate: a.cert, Tainted: true, TaintedSince: since})}
		refreshing(t, cfg, src, func(_ *bundle.Refresher, published func() []*bundle.Snapshot) {
			time.Sleep(time.Minute)
			got := published()
			if len(got) != 1 || !got[0].Own.X509()[0].TaintedSince.Equal(since) {
				t.Errorf("published %d snapshots, the first with the mark at %v; want one at %v", len(got), got[0].Own.X509()[0].TaintedSince, since)
			}
		})
	})
}

func TestOnlyWantedFederatedBundlesAreFollowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newCA(t, "a", nil)
		other := spiffeid.RequireTrustDomainFromString("other.test")
		foreign, err := bundle.New(other, bundle.Content{X509: []bundle.X509Authority{{Certificate: newCA(t, "f", nil).cert}}})
		if err != nil {
			t.Fatal(err)
		}
		src := &source{own: newBundle(t, 1, bundle.X509Authority{Certificate: a.cert}), federated: map[spiffeid.TrustDomain]*bundle.Bundle{other: foreign}}
		var mu sync.Mutex
		var wanted []spiffeid.TrustDomain
		want := func(tds ...spiffeid.TrustDomain) {
			mu.Lock()
			defer mu.Unlock()
			wanted = tds
		}
		cfg := bundle.RefresherConfig{Federated: func() []spiffeid.TrustDomain {
			mu.Lock()
			defer mu.Unlock()
			return wanted
		}}
		refreshing(t, cfg, src, func(_ *bundle.Refresher, published func() []*bundle.Snapshot) {
			time.Sleep(20 * time.Second)
			want(other, spiffeid.RequireTrustDomainFromString("unknown.test"))
			time.Sleep(6 * time.Second)
			before := len(published())
			if got := last(published); got.Federated[other] == nil || len(got.Federated) != 1 || len(got.NotFound) != 1 {
				t.Fatalf("a newly wanted bundle is not there after one refresh: %v", got)
			}
			time.Sleep(5 * time.Minute)
			// Two bundles, as often as the own one.
			if n := len(published()) - before; n != 0 || src.askedFed < 2*54 || src.askedFed > 2*70 {
				t.Errorf("%d more snapshots and %d requests for two federated bundles in five minutes", n, src.askedFed)
			}
			want()
			time.Sleep(6 * time.Second)
			if got := last(published); len(got.Federated)+len(got.NotFound) != 0 {
				t.Error("a bundle that is no longer wanted was kept")
			}
		})
	})
}
