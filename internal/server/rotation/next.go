// Package rotation rotates the keysets of a deployment automatically: it prepares a
// successor in time, activates it, taints the keyset that it has replaced, and removes
// that when it is safe.
//
// The next step is a pure function of the keysets, the clock and the ledger: [Next].
// There is no stored plan that a restart could lose or that an operator could
// invalidate, who may carry out any step at any time. [Scheduler] is the loop around
// it.
package rotation

import (
	"fmt"
	"strconv"
	"time"

	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/server/keyset"
)

// Actor is the actor of automatic steps in the keysets and the audit log.
const Actor = "scheduler"

// Action is a step of a rotation.
type Action string

// The actions.
const (
	None     Action = ""
	Prepare  Action = "prepare"
	Activate Action = "activate"
	Taint    Action = "taint"
	Remove   Action = "remove"
)

// Step is what automatic rotation does next.
type Step struct {
	Action Action
	Keyset string // ID; empty for None and Prepare
	// At is when the step is due. If WaitsFor is set, the step is due earlier once that
	// condition holds. At the time At it is done without the condition, except for a
	// removal, which always needs it.
	At       time.Time
	WaitsFor string
	Why      string // for the log and the audit log
}

// Due reports whether the step is due now.
func (s Step) Due(now time.Time) bool { return s.Action != None && !s.At.After(now) }

// String names the step, such as "activate ks_abc1234xyz".
func (s Step) String() string {
	if s.Keyset == "" {
		return string(s.Action)
	}
	return string(s.Action) + " " + s.Keyset
}

// Facts is the present state of the ledger. [Next] calls it only when the answer
// matters, also while a mutation is in flight, so the methods must be fast. They must be
// safe for concurrent use.
type Facts interface {
	// Behind counts the agents that report which trust bundle they apply and have not
	// reported the published one. An agent that may not have had the time to report
	// since the start of the server counts.
	Behind() int
	// Holding returns what still depends on a tainted keyset.
	Holding(k keyset.Keyset) Holding
}

// Holding describes what still depends on a tainted keyset. A keyset is not safe as
// long as anything is unknown.
type Holding struct {
	Agents            int       // that may still hold its X.509-SVIDs
	UnknownSince      time.Time // SVIDs signed since then are not known and may be valid; zero: none
	X509Safe, JWTSafe bool
	JWTExpiry         time.Time // of the last JWT-SVID; zero if not known
}

// Clock says how far the wall clock is trusted; see [clock.Clock].
type Clock interface {
	// PastFor returns for how much uptime the wall clock has been past a time.
	PastFor(t time.Time) time.Duration
	// AtLeast returns a lower bound of the true time.
	AtLeast() time.Time
}

// Next returns the next step: of the steps that are due the most urgent one, otherwise
// the earliest. The policy must be one that [Policy.For] has returned, the keysets must be
// in order of issue, and one of them must be active.
//
// Succession. The active keyset's successor is the first prepared keyset that has never
// signed and outlives it by the preparation threshold, whoever prepared it. If there is
// none at that threshold, one is prepared. It is activated at the activation threshold,
// counted from its issue or from the preparation threshold, whichever is later, but after
// half of the remaining time at the latest. If agents are behind then, the activation
// waits for them for half of the time that remains then: an agent that has not applied a
// new bundle by then will not, and when the active keyset expires all agents fail. If the
// active keyset has expired, the newest keyset that can succeed it is activated at once;
// one is prepared if there is none. The same applies if the active keyset is not yet
// valid, because it was made by a clock that was ahead.
//
// Retirement. A keyset that automatic rotation has replaced is tainted at the taint
// threshold, and removed when nothing depends on it. Any other keyset is left to the
// operators until it has expired. Every expired keyset is tainted, and removed when the
// ledger knows nothing that depends on it. The clock that determines the expiry may be
// wrong, so such a step waits until the process has been up for [clock.Hold] past the
// expiry. The activation and taint thresholds have passed when that is certain, too.
func Next(now time.Time, c Clock, p Policy, keysets []keyset.Keyset, f Facts) Step {
	var next Step
	if p.Mode == Off {
		return next
	}
	consider := func(s Step) {
		if next.Action == None || (!next.Due(now) && s.At.Before(next.At)) {
			next = s
		}
	}
	// The most urgent first.
	consider(succession(now, c, p, keysets, f))
	for _, k := range keysets {
		if k.State == keyset.Prepared {
			consider(taint(now, c, p, k))
		}
	}
	for _, k := range keysets {
		if k.State == keyset.Tainted {
			consider(removal(now, c, k, f))
		}
	}
	return next
}

