package cache_test

import (
	"errors"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
)

// The trust domains that entries federate with are listed for as long as one entry does,
// and pending until the server has answered for each.
func TestFederation(t *testing.T) {
	t.Parallel()
	p, q, r := spiffeid.RequireTrustDomainFromString("p.test"), spiffeid.RequireTrustDomainFromString("q.test"), spiffeid.RequireTrustDomainFromString("r.test")
	with := func(id string, tds ...spiffeid.TrustDomain) *cache.Entry {
		e := entry(id, id)
		e.FederatesWith = tds
		return e
	}
	c := cache.New(cache.Config{})
	check := func(when string, pending bool, want ...spiffeid.TrustDomain) {
		t.Helper()
		if got := c.FederatesWith(); !slices.Equal(got, want) {
			t.Errorf("%s: federates with %v, want %v", when, got, want)
		}
		if got := c.BundlesPending(); got != pending {
			t.Errorf("%s: pending is %v, want %v", when, got, pending)
		}
	}
	check("without entries", false)
	c.Update([]*cache.Entry{with("a", q, p), with("b", q), with("c")}, nil)
	check("without a bundle", false, p, q)
	s := snapshot(t)
	s.Federated = map[spiffeid.TrustDomain]*bundle.Bundle{p: s.Own}
	c.SetBundle(s)
	check("one of two is there", true, p, q)
	for selector, pending := range map[string]bool{"a": true, "b": true, "c": false} {
		if v := c.Match(sel(selector)); v.BundlesPending != pending {
			t.Errorf("for a caller of %s, pending is %v", selector, v.BundlesPending)
		}
	}
	if v := c.Match(sel("a", "b", "c")); !v.BundlesPending {
		t.Error("for a caller of all, none is pending")
	}
	next := *s
	next.NotFound = map[spiffeid.TrustDomain]bool{q: true}
	c.SetBundle(&next)
	check("there is none of the other", false, p, q)
	c.Update([]*cache.Entry{with("a", r)}, nil)
	check("edited", true, q, r)
	c.Update(nil, []string{"a"})
	check("one of two entries is deleted", false, q)
	c.Update(nil, []string{"b"})
	check("the other one, too", false)
}

// What signed which SVIDs, which authorities signed the newest ones, and whether there is
// anything to serve.
func TestReports(t *testing.T) {
	t.Parallel()
	now := time.Now()
	c := cache.New(cache.Config{Now: func() time.Time { return now }})
	if got := c.Now(); !got.Equal(now) {
		t.Errorf("the time is %v, want %v", got, now)
	}
	serving := func(when string, entries int, valid bool) {
		t.Helper()
		if n, ok := c.Serving(); n != entries || ok != valid {
			t.Errorf("%s: %d entries, valid %v; want %d, %v", when, n, ok, entries, valid)
		}
	}
	serving("empty", 0, false)
	a, b := entry("a", "x"), entry("b", "x")
	c.Update([]*cache.Entry{a, b}, nil)
	if got := c.Entries(); !maps.Equal(got, map[string]*cache.Entry{"a": a, "b": b}) {
		t.Errorf("entries %v", got)
	}
	serving("nothing minted", 2, false)
	if c.Bundle() != nil {
		t.Error("there is a bundle")
	}
	if err := c.PutJWT(a, []string{"z"}, cache.JWT{KeyID: "k"}); !errors.Is(err, cache.ErrChanged) {
		t.Errorf("PutJWT without a bundle: %v", err)
	}
	s := snapshot(t, "k", "l")
	c.SetBundle(s)
	if c.Bundle() != s {
		t.Error("the bundle is not the one that was set")
	}

	put(t, c, svid(a, "A"))
	later := svid(b, "B")
	later.NotBefore = later.NotBefore.Add(time.Second)
	put(t, c, later)
	put(t, c, svid(a, "A"))
	if got := c.Newest(); got.X509 != "B" || got.JWT != "" {
		t.Errorf("newest %+v", got)
	}
	for i, keyID := range []string{"k", "l", "k"} {
		asked := now.Add([]time.Duration{0, time.Minute, time.Second}[i])
		if err := c.PutJWT(a, []string{"z"}, cache.JWT{KeyID: keyID, AskedAt: asked, IssuedAt: asked, ExpiresAt: asked.Add(time.Hour)}); err != nil {
			t.Fatal(err)
		}
	}
	if got := c.Newest(); got.JWT != "l" {
		t.Errorf("newest %+v", got)
	}
	for authority, want := range map[string][]string{"A": {"a"}, "B": {"b"}, "C": nil} {
		if got := c.SignedBy(authority); !slices.Equal(got, want) {
			t.Errorf("%s signed %v, want %v", authority, got, want)
		}
		if got := c.Held(authority); got != len(want) {
			t.Errorf("%d SVIDs of %s are held, want %d", got, authority, len(want))
		}
	}
	serving("minted", 2, true)
	changed := *a
	changed.Hint = "h"
	c.Update([]*cache.Entry{&changed}, nil)
	if c.Current(a) || !c.Current(&changed) || c.Current(entry("unknown", "x")) {
		t.Error("the current revision is not the one of the last update")
	}

	// Due by age, for longer than the grace.
	now = now.Add(31 * time.Minute)
	for grace, want := range map[time.Duration]int{0: 2, 2 * time.Minute: 0} {
		if overdue := c.Overdue(grace); overdue != want {
			t.Errorf("grace %v: %d overdue, want %d", grace, overdue, want)
		}
	}
	now = now.Add(30 * time.Minute)
	serving("expired", 2, false)
}

