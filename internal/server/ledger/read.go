package ledger

import (
	"cmp"
	"slices"
	"time"
)

// Holding is what is out of one X.509 authority.
type Holding struct {
	// SVIDs counts what is known to be out still: an agent's rows or, where it has
	// reported about the authority, what it says that it has to replace, and at
	// least one for each of the Agents and for each call on its way that may be
	// signing still.
	SVIDs, Agents int
	Latest        time.Time // expiry of the last row; zero when there is none
	// UnknownUntil is not zero while SVIDs that nothing is known of could be valid:
	// they were signed after UnknownSince, when the copy was taken that the server
	// was restored from, the first one of several.
	UnknownSince, UnknownUntil time.Time
	// Clear: the authority is tainted, and nobody could still hold an SVID of it
	// or be about to get one.
	Clear bool
}

// X509 says what is out of an authority. tainted says that it signs nothing any
// more and never will; the first time, that is noted. It is called with what
// the keysets say after the taint took effect.
func (l *Ledger) X509(authority string, tainted bool) Holding {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.expire()
	if tainted {
		l.learn(&l.authority(authority).taint)
	}
	var h Holding
	h.UnknownSince, h.UnknownUntil = l.unknownX509(now, authority)
	a := l.authorities[authority]
	if a == nil {
		return h
	}
	calls := l.onTheirWay(a.taint)
	h.SVIDs, h.Agents, h.Latest = a.svids+calls, a.agents, at(a.latestOf())
	h.Clear = tainted && a.agents == 0 && calls == 0 && h.UnknownUntil.IsZero()
	return h
}

// unknownX509 is unknown for an X.509 authority. The last lost time is as long as it is
// by what the clock shows now: at the restore it may have been behind.
func (l *Ledger) unknownX509(now time.Time, authority string) (since, until time.Time) {
	return l.unknown(now, func(r Restored) time.Time {
		end := r.X509[authority]
		if last := l.restored[len(l.restored)-1]; !end.IsZero() && r.CopiedAt.Equal(last.CopiedAt) {
			end = end.Add(l.late())
		}
		return end
	})
}

// unknown returns since when and until when something counts that is not known of,
// by all restores for which that has not ended; zero times when there is none. end is
// that of one restore, zero when the restore does not concern the key.
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

// JWT returns the expiry of the last JWT-SVID of a key, zero when all have
// expired, and whether the key is clear: tainted, nothing unexpired, and no
// call on its way that may be signing with it still. What is not known of is
// taken to expire as late as it can. tainted is as for [Ledger.X509].
func (l *Ledger) JWT(keyID string, tainted bool) (latest time.Time, clear bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	if tainted {
		l.learn(&l.jwtKey(keyID).taint)
	}
	_, latest = l.unknown(now, func(r Restored) time.Time { return r.JWT[keyID] })
	k := l.jwt[keyID]
	if k == nil {
		return latest, false
	}
	if known := at(k.latest); !over(k.latest, now) && known.After(latest) {
		latest = known
	}
	return latest, tainted && latest.IsZero() && l.onTheirWay(k.taint) == 0
}

// Why an agent is counted.
const (
	ReasonSilent   = "silent"   // it has not reported for some minutes, or ever
	ReasonBehind   = "behind"   // it reports and has not seen the taint
	ReasonWaiting  = "waiting"  // for its random delay
	ReasonRenewing = "renewing" // or about to say that it is done
	ReasonStreams  = "streams"  // all is replaced and not yet read by all workloads
	ReasonSigning  = "signing"  // an answer is on its way
	// Two processes use its identity: neither is right about what the other holds.
	ReasonDuplicated = "duplicated"
	ReasonRestored   = "restored" // the server was, and it is not known who was given what
)

// silence is how long an agent that reports once a minute may be quiet before
// it is called silent.
const silence = 3 * time.Minute

// Holder is an agent that could still hold SVIDs of an authority. Two have no
// Agent, because it is not known: that of ReasonSigning stands for the calls on
// their way, that of ReasonRestored for what was signed after LastReport, when
// the copy was taken that the server was restored from, the first one of several.
type Holder struct {
	Agent          string
	SVIDs, Streams int       // none of ReasonRestored
	Latest         time.Time // expiry of its last row; zero when there is none
	LastReport     time.Time // zero: none since the server started
	BeginsAt       time.Time // of its wave
	Sequence       uint64    // of the trust bundle that it has in force
	Rate           float64   // taint renewals a second at most
	Reason         string
}

// Holders returns who makes up what [Ledger.X509] says, ordered by agent.
func (l *Ledger) Holders(authority string) []Holder {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.expire()
	var holders []Holder
	if since, until := l.unknownX509(now, authority); !until.IsZero() {
		holders = append(holders, Holder{Latest: until, LastReport: since, Reason: ReasonRestored})
	}
	a := l.authorities[authority]
	if a == nil {
		return holders
	}
	holders = slices.Grow(holders, len(a.holdings)+1)
	if calls := l.onTheirWay(a.taint); calls > 0 {
		holders = append(holders, Holder{SVIDs: calls, Reason: ReasonSigning})
	}
	for _, h := range a.holdings {
		holders = append(holders, Holder{
			Agent: h.agent.id, SVIDs: h.counted, Streams: h.said.streams, Latest: at(h.latest),
			LastReport: h.agent.reported, BeginsAt: h.said.beginsAt,
			Sequence: h.agent.contact.Sequence, Rate: h.agent.rate, Reason: h.reason(now),
		})
	}
	slices.SortStableFunc(holders, func(x, y Holder) int { return cmp.Compare(x.Agent, y.Agent) })
	return holders
}

func (h *holding) reason(now time.Time) string {
	switch s := h.said; {
	case h.agent.duplicated():
		return ReasonDuplicated
	case h.agent.reported.IsZero() || now.Sub(h.agent.reported) > silence:
		return ReasonSilent
	case !s.made:
		return ReasonBehind
	case s.pending > 0 && s.beginsAt.After(now):
		return ReasonWaiting
	case s.pending == 0 && s.streams > 0:
		return ReasonStreams
	}
	return ReasonRenewing
}
