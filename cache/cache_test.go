package cache_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// authorityCert and jwtKey are shared: only their IDs matter here.
var authorityKey, authorityCert = func() (*ecdsa.PrivateKey, *x509.Certificate) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	return key, cert
}()

// snapshot has X.509 authorities A and B and the given JWT keys.
func snapshot(t testing.TB, keyIDs ...string) *bundle.Snapshot {
	t.Helper()
	c := bundle.Content{X509: []bundle.X509Authority{{ID: "A", Certificate: authorityCert}, {ID: "B", Certificate: authorityCert}}}
	for _, k := range keyIDs {
		c.JWT = append(c.JWT, bundle.JWTAuthority{KeyID: k, PublicKey: authorityKey.Public()})
	}
	b, err := bundle.New(td, c)
	if err != nil {
		t.Fatal(err)
	}
	return &bundle.Snapshot{Own: b}
}

func sel(values ...string) []cache.Selector {
	var out []cache.Selector
	for _, v := range values {
		out = append(out, cache.Selector{Type: "t", Value: v})
	}
	return out
}

func entry(id string, selectors ...string) *cache.Entry {
	return &cache.Entry{ID: id, SPIFFEID: spiffeid.RequireFromPath(td, "/"+id), Selectors: sel(selectors...)}
}

func svid(e *cache.Entry, authority string) *cache.SVID {
	return &cache.SVID{
		ID: e.SPIFFEID, EntryID: e.ID, Revision: e.Revision, Created: e.CreatedAt, TTL: e.X509TTL, DNSNames: e.DNSNames, Authority: authority, Leaf: []byte(e.ID + authority),
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), RenewAt: time.Now().Add(30 * time.Minute),
	}
}

func put(t testing.TB, c *cache.Cache, s *cache.SVID) {
	t.Helper()
	if err := c.Put(s); err != nil {
		t.Fatalf("Put: %v", err)
	}
}

