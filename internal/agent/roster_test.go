package agent

import (
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/upstream"
)

// listed is a roster with its clock, which the tests pass whole lists.
type listed struct {
	*roster
	now   time.Time
	cache map[string]*cache.Entry // an empty map with all changes applied
}

func newListed(entries ...*cache.Entry) *listed {
	l := &listed{roster: newRoster(30*time.Second, 5*time.Second, map[string]*cache.Entry{}), now: time.Unix(1e9, 0), cache: map[string]*cache.Entry{}}
	if len(entries) > 0 {
		l.answer(false, entries...)
	}
	return l
}

// answer applies an answer with these entries.
func (l *listed) answer(fresh bool, entries ...*cache.Entry) rosterChanges {
	var changes upstream.EntryChanges
	named := make(map[string]bool)
	for _, e := range entries {
		named[e.ID] = true
		if was := l.entries[e.ID]; was == nil || was.Revision != e.Revision || !was.CreatedAt.Equal(e.CreatedAt) {
			changes.Upsert = append(changes.Upsert, e)
		}
	}
	for id := range l.entries {
		if !named[id] {
			changes.Missing = append(changes.Missing, id)
		}
	}
	v := l.apply(changes, fresh, l.now)
	for _, id := range v.gone {
		delete(l.cache, id)
	}
	for _, e := range v.upsert {
		l.cache[e.ID] = e
	}
	return v
}

// during applies the same answer every 5 s for d, except at its end.
func (l *listed) during(d time.Duration, fresh bool, entries ...*cache.Entry) {
	for end := l.now.Add(d); l.now.Before(end); l.now = l.now.Add(5 * time.Second) {
		l.answer(fresh, entries...)
	}
}

func numbered(n int) []*cache.Entry {
	var out []*cache.Entry
	for i := range n {
		out = append(out, &cache.Entry{ID: fmt.Sprint(i), Revision: 5, CreatedAt: time.Unix(1000, 0)})
	}
	return out
}

// stays fails the test unless exactly want of the entries are served.
func (l *listed) stays(t *testing.T, when string, want int) {
	t.Helper()
	if len(l.cache) != want || !maps.Equal(l.cache, l.entries) {
		t.Errorf("%s: %d entries served (%d in the roster), want %d", when, len(l.cache), len(l.entries), want)
	}
}

func TestMissingEntriesStayForAWhile(t *testing.T) {
	all := numbered(10)
	for name, tt := range map[string]struct {
		left  int // of ten
		fresh bool
		stay  time.Duration
	}{
		"one":                         {9, false, 30 * time.Second},
		"half of them":                {5, false, 30 * time.Second},
		"more than half":              {4, false, 3 * time.Minute},
		"all":                         {0, false, 3 * time.Minute},
		"one, after an attestation":   {9, true, 3 * time.Minute},
		"all, after an attestation":   {0, true, 3 * time.Minute},
		"none, after an attestation ": {10, true, 0},
	} {
		t.Run(name, func(t *testing.T) {
			l := newListed(all...)
			l.during(tt.stay, tt.fresh, all[:tt.left]...)
			l.stays(t, "before", 10)
			if v := l.answer(false, all[:tt.left]...); len(v.gone) != 10-tt.left {
				t.Errorf("then %v are removed", v.gone)
			}
			l.stays(t, "then", tt.left)
			if len(l.missing) > 0 {
				t.Errorf("%d are still missing", len(l.missing))
			}
		})
	}
}

// An entry that returns counts as never missing.
func TestMissingEntryReturns(t *testing.T) {
	all := numbered(10)
	l := newListed(all...)
	for range 10 {
		l.during(30*time.Second, false, all[1:]...)
		if v := l.answer(false, all...); !slices.Equal(v.back, []string{"0"}) || len(v.upsert) > 0 {
			t.Errorf("back %v, to be changed %v; want 0 back and no change", v.back, v.upsert)
		}
		l.now = l.now.Add(5 * time.Second)
	}
	l.stays(t, "at the end", 10)
	if l.drop.returned != 1 || l.drop.removed != 0 || l.drop.massive {
		t.Errorf("the last drop was %+v", l.drop)
	}
}

