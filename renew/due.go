// Package renew decides when each X.509-SVID of the node is renewed, and does
// it.
//
// What to renew is a pure function of what is held and what the trust bundle
// says now: [Due]. There is no list of taints already handled, so nothing can
// be forgotten: not by a restart, not by a lost wake-up, not because a lagging
// server handed out an SVID of a tainted authority after everyone else was
// done. [Renewer] is the loop around that function: one goroutine that owns
// all queues, a rate limit for what a taint makes due, batches for the rest,
// and bounded workers that make keys, ask the [Minter] and verify its answers.
// An SVID is replaced only by one that is verified and no worse.
package renew

import (
	"time"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
)

// Reason is why an SVID is due.
type Reason string

// The reasons, as they appear in logs and metrics. Only ReasonTaint waits for
// the node's delay. It waits for the rate, and so does ReasonHalfLife where a
// tainted authority signed the last answer.
const (
	ReasonFirst    Reason = "first"             // none is held
	ReasonHalfLife Reason = "half_life"         // RenewAt has passed
	ReasonEntry    Reason = "entry_changed"     // held for another revision of the entry
	ReasonTaint    Reason = "taint"             // its authority is tainted
	ReasonRemoved  Reason = "authority_removed" // its authority has left the bundle
)

// Reasons lists every Reason, for metrics that must exist before they count.
var Reasons = []Reason{ReasonFirst, ReasonHalfLife, ReasonEntry, ReasonTaint, ReasonRemoved}

// Policy is what besides state decides when an SVID is due.
type Policy struct {
	// Delay is how long after the node has seen an authority's taint mark the
	// renewal begins. It must always answer the same for one authority.
	Delay func(authorityID string) time.Duration
}

// Due says when the item is to be renewed and why. A zero time means at once.
// The reason is the one that holds at now: an SVID whose half-life passes
// while it waits in a taint's queue is due for its half-life.
func Due(it cache.Item, s *bundle.Snapshot, p Policy, now time.Time) (time.Time, Reason) {
	if it.SVID == nil {
		return time.Time{}, ReasonFirst
	}
	if !it.SVID.For(it.Entry) {
		return time.Time{}, ReasonEntry
	}
	half := it.SVID.RenewAt
	switch state, since := s.State(it.SVID.Authority); state {
	case bundle.Removed:
		return time.Time{}, ReasonRemoved
	case bundle.Tainted:
		at := since.Add(p.Delay(it.SVID.Authority))
		if now.Before(since) {
			// The clock was set back since the mark was seen: how much of the
			// delay has passed is not known, so none of it is left.
			at = now
		}
		if at.Before(half) && now.Before(half) {
			return at, ReasonTaint
		}
	}
	return half, ReasonHalfLife
}

// old reports whether an SVID that has just been minted is due again too soon:
// this node's clock is far ahead of the server's, or the authority is about to
// end. The next would be no better, so it is asked for with pauses.
func old(s *cache.SVID, now time.Time) bool {
	return s.RenewAt.Sub(now) < s.NotAfter.Sub(now)/4
}

// better reports whether got is no worse than held. One of a trusted authority
// never is, also where it ends sooner: how long SVIDs live is the server's to
// say. One of a tainted authority does not replace one of a trusted authority,
// unless that one has less than a tenth of its life left: a tainted SVID is
// better than none.
func (r *Renewer) better(got, held *cache.SVID, now time.Time) bool {
	if held == nil || held.Revision != got.Revision || !held.Created.Equal(got.Created) || !held.NotAfter.After(now) {
		return true
	}
	gotState, _ := r.snapshot.State(got.Authority)
	heldState, _ := r.snapshot.State(held.Authority)
	rank := map[bundle.State]int{bundle.Removed: 0, bundle.Tainted: 1, bundle.Trusted: 2}
	switch {
	case gotState == bundle.Trusted, rank[gotState] > rank[heldState]:
		return true
	case rank[gotState] == rank[heldState]:
		return !got.NotAfter.Before(held.NotAfter)
	}
	return !now.Before(lastTenth(held))
}

// lastTenth is when the last tenth of an SVID's life begins.
func lastTenth(s *cache.SVID) time.Time {
	return s.NotAfter.Add(-s.NotAfter.Sub(s.NotBefore) / 10)
}
