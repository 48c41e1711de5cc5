package cache_test

import (
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/cache"
)

// An SVID remains one of its entry while nothing that is in it is edited.
func TestEditsThatRequireAnotherSVID(t *testing.T) {
	was := entry("e", "x", "y")
	was.Revision, was.CreatedAt, was.DNSNames, was.X509TTL = 3, time.Unix(1000, 0), []string{"a.example.org", "b.example.org"}, time.Hour
	for name, tt := range map[string]struct {
		edit func(*cache.Entry, *cache.SVID)
		same bool
	}{
		"nothing":            {func(*cache.Entry, *cache.SVID) {}, true},
		"hint":               {func(e *cache.Entry, _ *cache.SVID) { e.Hint = "h" }, true},
		"selectors":          {func(e *cache.Entry, _ *cache.SVID) { e.Selectors = sel("z") }, true},
		"federates with":     {func(e *cache.Entry, _ *cache.SVID) { e.FederatesWith = []spiffeid.TrustDomain{td} }, true},
		"JWT TTL":            {func(e *cache.Entry, _ *cache.SVID) { e.JWTTTL = time.Hour }, true},
		"jti":                {func(e *cache.Entry, _ *cache.SVID) { e.IncludeJTI = true }, true},
		"made again":         {func(e *cache.Entry, _ *cache.SVID) { e.CreatedAt = time.Unix(2000, 0) }, true},
		"SPIFFE ID":          {func(e *cache.Entry, _ *cache.SVID) { e.SPIFFEID = spiffeid.RequireFromPath(td, "/z") }, false},
		"X.509 TTL":          {func(e *cache.Entry, _ *cache.SVID) { e.X509TTL = 2 * time.Hour }, false},
		"DNS name":           {func(e *cache.Entry, _ *cache.SVID) { e.DNSNames = []string{"a.example.org"} }, false},
		"order of DNS names": {func(e *cache.Entry, _ *cache.SVID) { e.DNSNames = []string{"b.example.org", "a.example.org"} }, false},
		"made again, otherwise": {func(e *cache.Entry, _ *cache.SVID) {
			e.Revision, e.CreatedAt, e.X509TTL = 3, time.Unix(2000, 0), 2*time.Hour
		}, false},
		// The server signed while the entry had other names for a time.
		"edited twice": {func(_ *cache.Entry, s *cache.SVID) { s.DNSNames = nil }, false},
	} {
		t.Run(name, func(t *testing.T) {
			now, s := *was, svid(was, "A")
			now.Revision++
			tt.edit(&now, s)
			if got := s.For(&now); got != tt.same {
				t.Errorf("For = %v, want %v", got, tt.same)
			}
			if got := s.Equivalent(svid(&now, "B")); got != tt.same {
				t.Errorf("Equivalent = %v, want %v", got, tt.same)
			}
			if !s.For(was) {
				t.Error("it is not for the entry that it was minted for")
			}
		})
	}
}

