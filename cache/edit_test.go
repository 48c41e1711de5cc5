package cache_test

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/cache"
)

// edited returns the entry after an edit in place.
func edited(e *cache.Entry, path string, selectors ...string) *cache.Entry {
	out := *e
	out.Revision++
	out.SPIFFEID, out.Selectors = spiffeid.RequireFromPath(td, path), sel(selectors...)
	return &out
}

// shown lists the SPIFFE IDs that a caller with this selector gets.
func shown(c *cache.Cache, selector string) []string {
	var out []string
	for _, i := range c.Match(sel(selector)).Identities {
		out = append(out, i.SVID.ID.Path())
	}
	return out
}

// From the edit on no caller gets the SPIFFE ID from before or its key, however an SVID of
// it is put.
func TestEditedEntryDoesNotServeItsOldSPIFFEID(t *testing.T) {
	for name, selectors := range map[string][2]string{
		"other callers": {"payments", "web"},
		"same callers":  {"web", "web"},
	} {
		t.Run(name, func(t *testing.T) {
			c := cache.New(cache.Config{})
			c.SetBundle(snapshot(t))
			before := entry("payments", selectors[0])
			c.Update([]*cache.Entry{before}, nil)
			put(t, c, svid(before, "A"))
			sub := c.Subscribe(cache.Process{}, sel(selectors[0]))
			defer sub.Close()
			sub.View()
			sub.Sending()
			sub.Read()
			woken(sub.C())

			after := edited(before, "/web", selectors[1])
			c.Update([]*cache.Entry{after}, nil)
			if got := shown(c, selectors[1]); len(got) > 0 {
				t.Errorf("a caller of the edited entry is shown %v before anything was minted for it", got)
			}
			v := sub.View()
			if !woken(sub.C()) || len(v.Identities) > 0 || v.Waiting != v.Matched {
				t.Errorf("an open stream sees %v, %d of %d waiting", ids(v), v.Waiting, v.Matched)
			}
			if got, want := v.Matched, 1; selectors[0] == selectors[1] && got != want {
				t.Errorf("the stream matches %d entries, want %d", got, want)
			} else if selectors[0] != selectors[1] && got != 0 {
				t.Errorf("the stream matches %d entries, want none", got)
			}
			if u := c.Authorities(); !slices.Equal(u, []cache.Usage{{Authority: "A", Streams: 1}}) {
				t.Errorf("authorities %+v: the SVID is no longer held, the stream has it still", u)
			}

			late := svid(before, "A") // the answer to a mint that was under way
			if err := c.Put(late); !errors.Is(err, cache.ErrChanged) {
				t.Errorf("Put of an SVID minted before the edit: %v, want ErrChanged", err)
			}
			late.Revision = after.Revision // a server that does not count edits
			if err := c.Put(late); !errors.Is(err, cache.ErrChanged) {
				t.Errorf("Put of an SVID with the old SPIFFE ID: %v, want ErrChanged", err)
			}
			put(t, c, svid(after, "A"))
			if got := shown(c, selectors[1]); !slices.Equal(got, []string{"/web"}) {
				t.Errorf("after the mint a caller is shown %v", got)
			}
		})
	}
}

// An edit of the selectors alone keeps the SVID: new callers get it at once, old ones lose
// it at once.
func TestEditedSelectorsMoveTheSVID(t *testing.T) {
	c := cache.New(cache.Config{})
	c.SetBundle(snapshot(t))
	before := entry("e", "old")
	c.Update([]*cache.Entry{before}, nil)
	put(t, c, svid(before, "A"))
	c.Update([]*cache.Entry{edited(before, "/e", "new")}, nil)
	if got := shown(c, "new"); !slices.Equal(got, []string{"/e"}) {
		t.Errorf("a new caller is shown %v", got)
	}
	if v := c.Match(sel("old")); v.Matched > 0 {
		t.Error("an old caller still matches")
	}
}

// The same holds for restored SVIDs: entry and SVID may be from before and after an edit.
func TestRestoredSVIDOfAnotherSPIFFEIDIsNotServed(t *testing.T) {
	c := cache.New(cache.Config{})
	c.SetBundle(snapshot(t))
	before := entry("e", "x")
	after := edited(before, "/web", "x")
	c.Restore([]*cache.Entry{after}, []*cache.SVID{svid(before, "A")}, nil)
	if got := shown(c, "x"); len(got) > 0 || c.Held("A") > 0 {
		t.Errorf("shown %v, %d held", got, c.Held("A"))
	}
}

