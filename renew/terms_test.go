package renew_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/cache"
)

// An edit that does not change the SVID of an entry mints nothing.
func TestEditWithoutAnotherSVIDMintsNothing(t *testing.T) {
	drill(t, 50, nil, func(r *rig) {
		edited := make([]*cache.Entry, 50)
		for i := range edited {
			e := *mustItem(t, r.cache, entryID(i)).Entry
			e.Revision++
			e.Hint, e.JWTTTL = "edited", time.Minute
			edited[i] = &e
		}
		at := time.Now()
		r.cache.Update(edited, nil)
		synctest.Wait()
		time.Sleep(time.Hour)
		if calls := r.server.since(at); len(calls) > 0 {
			t.Errorf("%v minted because of the edit", calls)
		}
	})
}

// An entry with NoPrefetch is minted when a stream opens and renewed by its age only
// while a stream is open. After a taint its SVID is replaced in any case, because the
// next stream would be served it.
func TestNoPrefetchIsMintedForAStream(t *testing.T) {
	drill(t, 1, nil, func(r *rig) {
		e := *mustItem(t, r.cache, entryID(0)).Entry
		e.ID, e.Selectors, e.NoPrefetch = "idle", []cache.Selector{selector(1)}, true
		r.server.set(func() { r.server.ids["idle"] = e.SPIFFEID })
		at := time.Now()
		r.cache.Update([]*cache.Entry{&e}, nil)
		minted := func(when string, want int) {
			t.Helper()
			synctest.Wait()
			n := 0
			for _, c := range r.server.since(at) {
				for _, id := range c.ids {
					if id == "idle" {
						n++
					}
				}
			}
			if n != want {
				t.Errorf("%s: minted %d times, want %d", when, n, want)
			}
			time.Sleep(time.Nanosecond)
			at = time.Now()
		}
		time.Sleep(time.Hour)
		minted("no stream yet", 0)
		sub := r.cache.Subscribe(cache.Process{}, []cache.Selector{selector(1)})
		minted("a stream is open", 1)
		time.Sleep(20 * time.Hour)
		minted("past half-life", 1)
		sub.Close()
		begin := r.taint()
		r.sleepUntil(begin.Add(time.Second))
		minted("its authority was tainted", 1)
		if r.cache.Held(r.ca.id) != 0 {
			t.Error("an SVID still depends on the tainted authority")
		}
		// The other entry's SVID is renewed meanwhile, and this one is evicted.
		time.Sleep(72 * time.Hour)
		minted("after three lives", 0)
		if _, wanted := r.cache.Item("idle"); wanted {
			t.Error("it is still wanted")
		}
		sub = r.cache.Subscribe(cache.Process{}, []cache.Selector{selector(1)})
		defer sub.Close()
		minted("a stream is open again", 1)
	})
}

// An SVID without a stream is served through an outage and not minted again when it
// expires.
func TestNoPrefetchThroughAnOutage(t *testing.T) {
	drill(t, 0, nil, func(r *rig) {
		e := *r.server.entries(1)[0]
		e.NoPrefetch = true
		r.cache.Update([]*cache.Entry{&e}, nil)
		sub := r.cache.Subscribe(cache.Process{}, e.Selectors)
		synctest.Wait()
		sub.Close()
		time.Sleep(time.Nanosecond)
		at := time.Now()
		time.Sleep(23 * time.Hour)
		if v := r.cache.Match(e.Selectors); len(v.Identities) != 1 {
			t.Error("it was dropped before it expired")
		}
		time.Sleep(48 * time.Hour)
		if calls := r.server.since(at); len(calls) > 0 {
			t.Errorf("minted %d times without a stream", len(calls))
		}
	})
}
