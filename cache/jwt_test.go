package cache_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/cache"
)

func TestJWT(t *testing.T) {
	now := time.Now()
	c := cache.New(cache.Config{Now: func() time.Time { return now }})
	c.SetBundle(snapshot(t, "k1", "k2"))
	e := entry("e", "x")
	c.Update([]*cache.Entry{e}, nil)
	jwt := cache.JWT{Token: "t1", KeyID: "k1", IssuedAt: now, AskedAt: now, ExpiresAt: now.Add(time.Hour)}
	c.PutJWT(e, []string{"b", "a"}, jwt)
	if got, ok := c.JWT(e, []string{"a", "b", "a"}); !ok || got != jwt {
		t.Error("the order of audiences and repeats must not matter")
	}
	if _, ok := c.JWT(e, []string{"a"}); ok {
		t.Error("found under another set of audiences")
	}
	if !jwt.Fresh(now.Add(29*time.Minute)) || jwt.Fresh(now.Add(31*time.Minute)) {
		t.Error("fresh must end at half of its life")
	}
	if got := c.JWTExpiry(); len(got) != 1 || !got["k1"].Equal(now.Add(time.Hour)) {
		t.Errorf("latest expiry %v", got)
	}
	c.PutJWT(e, []string{"z"}, cache.JWT{Token: "t2", KeyID: "unknown", IssuedAt: now, AskedAt: now, ExpiresAt: now.Add(time.Hour)})
	if _, ok := c.JWT(e, []string{"z"}); ok {
		t.Error("a token by a key that is not in the bundle is held")
	}

	c.PutJWT(e, []string{"z"}, cache.JWT{Token: "t3", KeyID: "k2", IssuedAt: now, AskedAt: now, ExpiresAt: now.Add(2 * time.Hour)})
	c.SetBundle(snapshot(t, "k2"))
	if _, ok := c.JWT(e, []string{"a", "b"}); ok {
		t.Error("a token is handed out whose key left the bundle")
	}
	if _, ok := c.JWT(e, []string{"z"}); !ok {
		t.Error("a token was dropped whose key stayed")
	}
	now = now.Add(2 * time.Hour)
	if _, ok := c.JWT(e, []string{"z"}); ok || len(c.JWTExpiry()) != 0 {
		t.Error("an expired token is handed out or still counted")
	}
	c.PutJWT(e, []string{"z"}, cache.JWT{Token: "t4", KeyID: "k2", IssuedAt: now, AskedAt: now, ExpiresAt: now.Add(2 * time.Hour)})
	c.Update(nil, []string{"e"})
	again := entry("e", "x")
	c.Update([]*cache.Entry{again}, nil)
	if _, ok := c.JWT(again, []string{"z"}); ok {
		t.Error("a token outlived its entry")
	}
}

// A token is for the revision that it was minted for: callers that matched before an edit
// and callers that match after it do not get each other's.
func TestJWTIsForTheCurrentRevision(t *testing.T) {
	now := time.Now()
	jwt := func(token string) cache.JWT {
		return cache.JWT{Token: token, KeyID: "k", IssuedAt: now, AskedAt: now, ExpiresAt: now.Add(time.Hour)}
	}
	for name, revision := range map[string]int64{"a new revision": 2, "the same revision": 1} {
		c := cache.New(cache.Config{})
		c.SetBundle(snapshot(t, "k"))
		before, after := entry("e", "x"), entry("e", "x")
		before.Revision, after.Revision = 1, revision
		after.SPIFFEID = spiffeid.RequireFromString("spiffe://example.org/after")
		c.Update([]*cache.Entry{before}, nil)
		if err := c.PutJWT(before, []string{"a"}, jwt("before")); err != nil {
			t.Fatal(err)
		}
		c.Update([]*cache.Entry{after}, nil)
		if got, ok := c.JWT(after, []string{"a"}); ok {
			t.Errorf("%s: the entry as it is now has the token %q", name, got.Token)
		}
		if err := c.PutJWT(before, []string{"a"}, jwt("late")); !errors.Is(err, cache.ErrChanged) {
			t.Errorf("%s: a token for the entry as it was is taken: %v", name, err)
		}
		if err := c.PutJWT(after, []string{"a"}, jwt("after")); err != nil {
			t.Error(err)
		}
		if got, ok := c.JWT(before, []string{"a"}); ok {
			t.Errorf("%s: the entry as it was has the token %q", name, got.Token)
		}
		if got, ok := c.JWT(after, []string{"a"}); !ok || got.Token != "after" {
			t.Errorf("%s: the entry as it is now has the token %q", name, got.Token)
		}
	}
}