// Time without answers does not count.
func TestOutageIsNotAnAbsence(t *testing.T) {
	all := numbered(10)
	l := newListed(all...)
	for range 3 {
		l.answer(false, all[1:]...)
		l.stays(t, "while each answer counts for two intervals at most", 10)
		l.now = l.now.Add(time.Hour) // no answer, or the process is suspended
	}
	l.answer(false, all[1:]...)
	l.stays(t, "after four answers", 9)
}

// A list that loses more than half of its entries in small steps counts as massive, too.
func TestListLostInSteps(t *testing.T) {
	all := numbered(10)
	l := newListed(all...)
	l.during(10*time.Second, false, all[:7]...)
	l.during(20*time.Second, false, all[:4]...)
	l.during(140*time.Second, false, all[:1]...)
	l.stays(t, "170 s after the first were missing", 10)
	if !l.drop.massive {
		t.Error("the drop does not count as massive")
	}
	l.during(15*time.Second, false, all[:1]...)
	l.stays(t, "after 3 minutes of the first", 7)
}

// Entries that were removed meanwhile, and did not return, count, too.
func TestListLostInStepsCountsRemovals(t *testing.T) {
	all := numbered(20)
	for name, tt := range map[string]struct {
		returned int // of the first six
		massive  bool
	}{"gone for good": {0, true}, "back again": {6, false}} {
		t.Run(name, func(t *testing.T) {
			l := newListed(all...)
			l.during(25*time.Second, false, all[6:]...)
			l.during(10*time.Second, false, all[9:]...) // after 30 s the first six are removed
			l.stays(t, "then", 14)
			l.answer(false, append(all[12:], all[:tt.returned]...)...)
			if l.drop.massive != tt.massive {
				t.Errorf("massive: %v", l.drop.massive)
			}
		})
	}
	l := newListed(all...)
	l.during(35*time.Second, false, all[10:]...)
	l.stays(t, "half of them removed", 10)
	l.during(30*time.Second, false, all[11:]...)
	if l.answer(false, all[11:]...); l.drop.massive || len(l.entries) != 9 {
		t.Errorf("an entry that is missing later counts with those before: %d entries", len(l.entries))
	}
}

// An edit is not an absence: it applies at once, also to a missing entry.
func TestEditsApplyAtOnce(t *testing.T) {
	all := numbered(10)
	edit := func(change func(*cache.Entry)) *cache.Entry {
		e := *all[0]
		change(&e)
		return &e
	}
	for name, e := range map[string]*cache.Entry{
		"another revision":    edit(func(e *cache.Entry) { e.Revision++ }),
		"deleted and created": edit(func(e *cache.Entry) { e.CreatedAt, e.Revision = e.CreatedAt.Add(time.Second), 0 }),
	} {
		for _, missing := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, missing before %v", name, missing), func(t *testing.T) {
				l := newListed(all...)
				if missing {
					l.during(20*time.Second, false, all[1:]...)
				}
				v := l.answer(false, append(all[1:], e)...)
				if l.cache["0"] != e || len(v.gone) > 0 || len(l.missing) > 0 {
					t.Errorf("served is %+v, gone %v, missing %d", l.cache["0"], v.gone, len(l.missing))
				}
			})
		}
	}
	l := newListed(all...)
	l.apply(upstream.EntryChanges{Withdrawn: []*cache.Entry{edit(func(e *cache.Entry) { e.Revision++ })}}, true, l.now)
	if l.entries["0"] != nil || len(l.missing) > 0 {
		t.Error("an entry that is no longer for workloads is served")
	}
}

