package bundle_test

import (
	"crypto/elliptic"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
)

// Bundles that differ in one thing are not equal, and those that differ in none are.
func TestEqual(t *testing.T) {
	t.Parallel()
	a, other := newCA(t, "a", nil), newCA(t, "a", nil)
	second := newCA(t, "b", nil)
	keys := []any{newKey(t, elliptic.P256()).Public(), newKey(t, elliptic.P256()).Public()}
	ends := time.Now().Add(time.Hour)
	base := func() bundle.Content {
		return bundle.Content{
			Sequence: 3, RefreshHint: time.Minute,
			X509:    []bundle.X509Authority{{ID: "61", Certificate: a.cert}},
			JWT:     []bundle.JWTAuthority{{KeyID: "k", PublicKey: keys[0], ExpiresAt: ends}},
			LeftOut: []bundle.LeftOut{{Type: bundle.TypeUnknown, Reason: "it has no use"}},
		}
	}
	build := func(td spiffeid.TrustDomain, edit func(*bundle.Content)) *bundle.Bundle {
		c := base()
		edit(&c)
		b, err := bundle.New(td, c)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	same := func(*bundle.Content) {}
	b := build(td, same)
	if !b.Equal(build(td, same)) {
		t.Error("a bundle with the same content is not equal")
	}
	foreign := build(spiffeid.RequireTrustDomainFromString("other.test"), same)
	for name, o := range map[string]*bundle.Bundle{
		"none": nil, "trust domain": foreign,
		"sequence":            build(td, func(c *bundle.Content) { c.Sequence++ }),
		"refresh hint":        build(td, func(c *bundle.Content) { c.RefreshHint++ }),
		"left out":            build(td, func(c *bundle.Content) { c.LeftOut = nil }),
		"X.509 authority":     build(td, func(c *bundle.Content) { c.X509[0].Certificate = other.cert }),
		"its ID":              build(td, func(c *bundle.Content) { c.X509[0].ID = "62" }),
		"its mark":            build(td, func(c *bundle.Content) { c.X509[0].Tainted = true }),
		"one more of X.509":   build(td, func(c *bundle.Content) { c.AddX509(second.cert.Raw, false) }),
		"JWT authority":       build(td, func(c *bundle.Content) { c.JWT[0].PublicKey = keys[1] }),
		"its key ID":          build(td, func(c *bundle.Content) { c.JWT[0].KeyID = "l" }),
		"its expiry":          build(td, func(c *bundle.Content) { c.JWT[0].ExpiresAt = ends.Add(1) }),
		"its mark, JWT":       build(td, func(c *bundle.Content) { c.JWT[0].Tainted = true }),
		"one more JWT":        build(td, func(c *bundle.Content) { c.JWT = append(c.JWT, bundle.JWTAuthority{KeyID: "l", PublicKey: keys[1]}) }),
		"no JWT authority":    build(td, func(c *bundle.Content) { c.JWT = nil }),
		"a second left out":   build(td, func(c *bundle.Content) { c.AddX509(nil, false) }),
		"another certificate": build(td, func(c *bundle.Content) { c.X509 = []bundle.X509Authority{{Certificate: second.cert}} }),
	} {
		if b.Equal(o) || o.Equal(b) {
			t.Errorf("%s: another bundle is equal", name)
		}
	}
	if none := (*bundle.Bundle)(nil); !none.Equal(nil) {
		t.Error("no bundle is not equal to none")
	}
}

// A published bundle has a time for each taint mark: that of the first bundle with it. A
// mark that was withdrawn and comes back is new.
func TestTaintedSinceIsTheFirstTimeOfEachMark(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		auth := []bundle.X509Authority{{Certificate: newCA(t, "a", nil).cert}, {Certificate: newCA(t, "b", nil).cert}, {Certificate: newCA(t, "c", nil).cert}}
		marked := func(seq uint64, which ...int) *bundle.Bundle {
			all := slices.Clone(auth)
			for _, i := range which {
				all[i].Tainted = true
			}
			return newBundle(t, seq, all...)
		}
		src := &source{own: marked(1)}
		refreshing(t, bundle.RefresherConfig{}, src, func(_ *bundle.Refresher, published func() []*bundle.Snapshot) {
			since := make([]time.Time, len(auth))
			for i, which := range [][]int{{1}, {1, 2}, {2}, {1, 2}} {
				time.Sleep(time.Minute)
				at := time.Now()
				src.set(marked(uint64(i+2), which...), nil)
				time.Sleep(6 * time.Second)
				for k := range auth {
					id := bundle.AuthorityID(auth[k].Certificate)
					state, seen := last(published).State(id)
					if !slices.Contains(which, k) {
						if state != bundle.Trusted || !seen.IsZero() {
							t.Errorf("%v: authority %d is %v since %v", which, k, state, seen)
						}
						since[k] = time.Time{}
						continue
					}
					if state != bundle.Tainted || since[k].IsZero() && seen.Before(at) || !since[k].IsZero() && !seen.Equal(since[k]) {
						t.Errorf("%v: authority %d is %v since %v, before since %v", which, k, state, seen, since[k])
					}
					since[k] = seen
				}
			}
			if state, _ := last(published).State("64"); state != bundle.Removed || state.String() != "removed" {
				t.Errorf("an unknown authority is %v", state)
			}
		})
	})
}

// Pending are the federated trust domains that the server has said nothing about.
func TestPending(t *testing.T) {
	t.Parallel()
	known, without, other := spiffeid.RequireTrustDomainFromString("known.test"), spiffeid.RequireTrustDomainFromString("without.test"), spiffeid.RequireTrustDomainFromString("other.test")
	s := &bundle.Snapshot{
		Own:       newBundle(t, 1, bundle.X509Authority{Certificate: newCA(t, "a", nil).cert}),
		Federated: map[spiffeid.TrustDomain]*bundle.Bundle{known: foreignBundle(t, known, 1, "f")},
		NotFound:  map[spiffeid.TrustDomain]bool{without: true},
	}
	for of, want := range map[spiffeid.TrustDomain]bool{td: false, known: false, without: false, other: true} {
		if got := s.Pending(of); got != want {
			t.Errorf("%v: pending is %v, want %v", of, got, want)
		}
	}
}
