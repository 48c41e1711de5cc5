package ledger

import (
	"context"
	"fmt"
	"math"
	"time"
)

// Report is what an agent has left to replace of the X.509 authorities that are
// tainted, or were removed while the agent held SVIDs of them.
type Report struct {
	Sequence    uint64  // of the trust bundle that the agent applies
	Rate        float64 // the most taint renewals a second
	Authorities []AuthorityReport
	// Process is a random ID of the agent's process, and Number grows with each report
	// that the process begins. They distinguish two processes with one identity.
	// Process is empty if the agent sends none.
	Process string
	Number  uint64
}

// AuthorityReport is a [Report]'s part about one authority.
type AuthorityReport struct {
	Authority string
	Tainted   bool // false: removed
	// SVIDs to be replaced, including those in flight that were asked for before the
	// agent saw the taint; workloads that have not read the replacement.
	Pending, Streams int
	Settled          bool // nothing on the node depends on it
	BeginsAt         time.Time
}

// The bounds of what the ledger stores for one agent.
const (
	maxReported  = 32  // authorities
	maxAuthority = 128 // bytes in the ID of an authority that the ledger does not have
	maxCount     = math.MaxInt32
)

// Report stores an agent's report, which replaces the previous one. If a tainted
// authority is settled, and the counts do not contradict that, the agent's rows of it
// are deleted durably. If Report fails, the rows stay until the agent reports again.
//
// A process that has replaced another one is trusted after some minutes. Two processes
// that report in the same time are not trusted. Until then a report can only add.
//
// An agent reports settled only after all its calls from before the taint have ended.
// So it cannot receive another SVID of the authority, and a late report, after newer
// ones of the same process, is still true: what was settled stays settled, and a report
// with outdated counts is corrected by the next one, a minute later. A report of a
// process that has ended does not arrive after the first one of its successor, because
// its connection has ended; a report whose ctx is done is ignored.
//
// An agent that was just restarted, holds nothing, and has seen the taint reports settled
// like any other. It cannot serve the SVIDs that it lost with its memory. If their rows
// stayed, they would keep the key for a day after each restart, for SVIDs that the agent
// cannot replace. The workloads of the previous process may still hold them. The server
// cannot see that a process is new, so an agent must not report settled before those
// workloads have read their replacements.
func (l *Ledger) Report(ctx context.Context, agent string, r Report) error {
	l.mu.Lock()
	if err := ctx.Err(); err != nil {
		l.mu.Unlock()
		return err
	}
	now, up := l.expireLocked(), l.uptime()
	g := l.agentLocked(agent)
	l.contactLocked(g, r.Sequence, now)
	two := g.noteReporter(r, up)
	g.contact.Reports, g.reported, g.rate = true, now, r.Rate
	var mark *batch
	var until int64
	if two {
		mark, until = l.markDuplicatedLocked(g, now)
	}
	trusted := g.trusted(up)

	claims := l.claimsLocked(r.Authorities)
	for id, h := range g.holdings {
		if _, again := claims[id]; !again && h.claim.made && trusted {
			h.claim = claim{}
			l.recountLocked(h)
		}
	}
	var settled []deletion
	for id, w := range claims {
		h := g.holdings[id]
		if h == nil && w.holds() {
			h = l.holdingLocked(id, agent)
		}
		if h == nil {
			continue
		}
		if !trusted {
			w.claim = h.claim.merge(w.claim)
		}
		h.claim = w.claim
		if w.holds() {
			h.version++
		} else if w.settled && trusted {
			settled = append(settled, deletion{h, h.version})
		}
		l.recountLocked(h)
	}
	l.mu.Unlock()
	if mark != nil {
		if err := l.save(ctx, mark); err != nil {
			return fmt.Errorf("store that agent %s is duplicated: %w", agent, err)
		}
		l.mu.Lock()
		g.duplicatedUntil = max(g.duplicatedUntil, until)
		l.mu.Unlock()
	}
	if err := l.delete(ctx, settled); err != nil {
		return fmt.Errorf("delete the settled rows of agent %s: %w", agent, err)
	}
	return nil
}

// reported is a claim in a report.
type reported struct {
	claim
	settled bool
}

// claimsLocked returns the claims of a report that are stored: those on tainted
// authorities, and on others if the agent holds SVIDs of them. Known authorities come
// first, so that the bound does not exclude them.
func (l *Ledger) claimsLocked(reports []AuthorityReport) map[string]reported {
	claims := make(map[string]reported)
	for _, known := range []bool{true, false} {
		for _, r := range reports {
			_, is := l.authorities[r.Authority]
			if r.Authority == duplicates || is != known || (!known && len(r.Authority) > maxAuthority) {
				continue
			}
			w := reported{
				claim: claim{
					made: true, pending: min(max(0, r.Pending), maxCount), streams: min(max(0, r.Streams), maxCount),
					beginsAt: r.BeginsAt,
				},
				settled: r.Settled && r.Pending == 0 && r.Streams == 0,
			}
			before, twice := claims[r.Authority]
			switch {
			case !r.Tainted && !w.holds():
				continue // it has not seen the taint, so it cannot have settled it
			case twice:
				w.pending, w.streams = max(w.pending, before.pending), max(w.streams, before.streams)
				w.settled = w.settled && before.settled
			case len(claims) == maxReported:
				continue
			}
			claims[r.Authority] = w
		}
	}
	return claims
}