// An older state that is not for workloads comes from a replica that lags: it removes
// nothing at once.
func TestOlderStateNotForWorkloads(t *testing.T) {
	all := numbered(10)
	was := *all[0]
	was.Revision--
	l := newListed(all...)
	lagging := func(d time.Duration) (gone []string) {
		for end := l.now.Add(d); l.now.Before(end); l.now = l.now.Add(5 * time.Second) {
			gone = append(gone, l.apply(upstream.EntryChanges{Withdrawn: []*cache.Entry{&was}}, false, l.now).gone...)
		}
		return gone
	}
	if gone := lagging(170 * time.Second); len(gone) > 0 || l.entries["0"] != all[0] {
		t.Errorf("an answer of a replica that lags removed %v", gone)
	}
	if v := l.answer(false, all...); !slices.Equal(v.back, []string{"0"}) {
		t.Errorf("back %v", v.back)
	}
	l.now = l.now.Add(5 * time.Second)
	if gone := lagging(3*time.Minute + 5*time.Second); !slices.Equal(gone, []string{"0"}) {
		t.Errorf("gone %v after 3 minutes, want 0: the server's data was restored", gone)
	}
}

// On a node whose pods change all the time some entry is always missing. That does not add
// up to a massive loss.
func TestSteadyChangeIsNotMassive(t *testing.T) {
	pods := numbered(100)
	l := newListed(pods[:20]...)
	for i := range 80 {
		l.during(10*time.Second, false, pods[i+1:i+21]...)
	}
	if l.drop.massive || len(l.missing) > 4 {
		t.Errorf("%d entries are missing, of which at most 3 for less than 30 s; massive: %v", len(l.missing), l.drop.massive)
	}
}

// An entry that was removed because it was missing does not return in an older state, which
// comes from a replica that lags.
func TestRemovedEntryDoesNotReturnInAnOlderState(t *testing.T) {
	all := numbered(10)
	was := *all[0]
	was.Revision--
	l := newListed(all...)
	l.during(35*time.Second, false, all[1:]...)
	l.stays(t, "removed", 9)
	lagging := append([]*cache.Entry{&was}, all[1:]...)
	l.during(170*time.Second, false, lagging...)
	l.stays(t, "named by a replica that lags", 9)
	l.answer(false, all...)
	l.stays(t, "named as it was", 10)
	l.during(35*time.Second, false, all[1:]...)
	l.stays(t, "removed again", 9)
	l.during(3*time.Minute+5*time.Second, false, lagging...)
	l.stays(t, "after 3 minutes: the server's data was restored", 10)
}

// An older state of an entry comes from a replica that lags. If it stays, the server's data
// was restored, and it applies.
func TestOlderStateIsNotAnEdit(t *testing.T) {
	all := numbered(10)
	for name, change := range map[string]func(*cache.Entry){
		"older revision":            func(e *cache.Entry) { e.Revision-- },
		"older, of the same ID":     func(e *cache.Entry) { e.CreatedAt, e.Revision = e.CreatedAt.Add(-time.Second), 7 },
		"older, creation not known": func(e *cache.Entry) { e.CreatedAt, e.Revision = time.Time{}, 4 },
	} {
		t.Run(name, func(t *testing.T) {
			old := *all[0]
			change(&old)
			list := append([]*cache.Entry{&old}, all[1:]...)
			l := newListed(all...)
			for range 3 {
				l.during(170*time.Second, false, list...)
				if v := l.answer(false, all...); l.cache["0"] != all[0] || !slices.Equal(v.back, []string{"0"}) {
					t.Fatalf("served is %+v, back %v", l.cache["0"], v.back)
				}
				l.now = l.now.Add(5 * time.Second)
			}
			l.during(3*time.Minute, false, list...)
			if l.cache["0"] != all[0] {
				t.Error("it applied before 3 minutes")
			}
			if v := l.answer(false, list...); l.cache["0"] != &old || len(v.gone) > 0 {
				t.Errorf("after 3 minutes served is %+v, gone %v", l.cache["0"], v.gone)
			}
		})
	}
}