// An entry with NoPrefetch is minted for a stream. After that its SVID is not renewed by its
// age, and is evicted once it is due and another SVID is put.
func TestNoPrefetch(t *testing.T) {
	now := time.Now()
	c := cache.New(cache.Config{Limit: 10, Now: func() time.Time { return now }})
	c.SetBundle(snapshot(t))
	asked, other, usual := entry("asked", "1"), entry("other", "2"), entry("usual", "3")
	asked.NoPrefetch, other.NoPrefetch = true, true
	c.Update([]*cache.Entry{asked, other, usual}, nil)
	wanted := func(when string, want ...string) {
		t.Helper()
		var got []string
		for _, e := range []*cache.Entry{asked, other, usual} {
			if _, ok := c.Item(e.ID); ok {
				got = append(got, e.ID)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: wanted are %v, want %v", when, got, want)
		}
	}
	wanted("at first", "usual")
	c.Match(sel("1"))
	wanted("after a look", "usual")
	sub := c.Subscribe(cache.Process{}, sel("1"))
	wanted("with a stream", "asked", "usual")
	sub.Close()
	wanted("the stream ended before it was minted", "usual")
	put(t, c, svid(asked, "A"))
	wanted("the answer came late", "asked", "usual")
	if got := shown(c, "1"); !slices.Equal(got, []string{"/asked"}) {
		t.Errorf("whoever asks again is shown %v", got)
	}
	sub = c.Subscribe(cache.Process{}, sel("1"))
	item, _ := c.Item("asked")
	if !item.RenewAt().Equal(item.SVID.RenewAt) {
		t.Error("it is not renewed at its half-life while somebody has it open")
	}
	sub.Close()
	item, _ = c.Item("asked")
	if !item.RenewAt().Equal(item.SVID.NotAfter) {
		t.Error("it is renewed without a stream")
	}
	put(t, c, svid(other, "A"))
	put(t, c, svid(usual, "A"))
	wanted("fresh, and there is room", "asked", "other", "usual")

	now = now.Add(40 * time.Minute)
	wanted("past half-life, the server may be away", "asked", "other", "usual")
	if overdue := c.Overdue(0); overdue != 1 {
		t.Errorf("%d overdue, want the one that is renewed by its age", overdue)
	}
	put(t, c, hour(other, now))
	wanted("past half-life and another is put", "other", "usual")

	edit := *other
	edit.Revision, edit.Selectors = 1, sel("4")
	c.Update([]*cache.Entry{&edit}, nil)
	wanted("edited, the same SVID", "other", "usual")
	edit.Revision, edit.DNSNames = 2, []string{"x.example.org"}
	c.Update([]*cache.Entry{&edit}, nil)
	wanted("edited, another SVID", "usual")
	now = now.Add(2 * time.Hour)
	put(t, c, hour(&edit, now))
	wanted("minted once more", "other", "usual")
	now = now.Add(2 * time.Hour)
	wanted("expired", "usual")

	edit.Revision, edit.NoPrefetch = 3, false
	c.Update([]*cache.Entry{&edit}, nil)
	wanted("to be prefetched from now on", "other", "usual")
	c.Update(nil, []string{"asked", "other"})
	wanted("deleted", "usual")
}

// An SVID of an entry with NoPrefetch is evicted above the limit, but not before the stream
// that it was minted for could get it.
func TestNoPrefetchAboveTheLimit(t *testing.T) {
	c := cache.New(cache.Config{Limit: 1})
	c.SetBundle(snapshot(t))
	usual, asked, other := entry("usual", "1"), entry("asked", "2"), entry("other", "3")
	asked.NoPrefetch, other.NoPrefetch = true, true
	c.Update([]*cache.Entry{usual, asked, other}, nil)
	put(t, c, svid(usual, "A"))
	held := func(when string, want ...string) {
		t.Helper()
		var got []string
		for _, e := range []*cache.Entry{asked, other, usual} {
			if item, ok := c.Item(e.ID); ok && item.SVID != nil {
				got = append(got, e.ID)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: held are %v, want %v", when, got, want)
		}
	}
	for _, e := range []*cache.Entry{asked, other} {
		sub := c.Subscribe(cache.Process{}, e.Selectors)
		sub.Close()
		put(t, c, svid(e, "A"))
	}
	held("the last one asked for, whose stream has ended", "other")
	put(t, c, svid(other, "A"))
	held("put again", "other")
}

// As many SVIDs as the limit may be held, those of entries with NoPrefetch among them.
func TestNoPrefetchAtTheLimit(t *testing.T) {
	c := cache.New(cache.Config{Limit: 2})
	c.SetBundle(snapshot(t))
	usual, asked := entry("usual", "1"), entry("asked", "2")
	asked.NoPrefetch = true
	c.Update([]*cache.Entry{usual, asked}, nil)
	c.Subscribe(cache.Process{}, asked.Selectors).Close()
	put(t, c, svid(asked, "A"))
	put(t, c, svid(usual, "A"))
	put(t, c, svid(usual, "A"))
	if n := c.Held("A"); n != 2 {
		t.Errorf("%d SVIDs are held, want 2", n)
	}
}

// hour is an SVID that is good for an hour from now.
func hour(e *cache.Entry, now time.Time) *cache.SVID {
	s := svid(e, "A")
	s.RenewAt, s.NotAfter = now.Add(30*time.Minute), now.Add(time.Hour)
	return s
}

// A token with a jti is not held, and those from before the edit are dropped; its expiry is
// recorded.
func TestJWTWithJTIIsNotHeld(t *testing.T) {
	now := time.Now()
	c := cache.New(cache.Config{})
	c.SetBundle(snapshot(t, "k"))
	plain := entry("e", "x")
	c.Update([]*cache.Entry{plain}, nil)
	token := cache.JWT{Token: "t", KeyID: "k", IssuedAt: now, AskedAt: now, ExpiresAt: now.Add(time.Hour)}
	if err := c.PutJWT(plain, []string{"a"}, token); err != nil {
		t.Fatal(err)
	}
	with := *plain
	with.Revision, with.IncludeJTI = 1, true
	c.Update([]*cache.Entry{&with}, nil)
	check := func(when string) {
		t.Helper()
		if got, ok := c.JWT(&with, []string{"a"}); ok {
			t.Errorf("%s: %q is held", when, got.Token)
		}
		if n := c.JWTCounts()["k"]; n != 0 {
			t.Errorf("%s: %d tokens are held", when, n)
		}
	}
	check("after the edit")
	token.ExpiresAt = now.Add(2 * time.Hour)
	if err := c.PutJWT(&with, []string{"a"}, token); err != nil {
		t.Fatal(err)
	}
	check("after a mint")
	if got := c.JWTExpiry()["k"]; got.Before(now.Add(90 * time.Minute)) {
		t.Errorf("the last token of the key is said to end at %v", got)
	}
}
