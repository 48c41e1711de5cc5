package agent

import (
	"time"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/upstream"
)

// longRemovalDelay is the delay for absences that are rarely intended. New agents of a
// SPIRE server get no entries for 70 to 90 s (spiffe/spire#6876), and its caches drop
// and restore whole lists (#7198, #7210, #4696). It closes connections after three
// minutes, so by then the agent has left a replica that lags.
const longRemovalDelay = 3 * time.Minute

// roster is the list of entries that this node serves. It decides how an answer of the
// server changes the list. Additions and edits apply at once. An entry that an answer
// lacks is served until it has been missing from successful syncs for a delay. An entry
// in an older state than the one held comes from a replica that lags, and counts as
// missing, too.
//
// A roster is pure: the caller passes the time and applies the changes.
type roster struct {
	delay   time.Duration // entry_removal_delay
	maxStep time.Duration // the most that answered grows with one answer
	entries map[string]*cache.Entry
	missing map[string]*absence // entries that the last answer lacked
	removed map[string]removal  // entries removed recently
	drop    drop
	// known is set once the server has sent its list: it has named an entry, or has
	// named none for long enough. Until then no workload can be refused.
	known     bool
	emptyList *absence // of all entries, while known is not set

	answered time.Duration // how long the server has answered, without outages
	last     time.Time     // time of the last answer
}

// absence is the time for which something has been missing.
type absence struct {
	since time.Duration // by roster.answered
	delay time.Duration // until it counts as removed
}

// removal is a removed entry in its last known state.
type removal struct {
	entry *cache.Entry
	at    time.Duration // by roster.answered
}

// absentEntry is an entry that counts as missing in one answer.
type absentEntry struct {
	older bool         // the answer has an older state
	entry *cache.Entry // that state; nil if it is not for workloads
}

// drop is the current or last period in which entries are missing.
type drop struct {
	since             time.Duration // by roster.answered
	massive           bool          // more than half of the entries were missing or recently removed
	removed, returned int
}

// rosterChanges is how one answer changes a roster.
type rosterChanges struct {
	upsert        []*cache.Entry
	gone          []string // removed
	missing, back []string // newly missing, and no longer missing
	older         int      // number of missing entries that the answer has in an older state
}

// newRoster returns the roster of a node that holds these entries and syncs every
// interval.
func newRoster(delay, interval time.Duration, entries map[string]*cache.Entry) *roster {
	return &roster{delay: delay, maxStep: 2 * interval, entries: entries, missing: make(map[string]*absence), removed: make(map[string]removal)}
}

// apply applies the answer of one sync, which came at now by the monotonic clock.
// recentlyAttested means that the server's list may still be incomplete.
func (r *roster) apply(answer upstream.EntryChanges, recentlyAttested bool, now time.Time) rosterChanges {
	if !r.last.IsZero() {
		// An outage, or a pause of this process, does not count: an answer covers the
		// time since the one before, up to maxStep.
		r.answered += min(now.Sub(r.last), r.maxStep)
	}
	r.last = now
	r.updateKnown(answer, recentlyAttested)

	var v rosterChanges
	before, held := len(r.missing), len(r.entries)
	absent := make(map[string]absentEntry, len(answer.Missing))
	for _, id := range answer.Missing {
		absent[id] = absentEntry{}
	}
	for _, e := range answer.Upsert {
		was := r.entries[e.ID]
		if was != nil && older(e, was) {
			absent[e.ID] = absentEntry{older: true, entry: e}
			continue
		}
		if was == nil && r.undoesEdit(e) {
			continue
		}
		delete(r.removed, e.ID)
		r.entries[e.ID] = e
		v.upsert = append(v.upsert, e)
	}
	for _, e := range answer.Withdrawn {
		if older(e, r.entries[e.ID]) {
			absent[e.ID] = absentEntry{older: true}
			continue
		}
		r.remove(e)
		v.gone = append(v.gone, e.ID)
	}
	if before == 0 && len(absent) > 0 {
		r.drop = drop{since: r.answered}
	}
	for id := range r.missing {
		if _, still := absent[id]; !still {
			delete(r.missing, id)
			r.drop.returned++
			v.back = append(v.back, id)
		}
	}
	// Recent removals count, too, so that losing the list in several steps is as
	// massive as losing it at once.
	lost := r.recentlyRemoved()
	massive := 2*(len(absent)+lost) > held+lost
	r.drop.massive = r.drop.massive || massive && len(absent) > 0
	for id, e := range absent {
		a := r.missing[id]
		if a == nil {
			a = &absence{since: r.answered, delay: r.delay}
			r.missing[id] = a
			v.missing = append(v.missing, id)
		}
		if e.older {
			v.older++
		}
		if massive || recentlyAttested || e.older {
			a.delay = max(a.delay, longRemovalDelay)
		}
		if r.answered-a.since < a.delay {
			continue
		}
		delete(r.missing, id)
		r.drop.removed++
		if e.entry != nil { // the server's data was restored from a backup
			r.entries[id] = e.entry
			v.upsert = append(v.upsert, e.entry)
			continue
		}
		r.remove(r.entries[id])
		v.gone = append(v.gone, id)
	}
	return v
}

// remove removes an entry, whose last state is e.
func (r *roster) remove(e *cache.Entry) {
	delete(r.entries, e.ID)
	r.removed[e.ID] = removal{e, r.answered}
}

// undoesEdit reports whether e, which is not held, is an older state of a recently
// removed entry: serving it would undo an edit.
func (r *roster) undoesEdit(e *cache.Entry) bool {
	was, known := r.removed[e.ID]
	return known && older(e, was.entry)
}

// recentlyRemoved counts the entries removed recently during this drop, and forgets
// those removed long ago.
func (r *roster) recentlyRemoved() int {
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

// updateKnown updates known. An answer without any entry may come from a server whose
// list is not complete yet, so it needs a delay, as missing entries do.
func (r *roster) updateKnown(answer upstream.EntryChanges, recentlyAttested bool) {
	if len(answer.Upsert)+len(answer.Withdrawn) > 0 || len(answer.Missing) < len(r.entries) {
		r.known = true
	}
	if r.known {
		return
	}
	if r.emptyList == nil {
		r.emptyList = &absence{since: r.answered, delay: r.delay}
	}
	if recentlyAttested || len(r.entries) > 0 {
		r.emptyList.delay = max(r.emptyList.delay, longRemovalDelay)
	}
	r.known = r.answered-r.emptyList.since >= r.emptyList.delay
}

// older reports whether a is an older state of the entry than b. A server counts the
// revisions of an entry from its creation.
func older(a, b *cache.Entry) bool {
	if !a.CreatedAt.IsZero() && !b.CreatedAt.IsZero() && !a.CreatedAt.Equal(b.CreatedAt) {
		return a.CreatedAt.Before(b.CreatedAt)
	}
	return a.Revision < b.Revision
}