// An answer without any entry is not yet the server's list.
func TestEmptyListIsAcceptedAfterADelay(t *testing.T) {
	for name, tt := range map[string]struct {
		restored int
		fresh    bool
		after    time.Duration
	}{
		"start":                             {0, false, 30 * time.Second},
		"after an attestation":              {0, true, 3 * time.Minute},
		"beside what was held in a restart": {3, false, 3 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			l := newListed()
			for _, e := range numbered(tt.restored) {
				l.entries[e.ID] = e
			}
			l.during(tt.after, tt.fresh)
			if l.known {
				t.Error("known too early")
			}
			if l.answer(tt.fresh); !l.known {
				t.Error("not known in the end")
			}
		})
	}
	if l := newListed(numbered(1)...); !l.known {
		t.Error("a list with an entry is not known")
	}
}

// Random answers against the definition: an entry that is removed, or returns to an older
// state, was missing from all answers for the delay. One that was missing for three minutes
// is removed.
func TestRosterAgainstItsDefinition(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := newListed(numbered(5)...)
		type answer struct {
			at    time.Duration // by roster.answered
			named map[string]*cache.Entry
			fresh bool
		}
		var answers []answer
		var at time.Duration
		last := l.now
		// lacking has the times since when answers lack entries that are served.
		lacking := func(served *cache.Entry) (since time.Duration, any bool) {
			for _, a := range slices.Backward(answers) {
				if named := a.named[served.ID]; named != nil && !older(named, served) {
					break
				}
				since, any = a.at, true
			}
			return since, any
		}
		for range rapid.IntRange(1, 120).Draw(t, "answers") {
			if rapid.IntRange(0, 9).Draw(t, "sync") == 0 {
				l.now = l.now.Add(time.Hour)
				continue
			}
			step := time.Duration(rapid.IntRange(1, 20).Draw(t, "seconds")) * time.Second
			l.now = l.now.Add(step)
			if len(answers) > 0 {
				at += min(l.now.Sub(last), 10*time.Second)
			}
			last = l.now
			a := answer{at: at, named: map[string]*cache.Entry{}, fresh: rapid.IntRange(0, 5).Draw(t, "fresh") == 0}
			var list []*cache.Entry
			for _, e := range numbered(5) {
				switch rapid.SampledFrom([]string{"same", "absent", "absent", "older", "newer"}).Draw(t, e.ID) {
				case "absent":
					continue
				case "older":
					e.Revision = 4
				case "newer":
					e.Revision += int64(len(answers)) / 20
				}
				a.named[e.ID] = e
				list = append(list, e)
			}
			if len(answers) == 0 {
				l.last = l.now // the first answer of newListed does not count
			}
			served := maps.Clone(l.entries)
			answers = append(answers, a)
			v := l.answer(a.fresh, list...)
			if !maps.Equal(l.cache, l.entries) {
				t.Fatalf("the changes make %v, the roster has %v", l.cache, l.entries)
			}
			for id, was := range served {
				since, lacks := lacking(was)
				is := l.entries[id]
				switch {
				case is == nil && (!lacks || at-since < 30*time.Second):
					t.Fatalf("%s is gone after %v", id, at-since)
				case is != nil && older(is, was) && (!lacks || at-since < 3*time.Minute):
					t.Fatalf("%s stepped back after %v", id, at-since)
				case is == was && lacks && at-since >= 3*time.Minute:
					t.Fatalf("%s is served after %v", id, at-since)
				case lacks && is == was && l.missing[id] == nil, !lacks && l.missing[id] != nil:
					t.Fatalf("%s lacks %v, missing %v", id, lacks, l.missing[id])
				case slices.Contains(v.back, id) && lacks:
					t.Fatalf("%s is back and lacks", id)
				}
			}
		}
	})
}