// contactLocked records a contact of an agent.
func (l *Ledger) contactLocked(g *agent, sequence uint64, now time.Time) {
	if g.contact.At.IsZero() {
		l.expiryQueue.add(now.Add(longest).Unix(), expiryItem{entry: g.id})
	}
	if sequence > 0 {
		g.contact.Sequence = sequence
	}
	g.contact.At = now
}

// Applied records a contact of an agent without a report, and the sequence number of the
// trust bundle that it applies; zero if it did not say.
func (l *Ledger) Applied(agent string, sequence uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.contactLocked(l.agentLocked(agent), sequence, l.expireLocked())
}

// Contact is the last contact of an agent and the trust bundle that it applied then.
// Reports says that the agent has sent a [Report], not only statuses.
type Contact struct {
	Sequence uint64
	At       time.Time
	Reports  bool
}

// Contact returns the last contact of an agent, unless there was none since the server
// started, or for longer than any SVID lives.
func (l *Ledger) Contact(agent string) (Contact, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	g := l.agents[agent]
	if g == nil || g.contact.At.IsZero() {
		return Contact{}, false
	}
	return g.contact, true
}

// Knows reports whether the ledger has rows or a contact of an agent.
func (l *Ledger) Knows(agent string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.agents[agent] != nil
}

// RemoveAgent drops an agent's rows, durably, and its reports, because an operator has
// confirmed that its node no longer exists. If it does exist, the agent's next report
// counts again.
func (l *Ledger) RemoveAgent(ctx context.Context, agent string) error {
	l.mu.Lock()
	g := l.agents[agent]
	if g == nil {
		l.mu.Unlock()
		return nil
	}
	g.resetReports()
	g.known, g.duplicatedUntil = false, 0
	deletions := make([]deletion, 0, len(g.holdings))
	for _, h := range g.holdings {
		deletions = append(deletions, deletion{h, h.version})
	}
	l.pruneAgentLocked(g)
	l.mu.Unlock()
	if err := l.delete(ctx, deletions); err != nil {
		return fmt.Errorf("delete the rows of agent %s: %w", agent, err)
	}
	return nil
}

// Removed drops, durably, all data of the keys of a keyset that was removed. An empty ID
// stands for no key.
func (l *Ledger) Removed(ctx context.Context, authority, jwtKeyID string) error {
	l.mu.Lock()
	b := l.pending
	if jwtKeyID != "" {
		b.jwt[jwtKeyID] = 0
	}
	var deletions []deletion
	if a := l.authorities[authority]; a != nil {
		for _, h := range a.holdings {
			deletions = append(deletions, deletion{h, h.version})
		}
	}
	l.mu.Unlock()
	err := l.save(ctx, b)
	if err == nil {
		err = l.delete(ctx, deletions)
	}
	if err != nil {
		return fmt.Errorf("delete the rows of a removed keyset: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.jwt, jwtKeyID)
	if a := l.authorities[authority]; a != nil {
		a.taint = taint{}
		l.pruneAuthorityLocked(a)
	}
	return nil
}

// deletion is a holding that is to be deleted unless it changes before.
type deletion struct {
	*holding
	version uint64
}

func (d deletion) canceled() bool { return d.holding.version != d.version || d.recording > 0 }

// delete deletes the rows of holdings from storage and then the holdings. If a row is
// added during the deletion, it is stored after that, and its holding is kept.
func (l *Ledger) delete(ctx context.Context, deletions []deletion) error {
	for len(deletions) > 0 {
		n, rows := 0, 0
		l.mu.Lock()
		b := l.pending
		for ; n < len(deletions) && rows < maxPerSave; n++ {
			if deletions[n].canceled() {
				continue
			}
			for entry := range deletions[n].rows {
				b.rows[rowKey{deletions[n].authority.id, deletions[n].agent.id, entry}] = 0
				rows++
			}
		}
		l.mu.Unlock()
		if rows > 0 {
			if err := l.save(ctx, b); err != nil {
				return err
			}
		}
		l.mu.Lock()
		for _, d := range deletions[:n] {
			if !d.canceled() {
				l.dropLocked(d.holding)
			}
		}
		l.mu.Unlock()
		deletions = deletions[n:]
	}
	return nil
}