// A view counts identities whose authority is not in its bundle.
func TestOrphaned(t *testing.T) {
	t.Parallel()
	c := cache.New(cache.Config{})
	c.SetBundle(snapshot(t))
	for _, tt := range []struct{ id, authority string }{{"a", "A"}, {"b", "gone"}, {"c", "gone"}, {"d", "B"}} {
		e := entry(tt.id, "x")
		c.Update([]*cache.Entry{e}, nil)
		put(t, c, svid(e, tt.authority))
	}
	if v := c.Match(sel("x")); v.Orphaned != 2 || len(v.Identities) != 4 {
		t.Errorf("%d of %d identities are orphaned, want 2 of 4", v.Orphaned, len(v.Identities))
	}
}

// Before the first sync, restored workloads have a partial answer and others none. A
// selector that a caller has twice counts once.
func TestPartialAnswers(t *testing.T) {
	t.Parallel()
	c := cache.New(cache.Config{})
	c.SetBundle(snapshot(t))
	e := entry("e", "x")
	c.Restore([]*cache.Entry{e}, []*cache.SVID{svid(e, "A")}, nil)
	if !c.Returning() {
		t.Error("restored, and not returning")
	}
	for selector, want := range map[string]bool{"x": true, "y": false} {
		if v := c.Match(sel(selector)); v.Ready != want || v.Partial != want {
			t.Errorf("restored, %s: ready %v, partial %v; want %v", selector, v.Ready, v.Partial, want)
		}
	}
	other := entry("other", "z")
	c.Update([]*cache.Entry{other}, nil)
	put(t, c, svid(other, "A"))
	for selector, want := range map[string]int{"x": 2, "y": 1} {
		if v := c.Match(sel(selector, selector, "z")); !v.Ready || v.Partial || len(v.Identities) != want {
			t.Errorf("synced, %s: ready %v, partial %v, %v", selector, v.Ready, v.Partial, ids(v))
		}
	}
	c.Release()
	if c.Returning() {
		t.Error("released, and returning")
	}
}

// An SVID above the limit is not put: it was evicted while it was being minted.
func TestPutAboveTheLimit(t *testing.T) {
	t.Parallel()
	c := cache.New(cache.Config{Limit: 1})
	c.Update([]*cache.Entry{entry("a", "a"), entry("b", "b")}, nil)
	put(t, c, svid(entry("a", "a"), "A"))
	if err := c.Put(svid(entry("b", "b"), "A")); !errors.Is(err, cache.ErrChanged) {
		t.Errorf("Put above the limit: %v, want ErrChanged", err)
	}
	if n := c.Held("A"); n != 1 {
		t.Errorf("%d SVIDs are held", n)
	}
}