func succession(now time.Time, c Clock, p Policy, keysets []keyset.Keyset, f Facts) Step {
	var active keyset.Keyset
	for _, k := range keysets {
		if k.State == keyset.Active {
			active = k
		}
	}
	expires := active.ExpiresAt
	if now.Before(active.ValidFrom) {
		expires = now // its SVIDs do not verify
	}
	begin := expires.Add(-p.PreparationThreshold)
	why := fmt.Sprintf("active keyset %s expires %s", active.ID, text(expires))
	switch {
	case now.Before(active.ValidFrom):
		why = fmt.Sprintf("active keyset %s is not valid before %s", active.ID, text(active.ValidFrom))
	case !now.Before(expires):
		why = fmt.Sprintf("active keyset %s has expired", active.ID)
	}
	k, ok := successor(now, p, keysets, expires)
	if !ok {
		return Step{Action: Prepare, At: begin, Why: why}
	}
	from := begin
	if k.IssuedAt.After(from) {
		from = k.IssuedAt
	}
	ready := earliest(after(now, c, from, p.ActivationThreshold), middle(from, expires), expires)
	s := Step{Action: Activate, Keyset: k.ID, At: ready, Why: why}
	if now.Before(ready) {
		return s
	}
	if n := f.Behind(); n > 0 {
		waitsFor := agents(n) + " that have not applied the trust bundle"
		if n == 1 {
			waitsFor = "1 agent that has not applied the trust bundle"
		}
		if limit := middle(ready, expires); now.Before(limit) {
			s.At, s.WaitsFor = limit, waitsFor
		} else {
			s.Why += ", no longer waiting for " + waitsFor
		}
	}
	return s
}

// successor returns the keyset that succeeds the active one, which expires at expires. A
// keyset that is issued in the future does not count.
func successor(now time.Time, p Policy, keysets []keyset.Keyset, expires time.Time) (last keyset.Keyset, ok bool) {
	// Counted from the active keyset's expiry, not from now: a keyset that qualifies once
	// has to qualify until its activation, or another one would be prepared meanwhile.
	least := expires.Add(p.PreparationThreshold)
	for _, k := range keysets {
		if k.State != keyset.Prepared || !k.SteppedDownAt.IsZero() || now.Before(k.IssuedAt) || !now.Before(k.ExpiresAt) {
			continue
		}
		if !k.ExpiresAt.Before(least) {
			return k, true
		}
		last, ok = k, !now.Before(expires)
	}
	return last, ok
}

func taint(now time.Time, c Clock, p Policy, k keyset.Keyset) Step {
	s := Step{Action: Taint, Keyset: k.ID, At: expired(now, c, k), Why: "it has expired"}
	if k.SteppedDownBy == Actor {
		if at := after(now, c, k.SteppedDownAt, p.TaintThreshold); at.Before(s.At) {
			s.At, s.Why = at, "it was replaced "+text(k.SteppedDownAt)
		}
	}
	return s
}

func removal(now time.Time, c Clock, k keyset.Keyset, f Facts) Step {
	s := Step{Action: Remove, Keyset: k.ID, At: expired(now, c, k), Why: "it has expired"}
	due := s.Due(now)
	if k.SteppedDownBy != Actor && !due {
		return s
	}
	switch h := f.Holding(k); {
	case !h.X509Safe && !h.UnknownSince.IsZero():
		s.WaitsFor = "X.509-SVIDs that were signed after " + text(h.UnknownSince) + " and are not known since a restore"
	case !h.X509Safe && h.Agents == 0:
		s.WaitsFor = "X.509-SVIDs that are being signed"
	case !h.X509Safe:
		s.WaitsFor = "X.509-SVIDs of " + agents(h.Agents)
	case !h.JWTSafe && h.JWTExpiry.IsZero():
		s.WaitsFor = "JWT-SVIDs"
	case !h.JWTSafe:
		s.WaitsFor = "JWT-SVIDs that are valid until " + text(h.JWTExpiry)
	case !due:
		s.At, s.Why = now, "nothing depends on it"
	}
	if s.WaitsFor != "" {
		// The ledger decides, soon after the expiry.
		if s.At = clock.Over(k.ExpiresAt); !s.At.After(now) {
			s.At = now.Add(longestSleep)
		}
	}
	return s
}

// expired returns when a keyset has certainly expired: nothing that it signed is valid by
// any machine's clock, and the clock that says so has not just gone ahead.
func expired(now time.Time, c Clock, k keyset.Keyset) time.Time {
	return now.Add(clock.Hold - c.PastFor(clock.Over(k.ExpiresAt)))
}

// after returns when d has certainly passed since t, by the uptime or by the lower bound of
// the time. A clock that goes ahead does not skip that time. After an outage the bound lags
// behind a t that came later, and the uptime counts.
func after(now time.Time, c Clock, t time.Time, d time.Duration) time.Time {
	if left := d - max(c.AtLeast().Sub(t), c.PastFor(t)); left > 0 {
		return now.Add(left)
	}
	return t.Add(d)
}

func middle(a, b time.Time) time.Time { return a.Add(b.Sub(a) / 2) }

func earliest(t time.Time, others ...time.Time) time.Time {
	for _, o := range others {
		if o.Before(t) {
			t = o
		}
	}
	return t
}

func agents(n int) string {
	if n == 1 {
		return "1 agent"
	}
	return strconv.Itoa(n) + " agents"
}

func text(t time.Time) string { return clock.Text(t) }
