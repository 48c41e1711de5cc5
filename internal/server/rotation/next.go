// Package rotation rotates the keysets of a deployment by itself: it prepares a
// successor in time, activates it, and taints and removes what it has replaced
// once that is safe.
//
// What is to be done is a pure function of the keysets, the clock and what the
// ledger says: [Next]. There is no plan that could be lost in a restart or
// upset by an operator, who may carry out any step at any time. [Scheduler] is
// the loop around it.
package rotation

import (
	"fmt"
	"strconv"
	"time"

	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/server/keyset"
)

// Actor is who carries out the steps, as the keysets and the audit log have it.
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
	// At is when it is done. Where WaitsFor is set it is done earlier if that
	// comes to be, and at that time all the same; a removal only if it has come to
	// be by then.
	At       time.Time
	WaitsFor string
	Why      string // for the log and the audit log
}

// Due reports whether the step is to be done now.
func (s Step) Due(now time.Time) bool { return s.Action != None && !s.At.After(now) }

// String names the step, such as "activate ks_abc1234xyz".
func (s Step) String() string {
	if s.Keyset == "" {
		return string(s.Action)
	}
	return string(s.Action) + " " + s.Keyset
}

// Facts is what the ledger says at the moment of a call. It is asked only when
// the answer decides, also while a mutation is in flight, so it must be fast. It
// must be safe for concurrent use.
type Facts interface {
	// Behind counts the agents that have not said that they have applied the
	// published trust bundle, of those that say such things at all. One that may not
	// have had the time to say so since the server was started counts.
	Behind() int
	// Holding says what hangs on a tainted keyset.
	Holding(k keyset.Keyset) Holding
}

// Holding is what hangs on a tainted keyset. What is not known is not safe.
type Holding struct {
	Agents            int       // that could still hold X.509-SVIDs of it
	UnknownSince      time.Time // what was signed then and later may be valid, and is not known; mostly zero
	X509Safe, JWTSafe bool
	JWTExpiry         time.Time // of the last JWT-SVID; zero when not known
}

// Past says for how much uptime the wall clock has been past a time; see
// [clock.Clock.PastFor].
type Past func(time.Time) time.Duration

// Next decides what is to be done next: of all that is due what is most urgent,
// or else what comes first. The policy is one that [Policy.For] has returned,
// the keysets are in order of issue, and one of them is active.
//
// Succession. The active keyset's successor is the first one that is prepared,
// has never signed, and outlives it by the preparation threshold, whoever made it;
// when there is none at that threshold, one is prepared. It takes over at the
// activation threshold, counted from its issue or from the preparation
// threshold, whichever is later; where it was made late, after half of the
// time that is left. Then the agents that are behind are waited for, but no
// longer than half of the time that is left from there: an agent that has not
// applied a new bundle by then will not, and an active keyset that expires takes
// all others with it. When the active keyset has expired, the newest that could
// take over does so at once, and is prepared first if need be. So it does when the
// active keyset is not valid yet, because it was made by a clock that was ahead.
//
// Retirement. Only a keyset that was replaced by automatic rotation is tainted,
// at the taint threshold, and removed, when nothing hangs on it any more. The
// others belong to the operator who stepped in, until they have expired: every
// expired keyset is tainted, and removed when the ledger knows of nothing that
// hangs on it. What has expired is for a clock to say, and a clock can be wrong:
// such a step waits until the process has been up for [clock.Hold] past the expiry.
func Next(now time.Time, past Past, p Policy, keysets []keyset.Keyset, f Facts) Step {
	var next Step
	if p.Mode == Off {
		return next
	}
	consider := func(s Step) {
		if next.Action == None || (!next.Due(now) && s.At.Before(next.At)) {
			next = s
		}
	}
	// In order of urgency.
	consider(succession(now, p, keysets, f))
	for _, k := range keysets {
		if k.State == keyset.Prepared {
			consider(taint(now, past, p, k))
		}
	}
	for _, k := range keysets {
		if k.State == keyset.Tainted {
			consider(removal(now, past, k, f))
		}
	}
	return next
}

func succession(now time.Time, p Policy, keysets []keyset.Keyset, f Facts) Step {
	var active keyset.Keyset
	for _, k := range keysets {
		if k.State == keyset.Active {
			active = k
		}
	}
	expires := active.ExpiresAt
	if now.Before(active.ValidFrom) {
		expires = now // nobody can verify what it signs
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
	ready := earliest(from.Add(p.ActivationThreshold), middle(from, expires), expires)
	s := Step{Action: Activate, Keyset: k.ID, At: ready, Why: why}
	if now.Before(ready) {
		return s
	}
	if n := f.Behind(); n > 0 {
		behind := agents(n) + " that have not applied the trust bundle"
		if n == 1 {
			behind = "1 agent that has not applied the trust bundle"
		}
		if limit := middle(ready, expires); now.Before(limit) {
			s.At, s.WaitsFor = limit, behind
		} else {
			s.Why += ", no longer waiting for " + behind
		}
	}
	return s
}

// successor is the keyset that is to take over from the active one, which
// expires. One that is issued in the future cannot yet.
func successor(now time.Time, p Policy, keysets []keyset.Keyset, expires time.Time) (last keyset.Keyset, ok bool) {
	// The least is measured from the active keyset's expiry, not from now, so
	// that one that is fit today is fit tomorrow: otherwise another one would be
	// prepared while it waits.
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

func taint(now time.Time, past Past, p Policy, k keyset.Keyset) Step {
	s := Step{Action: Taint, Keyset: k.ID, At: expired(now, past, k), Why: "it has expired"}
	if k.SteppedDownBy == Actor {
		if at := k.SteppedDownAt.Add(p.TaintThreshold); at.Before(s.At) {
			s.At, s.Why = at, "it was replaced "+text(k.SteppedDownAt)
		}
	}
	return s
}

func removal(now time.Time, past Past, k keyset.Keyset, f Facts) Step {
	s := Step{Action: Remove, Keyset: k.ID, At: expired(now, past, k), Why: "it has expired"}
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
		s.At, s.Why = now, "nothing hangs on it any more"
	}
	if s.WaitsFor != "" {
		// The ledger says when it is over, soon after the expiry.
		if s.At = clock.Over(k.ExpiresAt); !s.At.After(now) {
			s.At = now.Add(longestSleep)
		}
	}
	return s
}

// expired is when a keyset has expired beyond doubt: nothing that it signed is valid
// by anybody's clock, and that is not the word of a clock that was ahead for a
// moment.
func expired(now time.Time, past Past, k keyset.Keyset) time.Time {
	return now.Add(clock.Hold - past(clock.Over(k.ExpiresAt)))
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

func text(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") }
