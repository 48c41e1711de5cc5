package agent

import (
	"time"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/upstream"
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
	entries map[string]*cache.Entry
	missing map[string]*absence // some of entries
	drop    drop
	// known says that the server has told its list: it has named an entry, or has
	// named none for long enough. Until then nothing is known of any caller.
	known   bool
	nothing *absence // of all entries, while known is not set

	answered time.Duration // how long the server has been answering
	last     time.Time     // of the last answer; zero after a failure
}

// absence is what a roster knows of something that the answers lack.
type absence struct {
	since time.Duration // by roster.answered
	delay time.Duration // until it is believed
}

// drop is a time during which something is missing without a break, or the last
// such time.
type drop struct {
	of                int  // entries held when it began
	massive           bool // more than half of them were missing or removed
	removed, returned int
}

// verdict is what is to be done about one answer.
type verdict struct {
	upsert        []*cache.Entry
	gone          []string // deleted
	missing, back []string // missing from now on, and no longer
	older         int      // of all that is missing, there in an older state
}

func newRoster(delay time.Duration, entries map[string]*cache.Entry) *roster {
	return &roster{delay: delay, entries: entries, missing: make(map[string]*absence)}
}

// failed notes a sync without an answer: nothing counts as missing until the
// next one.
func (r *roster) failed() { r.last = time.Time{} }

// take takes in the answer of one sync that came at now, by the clock that is
// never set. fresh says that the node was attested a short while before.
func (r *roster) take(answer upstream.EntryChanges, fresh bool, now time.Time) verdict {
	if !r.last.IsZero() {
		r.answered += now.Sub(r.last)
	}
	r.last = now
	r.learn(answer, fresh)

	var v verdict
	before, held := len(r.missing), len(r.entries)
	lacking := make(map[string]*cache.Entry, len(answer.Missing)) // with their older state, if they have one
	for _, id := range answer.Missing {
		lacking[id] = nil
	}
	for _, e := range answer.Upsert {
		if was := r.entries[e.ID]; was != nil && older(e, was) {
			lacking[e.ID] = e
			continue
		}
		r.entries[e.ID] = e
		v.upsert = append(v.upsert, e)
	}
	for _, id := range answer.Withdrawn {
		delete(r.entries, id)
		v.gone = append(v.gone, id)
	}
	if before == 0 && len(lacking) > 0 {
		r.drop = drop{of: held}
	}
	for id := range r.missing {
		if _, still := lacking[id]; !still {
			delete(r.missing, id)
			r.drop.returned++
			v.back = append(v.back, id)
		}
	}
	// Counted against what was held when the drop began, so that a list that
	// crumbles in several steps is no smaller loss.
	massive := 2*(len(lacking)+r.drop.removed) > r.drop.of
	r.drop.massive = r.drop.massive || massive && len(lacking) > 0
	for id, older := range lacking {
		a := r.missing[id]
		if a == nil {
			a = &absence{since: r.answered, delay: r.delay}
			r.missing[id] = a
			v.missing = append(v.missing, id)
		}
		if older != nil {
			v.older++
		}
		if massive || fresh || older != nil {
			a.delay = max(a.delay, longRemovalDelay)
		}
		if r.answered-a.since < a.delay {
			continue
		}
		delete(r.missing, id)
		r.drop.removed++
		if older != nil { // the server's data was restored
			r.entries[id] = older
			v.upsert = append(v.upsert, older)
			continue
		}
		delete(r.entries, id)
		v.gone = append(v.gone, id)
	}
	return v
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
