package ledger

import (
	"context"
	"fmt"
	"math"
	"time"
)

// Report is what an agent has to do with the X.509 authorities that are
// tainted, or removed while something held was signed by them.
type Report struct {
	Sequence    uint64  // of the trust bundle in force
	Rate        float64 // taint renewals a second at most
	Authorities []AuthorityReport
	// Process is an ID that the agent's process has drawn at its start, and Number
	// grows with each report that it begins; they tell two processes of one identity
	// apart. Empty: it has none.
	Process string
	Number  uint64
}

// AuthorityReport is a [Report]'s part about one authority.
type AuthorityReport struct {
	Authority string
	Tainted   bool // false: removed
	// SVIDs to be replaced, those on their way that were asked for before the
	// taint was seen among them; workloads that have not read the replacement.
	Pending, Streams int
	Settled          bool // nothing on the node depends on it any more
	BeginsAt         time.Time
}

// The bounds of what one agent can make the ledger remember.
const (
	maxReported  = 32  // authorities
	maxAuthority = 128 // bytes of the ID of one that is not known otherwise
	maxCount     = math.MaxInt32
)

// Report takes in what an agent says; it replaces what the agent said before.
// That a tainted authority is settled deletes, durably, what rows the agent has
// of it; counts that contradict it win. When Report fails, the rows stay until
// the agent says it again.
//
// A process that has taken another one's place is believed after some minutes, and
// neither of two that report at a time: until then a report only adds to what is known.
//
// An agent says settled only after all its calls of before the taint have
// ended, so nothing that the authority signed can reach it later, and a report
// that arrives late, after newer ones of the same process, is no less true for
// that: the settled stay settled, and one that says less is put right by the next,
// a minute later. Of a process that has ended none arrives after the first one of
// its successor, because its connection ended with it; a report whose ctx is done
// is not taken in.
//
// An agent that has just been restarted, holds nothing, and has seen the taint
// says settled like any other, and is believed. What it lost with its memory it
// cannot hand out again; a row would stand for SVIDs that nobody can replace
// and would keep the key for a day after each restart. The workloads of the
// process before may hold them longer. A server cannot see that a process is new; so
// to wait until they have read their replacement is the agent's part of the word
// "settled".
func (l *Ledger) Report(ctx context.Context, agent string, r Report) error {
	l.mu.Lock()
	if err := ctx.Err(); err != nil {
		l.mu.Unlock()
		return err
	}
	now, up := l.expire(), l.uptime()
	g := l.agent(agent)
	l.contacted(g, r.Sequence, now)
	two := g.heardFrom(r, up)
	g.contact.Reports, g.reported, g.rate = true, now, r.Rate
	var noted *batch
	var until int64
	if two {
		noted, until = l.duplicate(g, now)
	}
	believed := g.believed(up)

	heard := l.heard(r.Authorities)
	for id, h := range g.holdings {
		if _, again := heard[id]; !again && h.said.made && believed {
			h.said = claim{}
			l.recount(h)
		}
	}
	var settled []doomed
	for id, w := range heard {
		h := g.holdings[id]
		if h == nil && w.holds() {
			h = l.holding(id, agent)
		}
		if h == nil {
			continue
		}
		if !believed {
			w.claim = h.said.and(w.claim)
		}
		h.said = w.claim
		if w.holds() {
			h.version++
		} else if w.settled && believed {
			settled = append(settled, doomed{h, h.version})
		}
		l.recount(h)
	}
	l.mu.Unlock()
	if noted != nil {
		if err := l.save(ctx, noted); err != nil {
			return fmt.Errorf("store that agent %s is duplicated: %w", agent, err)
		}
		l.mu.Lock()
		g.duplicatedUntil = max(g.duplicatedUntil, until)
		l.mu.Unlock()
	}
	if err := l.delete(ctx, settled); err != nil {
		return fmt.Errorf("delete what agent %s has settled: %w", agent, err)
	}
	return nil
}

// word is what a report says of an authority.
type word struct {
	claim
	settled bool
}

