package bundle_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
)

// partners is a source of federated bundles, each of which may be slow, hang or fail.
type partners struct {
	*source
	answer func(ctx context.Context, td spiffeid.TrustDomain) error // nil: as the source has it
	now    atomic.Int64                                             // requests under way
	most   atomic.Int64
}

func (p *partners) FetchFederatedBundle(ctx context.Context, td spiffeid.TrustDomain) (*bundle.Bundle, error) {
	n := p.now.Add(1)
	defer p.now.Add(-1)
	for most := p.most.Load(); n > most && !p.most.CompareAndSwap(most, n); most = p.most.Load() {
	}
	if err := p.answer(ctx, td); err != nil {
		return nil, err
	}
	return p.source.FetchFederatedBundle(ctx, td)
}

// hang waits for as long as the caller does.
func hang(ctx context.Context) error {
	<-ctx.Done()
	return ctx.Err()
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// certs are the authorities of foreign bundles, by name.
var certs sync.Map

func foreignBundle(t testing.TB, td spiffeid.TrustDomain, seq uint64, names ...string) *bundle.Bundle {
	t.Helper()
	c := bundle.Content{Sequence: seq}
	for _, name := range names {
		cert, ok := certs.Load(name)
		if !ok {
			cert, _ = certs.LoadOrStore(name, newCA(t, name, nil).cert)
		}
		c.X509 = append(c.X509, bundle.X509Authority{Certificate: cert.(*x509.Certificate)})
	}
	b, err := bundle.New(td, c)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// newPartners returns a source of n federated bundles, and their trust domains.
func newPartners(t testing.TB, n int) (*partners, []spiffeid.TrustDomain) {
	p := &partners{
		source: &source{own: newBundle(t, 1, bundle.X509Authority{Certificate: newCA(t, "own", nil).cert}), federated: map[spiffeid.TrustDomain]*bundle.Bundle{}},
		answer: func(context.Context, spiffeid.TrustDomain) error { return nil },
	}
	tds := make([]spiffeid.TrustDomain, n)
	for i := range tds {
		tds[i] = spiffeid.RequireTrustDomainFromString(fmt.Sprintf("p%03d.test", i))
		p.federated[tds[i]] = foreignBundle(t, tds[i], 1, "f")
	}
	return p, tds
}

func (p *partners) setFederated(td spiffeid.TrustDomain, b *bundle.Bundle) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.federated[td] = b
}

func last(published func() []*bundle.Snapshot) *bundle.Snapshot {
	got := published()
	return got[len(got)-1]
}

// A taint mark in the own bundle does not wait for federated bundles.
func TestFederatedBundlesDoNotDelayTheOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, wanted := newPartners(t, 5)
		src.answer = func(ctx context.Context, _ spiffeid.TrustDomain) error { return hang(ctx) }
		cfg := bundle.RefresherConfig{Federated: func() []spiffeid.TrustDomain { return wanted }}
		refreshing(t, cfg, src, func(_ *bundle.Refresher, published func() []*bundle.Snapshot) {
			a := src.own.X509()[0]
			for seq := uint64(2); seq < 12; seq++ {
				time.Sleep(17 * time.Second)
				a.Tainted = !a.Tainted
				src.set(newBundle(t, seq, a), nil)
				time.Sleep(5500 * time.Millisecond)
				if got := last(published).Own; got.Sequence() != seq || got.X509()[0].Tainted != a.Tainted {
					t.Errorf("after an interval the own bundle has sequence %d, want %d", got.Sequence(), seq)
				}
			}
		})
	})
}

// With 200 federated trust domains of which a third hangs, the others are as new as the
// own bundle, and the server never gets more than a few requests at a time. Those that
// hang are refreshed when they recover.
func TestHangingFederatedBundlesDelayNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, wanted := newPartners(t, 200)
		slow := func(td spiffeid.TrustDomain) bool { return slices.Index(wanted, td)%3 == 0 }
		var well atomic.Bool
		src.answer = func(ctx context.Context, td spiffeid.TrustDomain) error {
			if slow(td) && !well.Load() {
				return hang(ctx)
			}
			return pause(ctx, 20*time.Millisecond)
		}
		cfg := bundle.RefresherConfig{Federated: func() []spiffeid.TrustDomain { return wanted }}
		refreshing(t, cfg, src, func(_ *bundle.Refresher, published func() []*bundle.Snapshot) {
			time.Sleep(7 * time.Second) // of the 67 that hang, 16 at a time take a second
			quick := 200 - 67
			if n := len(last(published).Federated); n != quick {
				t.Fatalf("%d bundles of the %d trust domains that answer", n, quick)
			}
			for seq := uint64(2); seq < 4; seq++ {
				time.Sleep(20 * time.Second)
				for _, td := range wanted {
					src.setFederated(td, foreignBundle(t, td, seq, "f"))
				}
				time.Sleep(6 * time.Second)
				late := 0
				for td, b := range last(published).Federated {
					if !slow(td) && b.Sequence() != seq {
						late++
					}
				}
				if late > 0 {
					t.Errorf("sequence %d: %d of %d bundles are older after an interval", seq, late, quick)
				}
			}
			well.Store(true)
			time.Sleep(time.Minute)
			if n := len(last(published).Federated); n != len(wanted) {
				t.Errorf("%d of %d bundles a minute after all have recovered", n, len(wanted))
			}
			if most := src.most.Load(); most > 32 {
				t.Errorf("%d requests at a time", most)
			}
		})
	})
}

