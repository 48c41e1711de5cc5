package cache_test

import (
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"github.com/renewd/renewd/cache"
)

func TestNeeds(t *testing.T) {
	t.Parallel()
	c := cache.New(cache.Config{})
	sub, watch := c.Subscribe(cache.Process{}, sel("uid:1")), c.Watch()
	defer sub.Close()
	defer watch.Close()
	was := uint64(0)
	step := func(what string, needed, first bool) {
		t.Helper()
		got := c.Needs("t", "hash")
		if (got != 0) != needed || first != (got > was) {
			t.Errorf("%s: got %d after %d", what, got, was)
		}
		if first {
			if !woken(sub.C()) || !woken(watch.C()) {
				t.Errorf("%s: no subscription was woken", what)
			}
			was = got
		}
	}
	c.Update([]*cache.Entry{entry("a", "uid:7")}, nil)
	woken(sub.C())
	step("no entry has it", false, false)
	c.Update([]*cache.Entry{entry("b", "uid:8", "hash:1"), entry("c", "hash:2")}, nil)
	step("two have it", true, true)
	c.Update([]*cache.Entry{entry("b", "uid:8")}, nil)
	step("one has it", true, false)
	c.Update([]*cache.Entry{entry("c", "hash:3")}, nil)
	step("the one was edited", true, false)
	c.Update(nil, []string{"c"})
	step("it is gone", false, false)
	c.Update([]*cache.Entry{entry("c", "hash:3")}, nil)
	step("it is back", true, true)
	for _, k := range [][2]string{{"t", "uid:8"}, {"t", ""}, {"u", "hash"}, {"t", "hash:3"}} {
		if n := c.Needs(k[0], k[1]); n != 0 {
			t.Errorf("%q is needed: %d", k, n)
		}
	}
}

// Whatever entries are added, changed and deleted: their kinds of selectors are needed,
// and no other.
func TestNeedsFollowsTheEntries(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		c := cache.New(cache.Config{})
		held := make(map[string]*cache.Entry)
		values := rapid.SliceOfNDistinct(rapid.SampledFrom([]string{"a:1", "a:2", "b:1", "c"}), 1, 3, rapid.ID[string])
		for range rapid.IntRange(1, 30).Draw(t, "steps") {
			id := rapid.SampledFrom([]string{"1", "2", "3"}).Draw(t, "entry")
			before := map[string]uint64{"a": c.Needs("t", "a"), "b": c.Needs("t", "b"), "c": c.Needs("t", "c")}
			if rapid.Bool().Draw(t, "remove") {
				delete(held, id)
				c.Update(nil, []string{id})
			} else {
				held[id] = entry(id, values.Draw(t, "selectors")...)
				c.Update([]*cache.Entry{held[id]}, nil)
			}
			for name, was := range before {
				needed := false
				for _, e := range held {
					for _, s := range e.Selectors {
						needed = needed || s.Value[:1] == name
					}
				}
				now := c.Needs("t", name)
				if (now != 0) != needed || now != 0 && was != 0 && now != was || now != 0 && was == 0 && now <= was {
					t.Fatalf("%s: needed %v, was %d, is %d", name, needed, was, now)
				}
			}
		}
	})
}

// A selector without a colon in its value is a kind of its own. The streams are woken once
// for all kinds of one update.
func TestManyKindsOfSelectorsInOneUpdate(t *testing.T) {
	const kinds = 500
	var entries []*cache.Entry
	for i := range kinds {
		entries = append(entries, entry(fmt.Sprint(i), fmt.Sprintf("kind%d", i)))
	}
	allocs := func(streams int) float64 {
		return testing.AllocsPerRun(1, func() {
			c := cache.New(cache.Config{})
			for range streams {
				defer c.Subscribe(cache.Process{}, sel("uid:1")).Close()
			}
			c.Update(entries, nil)
		})
	}
	if few, many := allocs(1), allocs(100); many-few > 4*kinds {
		t.Errorf("%v allocations with 100 streams, %v with one", many, few)
	}
}