// However a workload varies its audiences, the number of tokens held is bounded.
func TestJWTsAreBounded(t *testing.T) {
	now := time.Now()
	c := cache.New(cache.Config{})
	c.SetBundle(snapshot(t, "k"))
	e := entry("e", "x")
	c.Update([]*cache.Entry{e}, nil)
	for i := range 10_000 {
		c.PutJWT(e, []string{fmt.Sprint(i)}, cache.JWT{KeyID: "k", IssuedAt: now, AskedAt: now, ExpiresAt: now.Add(time.Hour)})
	}
	if n := c.JWTCounts()["k"]; n != 4096 {
		t.Errorf("%d JWT-SVIDs held, want 4096", n)
	}
	if _, ok := c.JWT(e, []string{"9999"}); !ok {
		t.Error("the newest was dropped instead of the oldest")
	}
}

// Their size, which workloads choose, too, is bounded.
func TestJWTsAreBoundedInSize(t *testing.T) {
	now := time.Now()
	c := cache.New(cache.Config{})
	c.SetBundle(snapshot(t, "k"))
	e := entry("e", "x")
	c.Update([]*cache.Entry{e}, nil)
	const size = 32 << 10
	audience := func(i int) []string { return []string{fmt.Sprintf("%0*d", size, i)} }
	for i := range 2000 {
		c.PutJWT(e, audience(i), cache.JWT{Token: strings.Repeat("t", size), KeyID: "k", IssuedAt: now, AskedAt: now, ExpiresAt: now.Add(time.Hour)})
	}
	if n, want := c.JWTCounts()["k"], (16<<20)/(2*size); n != want {
		t.Errorf("%d JWT-SVIDs of %d bytes held, want %d", n, 2*size, want)
	}
	if _, ok := c.JWT(e, audience(1999)); !ok {
		t.Error("the newest was dropped instead of the oldest")
	}
}

// A token is valid for its lifetime from the request on, less the second by which iat may
// be rounded, whatever the server's clock says.
func TestJWTIsValidForItsLifetime(t *testing.T) {
	now := time.Now()
	for _, ahead := range []time.Duration{0, -time.Hour, time.Hour} { // the server's clock
		j := cache.JWT{AskedAt: now, IssuedAt: now.Add(ahead), ExpiresAt: now.Add(ahead + 10*time.Minute)}
		const life = 10*time.Minute - time.Second
		for age, want := range map[time.Duration]bool{0: true, life - 1: true, life: false, life + time.Hour: false} {
			if got := j.Valid(now.Add(age)); got != want {
				t.Errorf("server ahead by %v, after %v: valid is %v", ahead, age, got)
			}
		}
		for age, want := range map[time.Duration]bool{0: true, life/2 - 1: true, life / 2: false, life: false} {
			if got := j.Fresh(now.Add(age)); got != want {
				t.Errorf("server ahead by %v, after %v: fresh is %v", ahead, age, got)
			}
		}
	}
}

// All tokens of a deleted entry are dropped, also if one of them was replaced before.
func TestTokensOfADeletedEntryAreDropped(t *testing.T) {
	now := time.Now()
	c := cache.New(cache.Config{})
	c.SetBundle(snapshot(t, "k"))
	e, other := entry("e", "x"), entry("o", "x")
	c.Update([]*cache.Entry{e, other}, nil)
	for _, audience := range []string{"a", "b", "a"} {
		for _, e := range []*cache.Entry{e, other} {
			if err := c.PutJWT(e, []string{audience}, cache.JWT{KeyID: "k", IssuedAt: now, AskedAt: now, ExpiresAt: now.Add(time.Hour)}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if n := c.JWTCounts()["k"]; n != 4 {
		t.Errorf("%d tokens are held, want two of each entry", n)
	}
	c.Update(nil, []string{"e"})
	if n := c.JWTCounts()["k"]; n != 2 {
		t.Errorf("%d tokens are held after an entry was deleted, want the two of the other one", n)
	}
}

// A scrape with a wrong clock must not make the cache forget the keys of its tokens.
func TestJWTOfARemovedKeyAfterTheClockWasWrong(t *testing.T) {
	now := time.Now()
	c := cache.New(cache.Config{Now: func() time.Time { return now }})
	c.SetBundle(snapshot(t, "k1", "k2"))
	e := entry("e", "x")
	c.Update([]*cache.Entry{e}, nil)
	c.PutJWT(e, []string{"a"}, cache.JWT{Token: "t", KeyID: "k1", IssuedAt: now, AskedAt: now, ExpiresAt: now.Add(time.Hour)})
	now = now.Add(2 * time.Hour)
	if got := c.JWTExpiry(); len(got) != 0 {
		t.Errorf("expired tokens are reported: %v", got)
	}
	now = now.Add(-2 * time.Hour)
	c.SetBundle(snapshot(t, "k2"))
	if _, ok := c.JWT(e, []string{"a"}); ok {
		t.Error("a token is handed out whose key left the bundle")
	}
}
