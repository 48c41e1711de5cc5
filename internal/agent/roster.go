package agent

import (
	"time"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/upstream"
)

// longRemovalDelay is for absences that are rarely meant. New agents of a SPIRE
// server get no entries for 70 to 90 s (spiffe/spire#6876), its caches drop and
// add again whole lists (#7198, #7210, #4696), and it closes connections after
// three minutes, so that an agent leaves a replica that lags.
const longRemovalDelay = 3 * time.Minute

// roster is the list of entries that this node serves. It decides what an
// answer of the server changes about it. What an answer adds or edits counts at
// once. That it lacks an entry is not yet the truth: the entry is served until
// it has been missing for a while of successful syncs. An entry that is there in
// an older state than the one held comes from a replica that lags, and counts as
// missing, too.
//
// It is pure: the time comes with the answers, and what to do is returned.
type roster struct {
	delay   time.Duration // entry_removal_delay
	gap     time.Duration // the most that one answer counts for
	entries map[string]*cache.Entry
	missing map[string]*absence // some of entries
	removed map[string]removal  // those that were entries until a while ago
	drop    drop
	// known says that the server has told its list: it has named an entry, or has
	// named none for long enough. Until then nothing is known of any caller.
	known   bool
	nothing *absence // of all entries, while known is not set

	answered time.Duration // how long the server has been answering
	last     time.Time     // of the last answer
}

// absence is what a roster knows of something that the answers lack.
type absence struct {
	since time.Duration // by roster.answered
	delay time.Duration // until it is believed
}

// removal is an entry that was removed, in the last state that is known of it.
type removal struct {
	entry *cache.Entry
	at    time.Duration // by roster.answered
}

// lack is what an answer says of an entry that counts as missing.
type lack struct {
	older bool         // it is there in an older state
	entry *cache.Entry // that state; nil where it was not for workloads
}

// drop is a time during which something is missing without a break, or the last
// such time.
type drop struct {
	since             time.Duration // by roster.answered
	massive           bool          // more than half of all was missing or just removed
	removed, returned int
}

// verdict is what is to be done about one answer.
type verdict struct {
	upsert        []*cache.Entry
	gone          []string // deleted
	missing, back []string // missing from now on, and no longer
	older         int      // of all that is missing, there in an older state
}

// newRoster returns the roster of a node that holds these entries and asks every
// interval.
func newRoster(delay, interval time.Duration, entries map[string]*cache.Entry) *roster {
	return &roster{delay: delay, gap: 2 * interval, entries: entries, missing: make(map[string]*absence), removed: make(map[string]removal)}
}

// take takes in the answer of one sync that came at now, by the clock that is
// never set. fresh says that the node was attested a short while before.
func (r *roster) take(answer upstream.EntryChanges, fresh bool, now time.Time) verdict {
	if !r.last.IsZero() {
		// In an outage, or while this process was frozen, the server has said
		// nothing: an answer speaks for the time since the one before, up to gap.
		r.answered += min(now.Sub(r.last), r.gap)
	}
	r.last = now
	r.learn(answer, fresh)

	var v verdict
	before, held := len(r.missing), len(r.entries)
	lacking := make(map[string]lack, len(answer.Missing))
	for _, id := range answer.Missing {
		lacking[id] = lack{}
	}
	for _, e := range answer.Upsert {
		was := r.entries[e.ID]
		if was != nil && older(e, was) {
			lacking[e.ID] = lack{older: true, entry: e}
			continue
		}
		if was == nil && r.reverts(e) {
			continue
		}
		delete(r.removed, e.ID)
		r.entries[e.ID] = e
		v.upsert = append(v.upsert, e)
	}
	for _, e := range answer.Withdrawn {
		if older(e, r.entries[e.ID]) {
			lacking[e.ID] = lack{older: true}
			continue
		}
		r.remove(e)
		v.gone = append(v.gone, e.ID)
	}
	if before == 0 && len(lacking) > 0 {
		r.drop = drop{since: r.answered}
	}
	for id := range r.missing {
		if _, still := lacking[id]; !still {
			delete(r.missing, id)
			r.drop.returned++
			v.back = append(v.back, id)
		}
	}
	// Together with what was removed a short while before, so that a list that
	// crumbles in several steps is no smaller loss. What goes and comes all the
	// time does not add up.
	lost := r.lost()
	massive := 2*(len(lacking)+lost) > held+lost
	r.drop.massive = r.drop.massive || massive && len(lacking) > 0
	for id, lack := range lacking {
		a := r.missing[id]
		if a == nil {
			a = &absence{since: r.answered, delay: r.delay}
			r.missing[id] = a
			v.missing = append(v.missing, id)
		}
		if lack.older {
			v.older++
		}
		if massive || fresh || lack.older {
			a.delay = max(a.delay, longRemovalDelay)
		}
		if r.answered-a.since < a.delay {
			continue
		}
		delete(r.missing, id)
		r.drop.removed++
		if lack.entry != nil { // the server's data was restored
			r.entries[id] = lack.entry
			v.upsert = append(v.upsert, lack.entry)
			continue
		}
		r.remove(r.entries[id])
		v.gone = append(v.gone, id)
	}
	return v
}

// remove takes an entry out and remembers its last state, which is e, for a while.
func (r *roster) remove(e *cache.Entry) {
	delete(r.entries, e.ID)
	r.removed[e.ID] = removal{e, r.answered}
}

// reverts reports whether e, which is not held, is an older state of an entry
// that was removed not long ago: to serve it would undo an edit.
func (r *roster) reverts(e *cache.Entry) bool {
	was, known := r.removed[e.ID]
	return known && older(e, was.entry)
}

// lost counts what was removed during this drop and a short while ago, and
// forgets what was removed long ago.
func (r *roster) lost() int {
	n := 0
	for id, was := range r.removed {
		switch age := r.answered - was.at; {
		case age >= longRemovalDelay:
			delete(r.removed, id)
		case age < r.delay && was.at > r.drop.since:
			n++
		}
	}
	return n
}

// learn decides whether the server has told its list. An answer without a single
// entry is missing all of them, those that this node never had among them.
func (r *roster) learn(answer upstream.EntryChanges, fresh bool) {
	if len(answer.Upsert)+len(answer.Withdrawn) > 0 || len(answer.Missing) < len(r.entries) {
		r.known = true
	}
	if r.known {
		return
	}
	if r.nothing == nil {
		r.nothing = &absence{since: r.answered, delay: r.delay}
	}
	if fresh || len(r.entries) > 0 {
		r.nothing.delay = max(r.nothing.delay, longRemovalDelay)
	}
	r.known = r.answered-r.nothing.since >= r.nothing.delay
}

// older reports whether a is an older state than b of the entry with their ID. A
// server counts the revisions of an entry up from its creation.
func older(a, b *cache.Entry) bool {
	if !a.CreatedAt.IsZero() && !b.CreatedAt.IsZero() && !a.CreatedAt.Equal(b.CreatedAt) {
		return a.CreatedAt.Before(b.CreatedAt)
	}
	return a.Revision < b.Revision
}