// A slow server gets the time that it needs.
func TestSlowFederatedBundles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, wanted := newPartners(t, 30)
		src.answer = func(ctx context.Context, _ spiffeid.TrustDomain) error { return pause(ctx, 3*time.Second) }
		cfg := bundle.RefresherConfig{Federated: func() []spiffeid.TrustDomain { return wanted }}
		refreshing(t, cfg, src, func(_ *bundle.Refresher, published func() []*bundle.Snapshot) {
			time.Sleep(10 * time.Second) // a second in vain, and then 16 at a time
			if n := len(last(published).Federated); n != len(wanted) {
				t.Errorf("%d of %d bundles", n, len(wanted))
			}
		})
	})
}

// A federated bundle is as new as the own one: a removed key is trusted no longer than
// one of the own bundle.
func TestFederatedBundleIsAsNewAsTheOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, wanted := newPartners(t, 1)
		cfg := bundle.RefresherConfig{Federated: func() []spiffeid.TrustDomain { return wanted }}
		refreshing(t, cfg, src, func(_ *bundle.Refresher, published func() []*bundle.Snapshot) {
			time.Sleep(11 * time.Minute)
			for _, seq := range []uint64{2, 0, 0, 3} { // zero: unknown, and so as new as can be
				next := foreignBundle(t, wanted[0], seq, "g", "h")
				src.setFederated(wanted[0], next)
				time.Sleep(5500 * time.Millisecond)
				if got := last(published).Federated[wanted[0]]; !got.Equal(next) {
					t.Errorf("after an interval the bundle has sequence %d, want %d", got.Sequence(), seq)
				}
			}
		})
	})
}

// An answer without the federated bundle, or with an older one, is applied after a minute
// of such answers: a replica may lag.
func TestWithdrawalHasToStay(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("p000.test")
	for name, back := range map[string]*bundle.Bundle{"none": nil, "older": foreignBundle(t, td, 6, "old")} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				src, wanted := newPartners(t, 1)
				newest := foreignBundle(t, td, 7, "new")
				src.federated[td] = newest
				var failing atomic.Bool
				src.answer = func(context.Context, spiffeid.TrustDomain) error {
					if failing.Load() {
						return errors.New("no answer")
					}
					return nil
				}
				cfg := bundle.RefresherConfig{Federated: func() []spiffeid.TrustDomain { return wanted }}
				refreshing(t, cfg, src, func(_ *bundle.Refresher, published func() []*bundle.Snapshot) {
					for range 10 {
						time.Sleep(7 * time.Second)
						src.setFederated(td, back)
						time.Sleep(30 * time.Second)
						src.setFederated(td, newest)
					}
					time.Sleep(6 * time.Second)
					// Between two such answers there is an outage.
					src.setFederated(td, back)
					time.Sleep(6 * time.Second)
					failing.Store(true)
					time.Sleep(10 * time.Minute)
					failing.Store(false)
					time.Sleep(6 * time.Second)
					if got := published(); len(got) != 2 || !got[1].Federated[td].Equal(newest) {
						t.Fatalf("%d snapshots while a replica lags, want that of the own bundle and that of the federated one", len(got))
					}
					time.Sleep(70 * time.Second)
					got := last(published)
					if b := got.Federated[td]; back == nil && (b != nil || !got.NotFound[td]) || back != nil && !back.Equal(b) {
						t.Errorf("after a minute of the same answer there is %v, not found %v", b, got.NotFound[td])
					}
					src.setFederated(td, newest)
					time.Sleep(6 * time.Second)
					if got := last(published); !got.Federated[td].Equal(newest) || len(got.NotFound) > 0 {
						t.Errorf("the bundle that is back is not applied at once: %v", got)
					}
				})
			})
		})
	}
}

// A bundle kept over a restart is published from the start and refreshed at once. It is
// dropped when it is no longer wanted. The own trust domain is never requested this way.
func TestKeptFederatedBundles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, wanted := newPartners(t, 2)
		kept := map[spiffeid.TrustDomain]*bundle.Bundle{}
		for _, td := range wanted {
			kept[td] = foreignBundle(t, td, 1, "kept")
		}
		var want atomic.Pointer[[]spiffeid.TrustDomain]
		all := append([]spiffeid.TrustDomain{td}, wanted...)
		want.Store(&all)
		asked := map[spiffeid.TrustDomain]int{}
		src.answer = func(ctx context.Context, of spiffeid.TrustDomain) error {
			src.mu.Lock()
			asked[of]++
			src.mu.Unlock()
			return pause(ctx, time.Millisecond)
		}
		for _, initial := range []*bundle.Bundle{nil, src.own} {
			clear(asked)
			want.Store(&all)
			cfg := bundle.RefresherConfig{Initial: initial, InitialFederated: kept, Federated: func() []spiffeid.TrustDomain { return *want.Load() }}
			refreshing(t, cfg, src, func(_ *bundle.Refresher, published func() []*bundle.Snapshot) {
				if got := published()[0].Federated; !maps.EqualFunc(got, kept, (*bundle.Bundle).Equal) {
					t.Errorf("the first snapshot has %v", got)
				}
				time.Sleep(time.Second)
				if got := last(published).Federated; !maps.EqualFunc(got, src.federated, (*bundle.Bundle).Equal) {
					t.Errorf("what the server has now is not there after a second: %v", got)
				}
				one := wanted[:1]
				want.Store(&one)
				time.Sleep(6 * time.Second)
				if got := last(published).Federated; len(got) != 1 || got[wanted[0]] == nil {
					t.Errorf("of two bundles, one of which is wanted, there are %d", len(got))
				}
			})
			if asked[td] > 0 || asked[wanted[0]] == 0 {
				t.Errorf("asked %v", asked)
			}
		}
	})
}
