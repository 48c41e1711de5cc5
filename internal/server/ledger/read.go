package ledger

import (
	"cmp"
	"slices"
	"time"
)

// Holding describes the SVIDs that agents could hold of one X.509 authority.
type Holding struct {
	// SVIDs counts an agent's rows or, if it has reported on the authority, the SVIDs
	// that it has left to replace. Each of the Agents, and each call in flight that
	// may still sign, counts at least one.
	SVIDs, Agents int
	Latest        time.Time // expiry of the last row; zero when there is none
	// UnknownUntil is not zero while SVIDs without a row could be valid: those that
	// were signed between UnknownSince, when the server's data was copied, and a
	// restore of that copy. Of several copies, UnknownSince is that of the first.
	UnknownSince, UnknownUntil time.Time
	// Clear: the authority is tainted, no agent could hold an SVID of it, and none is
	// in flight.
	Clear bool
}

// X509 describes what agents could hold of an authority. tainted says that the authority
// no longer signs and never will; the ledger records that the first time. Call it with
// the state of the keysets after the taint took effect.
func (l *Ledger) X509(authority string, tainted bool) Holding {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.expireLocked()
	if tainted {
		l.learnTaintLocked(&l.authorityLocked(authority).taint)
	}
	var h Holding
	h.UnknownSince, h.UnknownUntil = l.unknownX509(now, authority)
	a := l.authorities[authority]
	if a == nil {
		return h
	}
	calls := l.inFlightLocked(a.taint)
	h.SVIDs, h.Agents, h.Latest = a.svids+calls, a.agents, fromUnix(a.latestExpiry())
	h.Clear = tainted && a.agents == 0 && calls == 0 && h.UnknownUntil.IsZero()
	return h
}

// unknownX509 is unknown for an X.509 authority. The end of the last restore's period is
// by the present clock: at the restore the clock may have been behind.
func (l *Ledger) unknownX509(now time.Time, authority string) (since, until time.Time) {
	return l.unknown(now, func(r Restored) time.Time {
		end := r.X509[authority]
		if last := l.restored[len(l.restored)-1]; !end.IsZero() && r.CopiedAt.Equal(last.CopiedAt) {
			end = end.Add(l.late())
		}
		return end
	})
}

// unknown returns the period of SVIDs without a row, over all restores whose SVIDs have
// not all expired; zero times if there is none. end returns the latest expiry for one
// restore, zero if the restore does not concern the key.
func (l *Ledger) unknown(now time.Time, end func(Restored) time.Time) (since, until time.Time) {
	for _, r := range l.restored {
		t := end(r)
		if t.IsZero() || over(t.Unix(), now) {
			continue
		}
		if since.IsZero() || r.CopiedAt.Before(since) {
			since = r.CopiedAt
		}
		if t.After(until) {
			until = t
		}
	}
	return since, until
}

// JWT returns the expiry of the last JWT-SVID of a key, zero if all have expired, and
// whether the key is clear: tainted, no unexpired JWT-SVID, and no call in flight that
// may still sign with it. Those that were signed in a restore's period count as long as
// they could be valid. tainted is as for [Ledger.X509].
func (l *Ledger) JWT(keyID string, tainted bool) (latest time.Time, clear bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	if tainted {
		l.learnTaintLocked(&l.jwtKeyLocked(keyID).taint)
	}
	_, latest = l.unknown(now, func(r Restored) time.Time { return r.JWT[keyID] })
	k := l.jwt[keyID]
	if k == nil {
		return latest, false
	}
	if known := fromUnix(k.latest); !over(k.latest, now) && known.After(latest) {
		latest = known
	}
	return latest, tainted && latest.IsZero() && l.inFlightLocked(k.taint) == 0
}

// The reasons why an agent is counted.
const (
	ReasonSilent   = "silent"   // it has not reported for some minutes, or ever
	ReasonBehind   = "behind"   // it reports and has not seen the taint
	ReasonWaiting  = "waiting"  // for its random delay
	ReasonRenewing = "renewing" // has SVIDs to replace
	ReasonStreams  = "streams"  // workloads have not read all replacements
	// Nothing is left, as far as is known: after a restart the agent waits for
	// workloads that it does not know.
	ReasonSettling = "settling"
	ReasonSigning  = "signing" // an answer is in flight
	// Two processes use its identity: the reports of one do not cover the other.
	ReasonDuplicated = "duplicated"
	ReasonRestored   = "restored" // the server was restored, and the holders are unknown
)

// Silence is how long ago the last report of an agent may be, which reports once a
// minute, before the agent counts as silent.
const Silence = 3 * time.Minute

// Holder is an agent that could still hold SVIDs of an authority. Two have no Agent,
// because it is unknown: that of ReasonSigning stands for the calls in flight, that of
// ReasonRestored for the SVIDs that were signed between LastReport, when the server's
// data was copied, and a restore of that copy.
type Holder struct {
	Agent          string
	SVIDs, Streams int       // zero for ReasonRestored
	Latest         time.Time // expiry of its last row; zero when there is none
	LastReport     time.Time // zero: none since the server started
	BeginsAt       time.Time // start of its taint wave
	Sequence       uint64    // of the trust bundle that it applies
	Rate           float64   // the most taint renewals a second
	Reason         string
}

// Holders returns the agents that [Ledger.X509] counts, ordered by agent.
func (l *Ledger) Holders(authority string) []Holder {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.expireLocked()
	var holders []Holder
	if since, until := l.unknownX509(now, authority); !until.IsZero() {
		holders = append(holders, Holder{Latest: until, LastReport: since, Reason: ReasonRestored})
	}
	a := l.authorities[authority]
	if a == nil {
		return holders
	}
	holders = slices.Grow(holders, len(a.holdings)+1)
	if calls := l.inFlightLocked(a.taint); calls > 0 {
		holders = append(holders, Holder{SVIDs: calls, Reason: ReasonSigning})
	}
	for _, h := range a.holdings {
		holders = append(holders, Holder{
			Agent: h.agent.id, SVIDs: h.counted, Streams: h.claim.streams, Latest: fromUnix(h.latest),
			LastReport: h.agent.reported, BeginsAt: h.claim.beginsAt,
			Sequence: h.agent.contact.Sequence, Rate: h.agent.rate, Reason: h.reason(now),
		})
	}
	slices.SortStableFunc(holders, func(x, y Holder) int { return cmp.Compare(x.Agent, y.Agent) })
	return holders
}

func (h *holding) reason(now time.Time) string {
	switch s := h.claim; {
	case h.agent.duplicated():
		return ReasonDuplicated
	case h.agent.reported.IsZero() || now.Sub(h.agent.reported) > Silence:
		return ReasonSilent
	case !s.made:
		return ReasonBehind
	case s.pending > 0 && s.beginsAt.After(now):
		return ReasonWaiting
	case s.pending == 0 && s.streams > 0:
		return ReasonStreams
	case s.pending == 0:
		return ReasonSettling
	}
	return ReasonRenewing
}
