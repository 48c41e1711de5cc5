package ledger

import (
	"maps"
	"slices"
	"time"
)

// If a node is cloned, two processes have one identity: both renew, get SVIDs and
// report as one agent. The reports of each are true for itself only. So the ledger
// distinguishes processes by their reports, and trusts no report of an agent that has
// two.
//
//   - With a restart, reports of one process are followed by those of another: A A B B.
//   - With a clone, a process reports after the one that followed it: A B A.
//   - A clone of a running machine has the same process ID: its reports have numbers
//     that the server has received before. A report that is only late is no sign of a
//     clone.
//
// A process that may have replaced another one is trusted after [Silence], because the
// other would have reported in that time: every process reports once a minute. Until
// then, and while an agent counts as duplicated, its reports can only add: rows go when
// they expire or when an operator confirms that the node is gone. An agent counts as
// duplicated until all SVIDs have expired that were issued before the second process
// was last seen. That is stored, since the server may restart while one of the two is
// silent.
//
// The ledger cannot notice a copy that has not reported yet, such as one that was
// resumed from an old snapshot, or one without connection to the server for longer than
// [Silence] while the other reports. It counts as ended. When it reports again it is
// noticed, and the SVIDs that it reports count again; but a key may have been called
// safe, and removed, in the meantime. The ledger does not distinguish processes whose
// reports have no ID. A spire-agent does not report: its rows stay until they expire.

// duplicates is the authority ID of the rows that record which agents are duplicated.
// It cannot be the ID of an authority, because those are hexadecimal.
const duplicates = "duplicated"

// duplicateMargin is added to the stored time until which an agent is duplicated, so
// that not each report of the two has to be stored.
const duplicateMargin = time.Hour

// maxEarlier bounds the earlier processes of an agent that are kept.
const maxEarlier = 64

// reporter is the process that reports for an agent.
type reporter struct {
	process string
	number  uint64                   // the highest of its reports
	seen    uint64                   // bit i: there was a report of number-i
	earlier map[string]time.Duration // by ID, the uptime when the next one first reported
	// follows: there may have been another process before it. since is the uptime of its
	// first report: a step of the clock does not shorten the wait.
	follows bool
	since   time.Duration
}

// isNew records the number of a report, and returns whether no other report had it. A
// report may arrive after newer ones, as in RFC 4303 (3.4.3): the network delayed it,
// and the agent has sent others. A report whose number is too low for that is from a
// machine that was rolled back.
func (p *reporter) isNew(number uint64) bool {
	if number > p.number {
		p.seen, p.number = p.seen<<(number-p.number)|1, number
		return true
	}
	bit := uint64(1) << (p.number - number) // zero when it is far behind
	first := bit != 0 && p.seen&bit == 0
	p.seen |= bit
	return first
}

// duplicated reports whether two processes use the agent's identity, or did so recently.
func (g *agent) duplicated() bool { return g.holdings[duplicates] != nil }

// trusted reports whether a report may remove rows and claims of the agent.
func (g *agent) trusted(up time.Duration) bool {
	return !g.duplicated() && (!g.reporter.follows || up-g.reporter.since >= Silence)
}

// noteReporter records which process has sent a report, and returns whether there are
// two.
func (g *agent) noteReporter(r Report, up time.Duration) (two bool) {
	p := &g.reporter
	switch _, before := p.earlier[r.Process]; {
	case g.reported.IsZero():
		*p = reporter{process: r.Process, number: r.Number, seen: 1, follows: g.known && r.Process != "", since: up}
		return false
	case r.Process == p.process:
		return r.Process != "" && !p.isNew(r.Number)
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

// markDuplicatedLocked makes an agent count as duplicated, for the longest lifetime of
// an SVID from now on, and until all its rows have expired: an SVID that was signed
// while the clock was ahead expires later. It returns the batch that the caller must
// save, nil if that is not necessary, and the end that is stored with it.
func (l *Ledger) markDuplicatedLocked(g *agent, now time.Time) (b *batch, end int64) {
	if !g.duplicated() {
		l.log.Warn("agent identity used by two processes: evict the agent and attest each node with its own join token", "agent_id", g.id)
	}
	until := now.Add(longest)
	for _, h := range g.holdings {
		if last := fromUnix(h.latest); h.authority.id != duplicates && last.After(until) {
			until = last
		}
	}
	if g.duplicatedUntil >= until.Unix() {
		return nil, 0
	}
	end = l.putLocked(l.holdingLocked(duplicates, g.id), "", until.Add(duplicateMargin))
	l.pending.rows[rowKey{duplicates, g.id, ""}] = end
	for _, h := range g.holdings {
		h.version++ // cancels deletions in progress
		l.recountLocked(h)
	}
	return l.pending, end
}

// Duplicated returns the agents whose identity two processes use, or did so recently,
// ordered. Their SVIDs count until they expire, or until [Ledger.RemoveAgent].
func (l *Ledger) Duplicated() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.expireLocked()
	a := l.authorities[duplicates]
	if a == nil {
		return nil
	}
	return slices.Sorted(maps.Keys(a.holdings))
}
