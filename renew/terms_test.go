package renew_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/cache"
)

// An entry that changes in what no SVID has is not minted again, whatever else
// of it changes.
func TestEditThatChangesNoSVIDMintsNothing(t *testing.T) {
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

// An entry that is not to be prefetched is minted when a stream opens, renewed
// while one is open, and not renewed by its age for nobody; after a taint what is
// held is replaced all the same, since it would be served.
func TestNoPrefetchIsMintedWhenAskedFor(t *testing.T) {
	drill(t, 1, nil, func(r *rig) {
		e := *mustItem(t, r.cache, entryID(0)).Entry
		e.ID, e.Selectors, e.NoPrefetch = "quiet", []cache.Selector{selector(1)}, true
		r.server.set(func() { r.server.ids["quiet"] = e.SPIFFEID })
		at := time.Now()
		r.cache.Update([]*cache.Entry{&e}, nil)
		minted := func(when string, want int) {
			t.Helper()
			synctest.Wait()
			n := 0
			for _, c := range r.server.since(at) {
				for _, id := range c.ids {
					if id == "quiet" {
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
		minted("nobody has asked", 0)
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
		// The other entry's is renewed meanwhile, and so this one makes room.
		time.Sleep(72 * time.Hour)
		minted("after three lives", 0)
		if _, wanted := r.cache.Item("quiet"); wanted {
			t.Error("it is wanted still")
		}
		sub = r.cache.Subscribe(cache.Process{}, []cache.Selector{selector(1)})
		defer sub.Close()
		minted("a stream is open again", 1)
	})
}

// What is held for nobody is served on through an outage, and when its end comes
// nothing is done for it.
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
			t.Error("it was given up before its end")
		}
		time.Sleep(48 * time.Hour)
		if calls := r.server.since(at); len(calls) > 0 {
			t.Errorf("minted %d times for nobody", len(calls))
		}
	})
}
