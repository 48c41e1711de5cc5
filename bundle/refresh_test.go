package bundle_test

import (
	"context"
	"errors"
	"math"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
)

// source answers refreshes with what it is set to.
type source struct {
	mu        sync.Mutex
	own       *bundle.Bundle
	err       error
	federated map[spiffeid.TrustDomain]*bundle.Bundle
	asked     []time.Time
	askedFed  int
}

func (s *source) FetchBundle(context.Context) (*bundle.Bundle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = append(s.asked, time.Now())
	return s.own, s.err
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

func TestRefreshPublishesOnlyChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newCA(t, "a", nil), newCA(t, "b", nil)
		src := &source{own: newBundle(t, 1, bundle.X509Authority{Certificate: a.cert})}
		refreshing(t, bundle.RefresherConfig{}, src, func(_ *bundle.Refresher, published func() []*bundle.Snapshot) {
			time.Sleep(10 * time.Minute)
			if n := len(published()); n != 1 {
				t.Fatalf("%d snapshots published for one unchanging bundle", n)
			}
			// 5 s ±10 %, drawn anew: never outside, and not always the same.
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

// A replica that lags must not take a taint back, but a restored data store
// must be followed in the end.
func TestOlderBundleIsFollowedOnlyWhenItStays(t *testing.T) {
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

func TestFederatedBundlesFollowWhatIsWanted(t *testing.T) {
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
			if got := published(); len(got) != 2 || got[1].Federated[other] == nil || len(got[1].Federated) != 1 {
				t.Fatalf("a newly wanted bundle is not there after one refresh: %d snapshots", len(got))
			}
			time.Sleep(5 * time.Minute)
			if n := len(published()); n != 2 || src.askedFed > 14 {
				t.Errorf("%d snapshots and %d questions for two federated bundles in five minutes", n, src.askedFed)
			}
			want()
			time.Sleep(6 * time.Second)
			if got := published(); len(got) != 3 || len(got[2].Federated) != 0 {
				t.Error("a bundle that is no longer wanted was kept")
			}
		})
	})
}

// slowPartners is a source whose federated bundles come late or not at all.
type slowPartners struct {
	*source
	hang  time.Duration
	fails int // that many times
}

func (s *slowPartners) FetchFederatedBundle(ctx context.Context, td spiffeid.TrustDomain) (*bundle.Bundle, error) {
	s.mu.Lock()
	hang, fail := s.hang, s.fails > 0
	s.fails--
	s.mu.Unlock()
	time.Sleep(hang)
	if hang > 0 || fail {
		return nil, errors.New("no answer")
	}
	return s.source.FetchFederatedBundle(ctx, td)
}

// What is asked of the server about others does not keep the own bundle waiting,
// and one that could not be had at first is asked for again soon.
func TestFederatedBundlesDoNotHoldUpTheOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newCA(t, "a", nil)
		partners := map[spiffeid.TrustDomain]*bundle.Bundle{}
		var wanted []spiffeid.TrustDomain
		for _, name := range []string{"one.test", "two.test", "three.test", "four.test", "five.test"} {
			td := spiffeid.RequireTrustDomainFromString(name)
			b, err := bundle.New(td, bundle.Content{X509: []bundle.X509Authority{{Certificate: newCA(t, name, nil).cert}}})
			if err != nil {
				t.Fatal(err)
			}
			partners[td], wanted = b, append(wanted, td)
		}
		src := &slowPartners{source: &source{own: newBundle(t, 1, bundle.X509Authority{Certificate: a.cert}), federated: partners}}
		src.hang = 30 * time.Second
		refreshing(t, bundle.RefresherConfig{Federated: func() []spiffeid.TrustDomain { return wanted }}, src, func(_ *bundle.Refresher, published func() []*bundle.Snapshot) {
			if n := len(published()); n != 1 {
				t.Fatalf("%d snapshots while the others are asked for, want the own bundle", n)
			}
			for seq := uint64(2); seq < 12; seq++ {
				time.Sleep(7 * time.Second)
				src.set(newBundle(t, seq, bundle.X509Authority{Certificate: a.cert}), nil)
				time.Sleep(36 * time.Second) // one of the others, and the interval
				if got := published(); got[len(got)-1].Own.Sequence() != seq {
					t.Errorf("after %v of 36 s the own bundle has sequence %d, want %d", 36*time.Second, got[len(got)-1].Own.Sequence(), seq)
				}
			}
			src.mu.Lock()
			src.hang, src.fails = 0, len(wanted)
			src.mu.Unlock()
			time.Sleep(75 * time.Second) // each hung for 30 s, and waits as long
			if got := published(); len(got[len(got)-1].Federated) != len(wanted) {
				t.Errorf("%d of %d federated bundles after the server was well again", len(got[len(got)-1].Federated), len(wanted))
			}
		})
	})
}