func woken(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func ids(v cache.View) []string {
	var out []string
	for _, i := range v.Identities {
		out = append(out, i.Entry.ID)
	}
	return out
}

func TestNotReadyWithoutBundleAndEntries(t *testing.T) {
	c := cache.New(cache.Config{})
	sub := c.Subscribe(cache.Process{}, sel("x"))
	defer sub.Close()
	if sub.View().Ready || c.Match(sel("x")).Ready {
		t.Error("ready with nothing")
	}
	c.SetBundle(snapshot(t))
	if c.Ready() {
		t.Error("ready without entries")
	}
	woken(sub.C())
	c.Update(nil, nil)
	if !woken(sub.C()) {
		t.Error("a waiting stream was not woken when the cache became ready")
	}
	if v := sub.View(); !v.Ready || v.Matched != 0 || v.Bundle == nil {
		t.Errorf("view after an empty first sync: %+v, want ready with no match", v)
	}
	if !c.Ready() {
		t.Error("not ready with bundle and entries")
	}
	c = cache.New(cache.Config{})
	if c.Update(nil, nil); c.Ready() {
		t.Error("ready without a bundle")
	}
}

// Watches and streams are woken for a change and not for a sync that brings none.
func TestUpdateWithoutAChangeWakesNoReader(t *testing.T) {
	c := cache.New(cache.Config{})
	c.SetBundle(snapshot(t))
	sub, watch := c.Subscribe(cache.Process{}, sel("x")), c.Watch()
	defer sub.Close()
	defer watch.Close()
	for _, step := range []struct {
		name       string
		do         func()
		sub, watch bool
	}{
		{"opened", func() {}, true, true},
		{"first sync", func() { c.Update(nil, nil) }, true, true},
		{"nothing new", func() { c.Update(nil, nil) }, false, false},
		{"an entry of others", func() { c.Update([]*cache.Entry{entry("e", "y")}, nil) }, true, true}, // a kind of selectors is needed
		{"another of the same kind", func() { c.Update([]*cache.Entry{entry("f", "y")}, nil) }, false, true},
		{"deleted", func() { c.Update(nil, []string{"f"}) }, false, true},
		{"a bundle", func() { c.SetBundle(snapshot(t)) }, true, true},
	} {
		step.do()
		if s, w := woken(sub.C()), woken(watch.C()); s != step.sub || w != step.watch {
			t.Errorf("%s: stream woken %v, watch woken %v; want %v and %v", step.name, s, w, step.sub, step.watch)
		}
	}
	watch.Close()
	if c.SetBundle(snapshot(t)); woken(watch.C()) {
		t.Error("a closed watch was woken")
	}
}

func TestStreamFollowsItsEntries(t *testing.T) {
	c := cache.New(cache.Config{})
	c.SetBundle(snapshot(t))
	c.Update(nil, nil)
	sub := c.Subscribe(cache.Process{}, sel("x", "y"))
	defer sub.Close()
	woken(sub.C())

	b, a, other := entry("b", "x"), entry("a", "y", "x"), entry("o", "x", "z")
	c.Update([]*cache.Entry{b, a, other}, nil)
	if v := sub.View(); !woken(sub.C()) || v.Matched != 2 || v.Waiting != 2 || len(v.Identities) != 0 {
		t.Fatalf("after two entries came: %+v, want them matched and waiting", v)
	}
	put(t, c, svid(b, "A"))
	if v := sub.View(); !woken(sub.C()) || v.Waiting != 1 {
		t.Fatalf("after one SVID came: %+v", v)
	}
	c.Failed("a")
	if v := sub.View(); !woken(sub.C()) || v.Waiting != 0 || !slices.Equal(ids(v), []string{"b"}) {
		t.Fatalf("a first mint that failed must not hold up the rest: %+v", v)
	}
	put(t, c, svid(a, "A"))
	if v := sub.View(); !slices.Equal(ids(v), []string{"a", "b"}) {
		t.Fatalf("identities %v, want a and b in the order of entry IDs", ids(v))
	}
	woken(sub.C())
	put(t, c, svid(other, "A"))
	if woken(sub.C()) {
		t.Error("woken for an entry that does not match")
	}
	c.Update([]*cache.Entry{entry("b", "z")}, nil)
	if v := sub.View(); !woken(sub.C()) || !slices.Equal(ids(v), []string{"a"}) {
		t.Errorf("identities %v after b's selectors changed, want a", ids(v))
	}
	c.Update(nil, []string{"a"})
	if v := sub.View(); !woken(sub.C()) || v.Matched != 0 {
		t.Errorf("%d entries match after the last was deleted", v.Matched)
	}
}

func TestExpiredSVIDIsNotShown(t *testing.T) {
	now := time.Now()
	c := cache.New(cache.Config{Now: func() time.Time { return now }})
	c.SetBundle(snapshot(t))
	e := entry("e", "x")
	c.Update([]*cache.Entry{e}, nil)
	put(t, c, svid(e, "A"))
	now = now.Add(59 * time.Minute)
	if v := c.Match(sel("x")); len(v.Identities) != 1 {
		t.Fatal("an SVID is not shown a minute before its end")
	}
	now = now.Add(2 * time.Minute)
	if v := c.Match(sel("x")); len(v.Identities) != 0 || v.Matched != 1 || v.Waiting != 0 {
		t.Errorf("view with an expired SVID: %d identities, %d waiting", len(v.Identities), v.Waiting)
	}
}

func TestHintsAreUnique(t *testing.T) {
	c := cache.New(cache.Config{})
	c.SetBundle(snapshot(t))
	hinted := func(id, hint string, age time.Duration) *cache.Entry {
		e := entry(id, "x")
		e.Hint, e.CreatedAt = hint, time.Unix(1000, 0).Add(-age)
		return e
	}
	entries := []*cache.Entry{hinted("a", "web", 0), hinted("b", "web", time.Hour), hinted("c", "web", time.Hour), hinted("d", "db", 0), hinted("e", "", 0), hinted("f", "", time.Hour)}
	c.Update(entries, nil)
	for _, e := range entries {
		put(t, c, svid(e, "A"))
	}
	v := c.Match(sel("x"))
	if got, want := ids(v), []string{"b", "d", "e", "f"}; !slices.Equal(got, want) {
		t.Errorf("shown are %q, want %q: the oldest entry with a hint, then the lowest ID", got, want)
	}
	if len(v.Hidden) != 2 || v.Hidden[0].ID != "a" || v.Hidden[1].ID != "c" {
		t.Errorf("hidden are %v, want a and c", v.Hidden)
	}
	c.Update(nil, []string{"b"})
	if got, want := ids(c.Match(sel("x"))), []string{"c", "d", "e", "f"}; !slices.Equal(got, want) {
		t.Errorf("shown are %q without the oldest, want %q", got, want)
	}
	c.Update(nil, []string{"d", "e", "f"})
	if got, want := ids(c.Match(sel("x"))), []string{"c"}; !slices.Equal(got, want) {
		t.Errorf("shown are %q of two with one hint, want %q", got, want)
	}
}

func TestPutRejectsAnSVIDOfAnotherRevision(t *testing.T) {
	c := cache.New(cache.Config{})
	old := entry("e", "x")
	c.Update([]*cache.Entry{old}, nil)
	changed := *old
	changed.Revision, changed.DNSNames = 1, []string{"e.example.org"}
	c.Update([]*cache.Entry{&changed}, nil)
	if c.Put(svid(old, "A")) == nil {
		t.Error("an SVID for an older revision was taken")
	}
	if c.Put(svid(entry("gone", "x"), "A")) == nil {
		t.Error("an SVID for an unknown entry was taken")
	}
	if c.Held("A") != 0 {
		t.Error("a refused SVID is counted")
	}
}

func TestLimitIsSoft(t *testing.T) {
	c := cache.New(cache.Config{Limit: 2})
	c.SetBundle(snapshot(t))
	var entries []*cache.Entry
	for i := range 5 {
		entries = append(entries, entry(fmt.Sprint(i), fmt.Sprint(i)))
	}
	c.Update(entries, nil)
	// mint puts an SVID for each wanted entry that has none.
	mint := func() {
		for _, e := range entries {
			if item, ok := c.Item(e.ID); ok && item.SVID == nil {
				put(t, c, svid(e, "A"))
			}
		}
	}
	check := func(when string, want ...string) {
		t.Helper()
		var got []string
		for _, e := range entries {
			if item, _ := c.Item(e.ID); item.SVID != nil {
				got = append(got, e.ID)
			}
		}
		if !slices.Equal(got, want) || c.Held("A") != len(want) {
			t.Errorf("%s: held are %v (%d counted), want %v", when, got, c.Held("A"), want)
		}
	}
	mint()
	check("at first", "0", "1")
	// Three streams on entries above the limit: idle SVIDs are evicted when the new
	// ones are put, and none with a stream is, although there are more than the
	// limit.
	var subs []*cache.Subscription
	for _, i := range []string{"2", "3", "4"} {
		subs = append(subs, c.Subscribe(cache.Process{}, sel(i)))
	}
	check("three streams, nothing minted yet", "0", "1")
	mint()
	check("three streams", "2", "3", "4")
	if v := subs[2].View(); len(v.Identities) != 1 {
		t.Error("an entry above the limit is not served to its stream")
	}
	for _, sub := range subs {
		sub.Close()
	}
	check("all closed, the server may be away", "2", "3", "4")
	again := c.Subscribe(cache.Process{}, sel("0"))
	defer again.Close()
	mint()
	check("the least recently used go when another is put", "0", "4")
	c.Update(nil, []string{"4"})
	mint()
	check("one was deleted and room is filled", "0", "1")
}

// In an outage a stream of an entry without an SVID evicts no other SVID.
func TestNothingIsEvictedInAnOutage(t *testing.T) {
	c := cache.New(cache.Config{Limit: 1})
	c.SetBundle(snapshot(t))
	held, asked := entry("1", "1"), entry("2", "2")
	c.Update([]*cache.Entry{held, asked}, nil)
	put(t, c, svid(held, "A"))
	for range 3 {
		sub := c.Subscribe(cache.Process{}, sel("2"))
		if _, wanted := c.Item("2"); !wanted {
			t.Error("the entry of a stream is not wanted")
		}
		c.Failed("2")
		sub.Close()
		if _, wanted := c.Item("2"); wanted {
			t.Error("an SVID above the limit is wanted without a stream")
		}
	}
	if v := c.Match(sel("1")); len(v.Identities) != 1 {
		t.Error("the only SVID held was dropped for one that was never minted")
	}
}

func TestFollowerLearnsWhatChanged(t *testing.T) {
	c := cache.New(cache.Config{})
	e, other := entry("e", "x"), entry("o", "y")
	c.Update([]*cache.Entry{e, other}, nil)
	f := c.Follow()
	defer f.Close()
	if got := f.Drain(); len(got) != 2 {
		t.Fatalf("first drain has %v, want both entries", got)
	}
	woken(f.C())
	for _, step := range []struct {
		name string
		do   func()
	}{
		{"put", func() { put(t, c, svid(e, "A")) }},
		{"entry changed", func() { c.Update([]*cache.Entry{entry("e", "x")}, nil) }},
		{"deleted", func() { c.Update(nil, []string{"e"}) }},
	} {
		step.do()
		if got := f.Drain(); !woken(f.C()) || !slices.Equal(got, []string{"e"}) {
			t.Errorf("%s: drained %v, want e alone", step.name, got)
		}
	}
	c.SetBundle(snapshot(t))
	if !woken(f.C()) || len(f.Drain()) != 0 {
		t.Error("a new bundle must wake the follower and change no entry")
	}
	f.Close()
	if c.SetBundle(snapshot(t)); woken(f.C()) {
		t.Error("a closed follower was woken")
	}

	early := cache.New(cache.Config{})
	f = early.Follow()
	defer f.Close()
	woken(f.C())
	for i, want := range []bool{true, false} {
		if early.Update(nil, nil); woken(f.C()) != want {
			t.Errorf("sync %d without entries: woken is not %v", i+1, want)
		}
	}
}

// A failed mint matters until there is an SVID, and wakes its streams once.
func TestFailedMintWakesOnce(t *testing.T) {
	c := cache.New(cache.Config{})
	c.SetBundle(snapshot(t))
	e := entry("e", "x")
	c.Update([]*cache.Entry{e}, nil)
	sub := c.Subscribe(cache.Process{}, sel("x"))
	defer sub.Close()
	woken(sub.C())
	step := func(when string, wakes bool, waiting int) {
		t.Helper()
		if got := woken(sub.C()); got != wakes {
			t.Errorf("%s: woken %v, want %v", when, got, wakes)
		}
		if got := sub.View().Waiting; got != waiting {
			t.Errorf("%s: %d waiting, want %d", when, got, waiting)
		}
	}
	c.Failed("unknown")
	step("an unknown entry", false, 1)
	c.Failed("e")
	step("failed", true, 0)
	c.Failed("e")
	step("failed again", false, 0)
	put(t, c, svid(e, "A"))
	step("minted", true, 0)
	c.Failed("e")
	step("failed later", false, 0)
	c.Update([]*cache.Entry{edited(e, "/other", "x")}, nil)
	step("another SPIFFE ID", true, 1)
}

// An SVID that was minted for another entry with the same ID is rejected, unless it is
// equivalent.
func TestPutRejectsAnSVIDOfAnEntryBefore(t *testing.T) {
	c := cache.New(cache.Config{})
	before, after := entry("e", "x"), entry("e", "x")
	before.CreatedAt, after.CreatedAt = time.Unix(1, 0), time.Unix(2, 0)
	after.X509TTL = time.Hour
	c.Update([]*cache.Entry{before}, nil)
	c.Update([]*cache.Entry{after}, []string{"e"})
	if c.Put(svid(before, "A")) == nil {
		t.Error("an SVID for the entry before was taken")
	}
	put(t, c, svid(after, "A"))
}

// Random histories against a simple model of every figure.
func TestAgainstModel(t *testing.T) {
	snap := snapshot(t)
	rapid.Check(t, func(t *rapid.T) {
		type stream struct {
			sub       *cache.Subscription
			selectors []cache.Selector
		}
		c := cache.New(cache.Config{Limit: 1000})
		c.SetBundle(snap)
		c.Update(nil, nil)
		entries := map[string]*cache.Entry{}
		svids := map[string]*cache.SVID{}
		var streams []*stream
		values := rapid.SliceOfNDistinct(rapid.SampledFrom([]string{"u", "v", "w", "x"}), 1, 3, rapid.ID[string])
		ident := rapid.SampledFrom([]string{"a", "b", "c", "d", "e"})
		pick := func(t *rapid.T) *stream {
			if len(streams) == 0 {
				t.Skip("no stream")
			}
			return streams[rapid.IntRange(0, len(streams)-1).Draw(t, "stream")]
		}
		matches := func(e *cache.Entry, caller []cache.Selector) bool {
			return !slices.ContainsFunc(e.Selectors, func(s cache.Selector) bool { return !slices.Contains(caller, s) })
		}
		t.Repeat(map[string]func(*rapid.T){
			"upsert": func(t *rapid.T) {
				e := entry(ident.Draw(t, "id"), values.Draw(t, "selectors")...)
				e.SPIFFEID = spiffeid.RequireFromPath(td, rapid.SampledFrom([]string{"/p", "/q"}).Draw(t, "path"))
				e.NoPrefetch = rapid.Bool().Draw(t, "no prefetch")
				c.Update([]*cache.Entry{e}, nil)
				entries[e.ID] = e
				if s := svids[e.ID]; s != nil && s.ID != e.SPIFFEID {
					delete(svids, e.ID)
				}
			},
			"delete": func(t *rapid.T) {
				id := ident.Draw(t, "id")
				c.Update(nil, []string{id})
				delete(entries, id)
				delete(svids, id)
			},
			"put": func(t *rapid.T) {
				if e := entries[ident.Draw(t, "id")]; e != nil {
					s := svid(e, rapid.SampledFrom([]string{"A", "B"}).Draw(t, "authority"))
					if err := c.Put(s); err != nil {
						t.Fatal(err)
					}
					svids[e.ID] = s
				}
			},
			"put what was minted for an entry before": func(t *rapid.T) {
				if e := entries[ident.Draw(t, "id")]; e != nil {
					s := svid(e, "A")
					s.ID = spiffeid.RequireFromPath(td, "/before")
					if err := c.Put(s); !errors.Is(err, cache.ErrChanged) {
						t.Fatalf("Put: %v, want ErrChanged", err)
					}
				}
			},
			"open": func(t *rapid.T) {
				s := sel(values.Draw(t, "caller")...)
				streams = append(streams, &stream{sub: c.Subscribe(cache.Process{}, s), selectors: s})
			},
			"close": func(t *rapid.T) {
				s := pick(t)
				s.sub.Close()
				streams = slices.DeleteFunc(streams, func(o *stream) bool { return o == s })
			},
			"view": func(t *rapid.T) {
				s := pick(t)
				var want []string
				for _, id := range []string{"a", "b", "c", "d", "e"} {
					if e := entries[id]; e != nil && matches(e, s.selectors) && svids[id] != nil {
						want = append(want, id)
					}
				}
				v := s.sub.View()
				if !slices.Equal(ids(v), want) {
					t.Fatalf("stream sees %v, want %v", ids(v), want)
				}
				for _, id := range v.Identities {
					if id.SVID.ID != entries[id.Entry.ID].SPIFFEID {
						t.Fatalf("stream sees %s of an entry that gives %s", id.SVID.ID, entries[id.Entry.ID].SPIFFEID)
					}
				}
				if one := c.Match(s.selectors); !slices.Equal(ids(one), want) {
					t.Fatalf("match sees %v, want %v", ids(one), want)
				}
			},
			"select": func(t *rapid.T) {
				s := pick(t)
				s.selectors = sel(values.Draw(t, "caller")...)
				s.sub.Select(s.selectors)
			},
			"": func(t *rapid.T) {
				want := map[string]int{}
				for _, s := range svids {
					want[s.Authority]++
				}
				for id, e := range entries {
					asked := slices.ContainsFunc(streams, func(s *stream) bool { return matches(e, s.selectors) })
					if _, wanted := c.Item(id); wanted != (!e.NoPrefetch || asked || svids[id] != nil) {
						t.Fatalf("entry %s is wanted: %v (no prefetch %v, asked for %v, held %v)", id, wanted, e.NoPrefetch, asked, svids[id] != nil)
					}
				}
				got := map[string]int{}
				for _, u := range c.Authorities() {
					if u.Held > 0 {
						got[u.Authority] = u.Held
					}
				}
				if !maps.Equal(got, want) {
					t.Fatalf("held are %v, want %v", got, want)
				}
				for id := range entries {
					n := 0
					for _, s := range streams {
						if matches(entries[id], s.selectors) {
							n++
						}
					}
					if item, _ := c.Item(id); item.Streams != n {
						t.Fatalf("entry %s has %d streams, want %d", id, item.Streams, n)
					}
				}
			},
		})
	})
}

// Restored SVIDs above the limit are evicted only after Release, when another SVID is put.
func TestRestoredSVIDsExceedTheLimit(t *testing.T) {
	const n, limit = 10, 3
	c := cache.New(cache.Config{Limit: limit})
	var entries []*cache.Entry
	var svids []*cache.SVID
	for i := range n {
		e := entry(fmt.Sprint(i), fmt.Sprint(i))
		entries, svids = append(entries, e), append(svids, svid(e, "A"))
	}
	c.Restore(entries, svids, nil)
	if got := c.Match(sel("7")); got.Ready {
		t.Error("served without a bundle")
	}
	c.SetBundle(snapshot(t))
	c.Update([]*cache.Entry{entry("new", "new")}, []string{"0"})
	sub := c.Subscribe(cache.Process{}, sel("8"))
	if held := c.Held("A"); held != n-1 {
		t.Errorf("%d SVIDs held before the release, want %d", held, n-1)
	}
	put(t, c, svid(entries[1], "A"))
	if held := c.Held("A"); held != n-1 {
		t.Errorf("%d SVIDs held after one was renewed before the release, want %d", held, n-1)
	}
	c.Release()
	if held := c.Held("A"); held != n-1 {
		t.Errorf("%d SVIDs held after the release, want %d until another is put", held, n-1)
	}
	put(t, c, svid(entries[1], "A"))
	if held := c.Held("A"); held != limit {
		t.Errorf("%d SVIDs held after the release and a put, want %d", held, limit)
	}
	if v := sub.View(); len(v.Identities) != 1 {
		t.Errorf("the stream has %d identities, want its one", len(v.Identities))
	}
	sub.Close()
}