func TestEditedEntryAndItsJWTs(t *testing.T) {
	now := time.Now()
	c := cache.New(cache.Config{})
	c.SetBundle(snapshot(t, "k"))
	first := entry("e", "x")
	c.Update([]*cache.Entry{first}, nil)
	aud := []string{"a"}
	token := cache.JWT{Token: "t", KeyID: "k", IssuedAt: now, AskedAt: now, ExpiresAt: now.Add(time.Hour)}
	if err := c.PutJWT(first, aud, token); err != nil {
		t.Fatal(err)
	}

	// An edit of what is in no token keeps it. Another lifetime marks it as stale.
	alike := edited(first, "/e", "x")
	c.Update([]*cache.Entry{alike}, nil)
	if got, ok := c.JWT(alike, aud); !ok || !got.Fresh(now) {
		t.Errorf("after an edit of the selectors: %+v, held %v; want the token, fresh", got, ok)
	}
	second := edited(alike, "/e", "y")
	second.JWTTTL = time.Minute
	c.Update([]*cache.Entry{second}, nil)
	if got, ok := c.JWT(second, aud); !ok || got.Token != "t" || got.Fresh(now) {
		t.Errorf("after an edit of the lifetime: %+v, held %v; want the token, not fresh", got, ok)
	}
	if err := c.PutJWT(second, aud, token); err != nil {
		t.Fatal(err)
	}
	if got, _ := c.JWT(second, aud); !got.Fresh(now) {
		t.Error("a token of the current revision is not fresh")
	}

	// Another SPIFFE ID: neither the token held nor one in flight may be served.
	third := edited(second, "/web", "y")
	c.Update([]*cache.Entry{third}, nil)
	for _, e := range []*cache.Entry{second, third} {
		if got, ok := c.JWT(e, aud); ok {
			t.Errorf("after an edit of the SPIFFE ID a caller of %s has %+v", e.SPIFFEID, got)
		}
	}
	if err := c.PutJWT(second, aud, token); !errors.Is(err, cache.ErrChanged) {
		t.Errorf("PutJWT of a token in flight: %v, want ErrChanged", err)
	}
	if err := c.PutJWT(third, aud, token); err != nil {
		t.Fatal(err)
	}
	if _, ok := c.JWT(second, aud); ok {
		t.Error("a call that began before the edit has the new identity's token")
	}
	if _, ok := c.JWT(third, aud); !ok {
		t.Error("the new identity's token is not held")
	}
	c.Update(nil, []string{"e"})
	if err := c.PutJWT(third, aud, token); !errors.Is(err, cache.ErrChanged) {
		t.Errorf("PutJWT for a deleted entry: %v, want ErrChanged", err)
	}
}

// A missing entry is served as before. Item reports it as missing until the server lists
// it again, it is edited, or it is deleted.
func TestMissingEntryIsServed(t *testing.T) {
	c := cache.New(cache.Config{})
	c.SetBundle(snapshot(t))
	e := entry("e", "x")
	c.Update([]*cache.Entry{e}, nil)
	put(t, c, svid(e, "A"))
	f := c.Follow()
	defer f.Close()
	f.Drain()
	check := func(when string, missing bool) {
		t.Helper()
		item, ok := c.Item("e")
		count := 0
		if missing {
			count = 1
		}
		if !ok || item.Missing != missing || c.Missing("e") != missing || c.CountMissing() != count {
			t.Errorf("%s: item %v, missing %v %v, %d in all; want %v", when, ok, item.Missing, c.Missing("e"), c.CountMissing(), missing)
		}
		if got := shown(c, "x"); !slices.Equal(got, []string{"/e"}) {
			t.Errorf("%s: shown %v", when, got)
		}
	}
	c.SetMissing(true, "e", "unknown")
	c.SetMissing(true, "e")
	check("missing", true)
	f.Drain()
	c.SetMissing(false, "e")
	check("named again", false)
	if got := f.Drain(); !slices.Equal(got, []string{"e"}) {
		t.Errorf("drained %v when an entry was named again, want it", got)
	}
	c.SetMissing(true, "e")
	c.Update([]*cache.Entry{edited(e, "/e", "x")}, nil)
	check("edited", false)
	c.SetMissing(true, "e")
	c.Update(nil, []string{"e"})
	if c.CountMissing() != 0 || c.Missing("e") {
		t.Error("a deleted entry counts as missing")
	}
}
