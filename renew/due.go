// Package renew decides when each X.509-SVID of the node is renewed, and renews it.
//
// What to renew is a pure function of the SVIDs held and the current trust bundle:
// [Due]. There is no list of taints already handled. So no restart, no lost wake-up
// and no SVID that a lagging server signs late can be missed. [Renewer] is the loop
// around that function: one goroutine owns all queues, a rate limit applies to
// renewals because of a taint, batches carry all others, and a bounded number of
// workers make keys, call the [Minter] and verify its answers. Only a verified SVID
// that is no worse replaces an SVID. [State] names where each one is in its life.
package renew

import (
	"time"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
)

// Reason is why an SVID is due.
type Reason string

// The reasons, as they appear in logs and metrics. Only ReasonTaint waits for the
// node's delay. The rate applies to ReasonTaint, and to ReasonHalfLife if a tainted
// authority signed the last answer.
const (
	ReasonFirst    Reason = "first"             // none is held
	ReasonHalfLife Reason = "half_life"         // RenewAt has passed
	ReasonEntry    Reason = "entry_changed"     // held for another revision of the entry
	ReasonTaint    Reason = "taint"             // its authority is tainted
	ReasonRemoved  Reason = "authority_removed" // its authority has left the bundle
)

// Reasons lists every Reason.
var Reasons = []Reason{ReasonFirst, ReasonHalfLife, ReasonEntry, ReasonTaint, ReasonRemoved}

// Policy is what decides besides the state when an SVID is due.
type Policy struct {
	// Delay returns how long after the node first saw an authority's taint mark
	// the renewal begins. It must always return the same for one authority.
	Delay func(authorityID string) time.Duration
}

// Due returns when the item is due and why. A zero time means at once. The reason is
// the one at now: an SVID whose half-life passes while it waits in the wave is due
// for its half-life.
func Due(it cache.Item, s *bundle.Snapshot, p Policy, now time.Time) (time.Time, Reason) {
	if it.SVID == nil {
		return time.Time{}, ReasonFirst
	}
	if !it.SVID.For(it.Entry) {
		return time.Time{}, ReasonEntry
	}
	half := it.RenewAt()
	switch state, since := s.State(it.SVID.Authority); state {
	case bundle.Removed:
		return time.Time{}, ReasonRemoved
	case bundle.Tainted:
		at := since.Add(p.Delay(it.SVID.Authority))
		if now.Before(since) {
			// The clock was set back after the mark was seen. How much of the delay
			// has passed is unknown, so the SVID is due now.
			at = now
		}
		if at.Before(half) && now.Before(half) {
			return at, ReasonTaint
		}
	}
	return half, ReasonHalfLife
}

// dueSoon reports whether an SVID that was just minted is due again too soon: this
// node's clock is far ahead of the server's, or the authority is about to expire. The
// next one would be no better, so the item backs off.
func dueSoon(s *cache.SVID, now time.Time) bool {
	return s.RenewAt.Sub(now) < s.NotAfter.Sub(now)/4
}

// noWorse reports whether got may replace held. An SVID of a trusted authority always
// may, even if it expires sooner, because the server decides how long SVIDs live. One
// of a tainted authority replaces one of a trusted authority only in the last tenth of
// that one's life: a tainted SVID is better than none.
func (r *Renewer) noWorse(got, held *cache.SVID, now time.Time) bool {
	if held == nil || !held.Equivalent(got) || !held.NotAfter.After(now) {
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

// lastTenth returns when the last tenth of an SVID's life begins.
func lastTenth(s *cache.SVID) time.Time {
	return s.NotAfter.Add(-s.NotAfter.Sub(s.NotBefore) / 10)
}