// heard picks what is to be remembered of a report: what it says of tainted
// authorities, and of others if it says that something is held. The known ones
// go first, so that surplus is not at their cost.
func (l *Ledger) heard(reports []AuthorityReport) map[string]word {
	heard := make(map[string]word)
	for _, known := range []bool{true, false} {
		for _, r := range reports {
			_, is := l.authorities[r.Authority]
			if r.Authority == duplicates || is != known || (!known && len(r.Authority) > maxAuthority) {
				continue
			}
			w := word{
				claim: claim{
					made: true, pending: min(max(0, r.Pending), maxCount), streams: min(max(0, r.Streams), maxCount),
					beginsAt: r.BeginsAt,
				},
				settled: r.Settled && r.Pending == 0 && r.Streams == 0,
			}
			before, twice := heard[r.Authority]
			switch {
			case !r.Tainted && !w.holds():
				continue // it has not seen the taint, so it cannot have settled it
			case twice:
				w.pending, w.streams = max(w.pending, before.pending), max(w.streams, before.streams)
				w.settled = w.settled && before.settled
			case len(heard) == maxReported:
				continue
			}
			heard[r.Authority] = w
		}
	}
	return heard
}

// contacted notes that an agent was heard of.
func (l *Ledger) contacted(g *agent, sequence uint64, now time.Time) {
	if g.contact.At.IsZero() {
		l.calendar.add(now.Add(longest).Unix(), appointment{entry: g.id})
	}
	if sequence > 0 {
		g.contact.Sequence = sequence
	}
	g.contact.At = now
}

// Applied notes that an agent was heard of, and the trust bundle that it has in
// force, where it says no more than that; zero when it does not say.
func (l *Ledger) Applied(agent string, sequence uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.contacted(l.agent(agent), sequence, l.expire())
}

// Contact is when an agent was last heard of and which trust bundle it had in
// force. Reports says that it was more than once or twice a status: that it has
// sent a [Report].
type Contact struct {
	Sequence uint64
	At       time.Time
	Reports  bool
}

// Contact returns the last one of an agent, unless there was none since the
// server started, or for longer than any SVID lives.
func (l *Ledger) Contact(agent string) (Contact, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	g := l.agents[agent]
	if g == nil || g.contact.At.IsZero() {
		return Contact{}, false
	}
	return g.contact, true
}

// Knows reports whether the ledger has anything of an agent: what it may hold, or
// that it was heard from.
func (l *Ledger) Knows(agent string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.agents[agent] != nil
}

// Gone is the operator's word that an agent's node no longer exists: its rows,
// durably, and reports are dropped. Where the word was wrong, the agent's next
// report counts again.
func (l *Ledger) Gone(ctx context.Context, agent string) error {
	l.mu.Lock()
	g := l.agents[agent]
	if g == nil {
		l.mu.Unlock()
		return nil
	}
	g.forget()
	g.known, g.duplicatedUntil = false, 0
	gone := make([]doomed, 0, len(g.holdings))
	for _, h := range g.holdings {
		gone = append(gone, doomed{h, h.version})
	}
	l.forgetAgent(g)
	l.mu.Unlock()
	if err := l.delete(ctx, gone); err != nil {
		return fmt.Errorf("delete what agent %s was given: %w", agent, err)
	}
	return nil
}

// Removed says that a keyset was removed: what is known of its keys is dropped,
// durably. An empty ID stands for no key.
func (l *Ledger) Removed(ctx context.Context, authority, jwtKeyID string) error {
	l.mu.Lock()
	b := l.pending
	if jwtKeyID != "" {
		b.jwt[jwtKeyID] = 0
	}
	var gone []doomed
	if a := l.authorities[authority]; a != nil {
		for _, h := range a.holdings {
			gone = append(gone, doomed{h, h.version})
		}
	}
	l.mu.Unlock()
	err := l.save(ctx, b)
	if err == nil {
		err = l.delete(ctx, gone)
	}
	if err != nil {
		return fmt.Errorf("delete what was given of a removed keyset: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.jwt, jwtKeyID)
	if a := l.authorities[authority]; a != nil {
		a.taint = taint{}
		l.forgetAuthority(a)
	}
	return nil
}

// doomed is a holding that is to go unless something that speaks against it
// has come since.
type doomed struct {
	*holding
	version uint64
}

func (d doomed) stays() bool { return d.holding.version != d.version || d.giving > 0 }

// delete deletes the rows of holdings from storage and then the holdings. A row
// that comes while storage works is stored after that; its holding stays as it
// is.
func (l *Ledger) delete(ctx context.Context, gone []doomed) error {
	for len(gone) > 0 {
		n, rows := 0, 0
		l.mu.Lock()
		b := l.pending
		for ; n < len(gone) && rows < perSave; n++ {
			if gone[n].stays() {
				continue
			}
			for entry := range gone[n].rows {
				b.rows[rowKey{gone[n].authority.id, gone[n].agent.id, entry}] = 0
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
		for _, d := range gone[:n] {
			if !d.stays() {
				l.drop(d.holding)
			}
		}
		l.mu.Unlock()
		gone = gone[n:]
	}
	return nil
}
