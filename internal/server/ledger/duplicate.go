package ledger

import (
	"maps"
	"slices"
	"time"
)

// A node that is cloned has its identity twice: two processes renew, get SVIDs and
// report as one agent. Each is right about itself, and neither about the other. So the
// ledger tells processes apart by what their reports carry, and believes none of an
// agent that has two.
//
//   - A restart looks like this: reports of one process, and then of another, A A B B.
//   - A clone looks like this: reports of a process after those of another one that came
//     after it, A B A.
//   - A clone of a running machine has the process twice, its ID included: its reports
//     have numbers that the server has had already. That one arrives late says nothing.
//
// A process that may have taken the place of another one is believed after silence, in
// which the other would have been heard of: every process reports once a minute.
// Until then, and for as long as an agent counts as duplicated, a report adds to what
// is known and takes nothing back: rows go when they expire, or by an operator's
// word. An agent counts as duplicated until all has expired that was given by when two
// were last noticed; storage keeps that, since the server may be restarted while one of
// the two is silent.
//
// What cannot be known: a copy that has not reported yet, as one that is resumed from
// an old snapshot, or one that is cut off from the server for longer than silence while
// the other reports. It is taken for ended. When it is back it is noticed, and what
// it says that it holds counts again; a key that was called safe meanwhile may be gone.
// Nor are processes told apart whose reports carry no ID, and spire-agents report
// nothing: their rows stay until they expire.

// duplicates is where the rows are that say which agents are duplicated, as if they
// were of an authority. No authority has such an ID: theirs are hexadecimal.
const duplicates = "duplicated"

// noted is how much longer than necessary it is stored that an agent is duplicated, so
// that each report of the two need not be a write.
const noted = time.Hour

// maxEarlier bounds the earlier processes of an agent that are remembered.
const maxEarlier = 64

// reporter is the process that reports for an agent.
type reporter struct {
	process string
	number  uint64                   // the highest of its reports
	seen    uint64                   // bit i: there was a report of number-i
	earlier map[string]time.Duration // by ID, the uptime when the next one was heard of
	// follows: there may have been another process before it. since is the uptime when
	// it was heard of first: a clock that goes ahead makes nobody's silence longer.
	follows bool
	since   time.Duration
}

// first notes the number of a report, and says whether it is the first one with it. A
// report may arrive after newer ones, as the parcels of RFC 4303 (3.4.3) may: one that
// the network has held up while the agent, which took it for lost, has sent others. One
// that is further behind than any network keeps it is of a machine that was set back.
func (p *reporter) first(number uint64) bool {
	if number > p.number {
		p.seen, p.number = p.seen<<(number-p.number)|1, number
		return true
	}
	bit := uint64(1) << (p.number - number) // zero when it is far behind
	first := bit != 0 && p.seen&bit == 0
	p.seen |= bit
	return first
}

// duplicated reports whether two processes use the agent's identity, or did so lately.
func (g *agent) duplicated() bool { return g.holdings[duplicates] != nil }

// believed reports whether a report may take back what is known of the agent.
func (g *agent) believed(up time.Duration) bool {
	return !g.duplicated() && (!g.reporter.follows || up-g.reporter.since >= silence)
}

// heardFrom notes which process has sent a report, and reports whether there are two.
func (g *agent) heardFrom(r Report, up time.Duration) (two bool) {
	p := &g.reporter
	switch _, before := p.earlier[r.Process]; {
	case g.reported.IsZero():
		*p = reporter{process: r.Process, number: r.Number, seen: 1, follows: g.known && r.Process != "", since: up}
		return false
	case r.Process == p.process:
		return r.Process != "" && !p.first(r.Number)
	default:
		two = before
	}
	if p.earlier == nil {
		p.earlier = make(map[string]time.Duration)
	}
	p.earlier[p.process] = up
	if len(p.earlier) > maxEarlier {
		oldest := p.process
		for id, at := range p.earlier {
			if at < p.earlier[oldest] {
				oldest = id
			}
		}
		delete(p.earlier, oldest)
	}
	p.process, p.number, p.seen, p.follows, p.since = r.Process, r.Number, 1, true, up
	return two
}

// duplicate has an agent count as duplicated, for the longest life of an SVID from now
// on, and until all rows of it have expired: what a clock that is ahead signs expires
// later. It returns what the caller has to save, nil when that is stored already, and the
// end that is then stored.
func (l *Ledger) duplicate(g *agent, now time.Time) (b *batch, end int64) {
	if !g.duplicated() {
		l.log.Warn("two processes use the identity of one agent: evict it, and attest each node with a join token of its own", "agent_id", g.id)
	}
	until := now.Add(longest)
	for _, h := range g.holdings {
		if last := at(h.latest); h.authority.id != duplicates && last.After(until) {
			until = last
		}
	}
	if g.duplicatedUntil >= until.Unix() {
		return nil, 0
	}
	end = l.put(l.holding(duplicates, g.id), "", until.Add(noted))
	l.pending.rows[rowKey{duplicates, g.id, ""}] = end
	for _, h := range g.holdings {
		h.version++ // what either of them has settled is not deleted any more
		l.recount(h)
	}
	return l.pending, end
}

// Duplicated returns the agents whose identity two processes use, or did so lately,
// ordered. What they were given counts until it expires, or until [Ledger.Gone].
func (l *Ledger) Duplicated() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.expire()
	a := l.authorities[duplicates]
	if a == nil {
		return nil
	}
	return slices.Sorted(maps.Keys(a.holdings))
}
