package ledger

import "time"

// authority is an X.509 authority of which agents could hold SVIDs, or that is known to
// be tainted.
type authority struct {
	id       string
	taint    taint
	holdings map[string]*holding // by agent
	// Sums over holdings.
	svids, agents int
	latest        int64 // Unix seconds
	latestDropped bool  // latest is of a holding that was dropped
}

// agent is an agent that could hold SVIDs, or that was in contact.
type agent struct {
	id       string
	holdings map[string]*holding // by authority
	contact  Contact
	rate     float64
	reported time.Time // zero: never
	reporter reporter
	// known: an earlier process may have reported that reporter does not include.
	known           bool
	duplicatedUntil int64 // the latest that is stored, in Unix seconds
}

// resetReports drops all that the agent has reported.
func (g *agent) resetReports() {
	g.contact, g.reported, g.reporter = Contact{}, time.Time{}, reporter{}
}

// holding is what one agent could hold of one authority: its rows and its last claim.
type holding struct {
	authority *authority
	agent     *agent
	rows      map[string]int64 // by entry, expiry in Unix seconds
	// latest is the highest expiry in rows. Rows go all at once or in the order of
	// their expiry, so it never has to be computed from rows.
	latest int64
	claim  claim
	// version grows with every event that cancels a deletion of the rows, and giving
	// counts the calls of RecordWith in progress.
	version   uint64
	recording int
	counted   int // its part of the authority's sums
}

// claim is what an agent last reported of an authority; the zero value is none.
type claim struct {
	made             bool
	pending, streams int
	beginsAt         time.Time
}

// merge returns a claim that covers both, for two processes or one that is not trusted.
func (c claim) merge(d claim) claim {
	if !c.made || d.beginsAt.After(c.beginsAt) {
		c.beginsAt = d.beginsAt
	}
	c.made = true
	c.pending, c.streams = max(c.pending, d.pending), max(c.streams, d.streams)
	return c
}

func (c claim) holds() bool { return c.pending > 0 || c.streams > 0 }

// count returns how many SVIDs to show: as many as the agent has reported, if it has,
// but at least one while the holding keeps the authority from being clear.
func (h *holding) count() int {
	switch {
	case len(h.rows) == 0 && !h.claim.holds():
		return 0
	case h.agent.duplicated():
		return max(1, h.claim.pending, len(h.rows))
	case h.claim.made:
		return max(1, h.claim.pending)
	}
	return len(h.rows)
}

// holdingLocked returns the holding of an agent and an authority, and makes it if
// necessary. After making one, recountLocked must be called before mu is released.
func (l *Ledger) holdingLocked(authorityID, agentID string) *holding {
	a := l.authorityLocked(authorityID)
	h := a.holdings[agentID]
	if h == nil {
		g := l.agentLocked(agentID)
		h = &holding{authority: a, agent: g, rows: make(map[string]int64)}
		a.holdings[g.id], g.holdings[a.id] = h, h
	}
	return h
}

func (l *Ledger) authorityLocked(id string) *authority {
	a := l.authorities[id]
	if a == nil {
		a = &authority{id: id, holdings: make(map[string]*holding)}
		l.authorities[id] = a
	}
	return a
}

func (l *Ledger) agentLocked(id string) *agent {
	g := l.agents[id]
	if g == nil {
		g = &agent{id: id, holdings: make(map[string]*holding)}
		l.agents[id] = g
	}
	return g
}

// putLocked adds a row, and returns its expiry. That of an existing row never becomes
// earlier: the agent may hold either SVID.
func (l *Ledger) putLocked(h *holding, entry string, notAfter time.Time) (expiry int64) {
	before, known := h.rows[entry]
	expiry = max(before, notAfter.Unix())
	h.rows[entry] = expiry
	h.version++
	if !known {
		l.expiryQueue.add(expiry, expiryItem{h, entry})
	}
	h.latest = max(h.latest, expiry)
	h.authority.latest = max(h.authority.latest, expiry)
	l.recountLocked(h)
	return expiry
}

// dropLocked drops the rows and the claim of a holding.
func (l *Ledger) dropLocked(h *holding) {
	// The expiry queue still refers to the holding, so its fields are cleared, too.
	h.rows, h.claim = nil, claim{}
	l.recountLocked(h)
}

// recountLocked updates the sums after a change of a holding, and drops the holding, its
// authority and its agent if they are empty.
func (l *Ledger) recountLocked(h *holding) {
	a, n := h.authority, h.count()
	if a.holdings[h.agent.id] != h {
		return // dropped before, and possibly replaced
	}
	a.svids += n - h.counted
	switch {
	case h.counted == 0 && n > 0:
		a.agents++
	case h.counted > 0 && n == 0:
		a.agents--
	}
	h.counted = n
	if len(h.rows) == 0 && h.latest > 0 {
		a.latestDropped = a.latestDropped || h.latest == a.latest
		h.latest = 0
	}
	if n > 0 {
		return
	}
	delete(a.holdings, h.agent.id)
	delete(h.agent.holdings, a.id)
	l.pruneAuthorityLocked(a)
	l.pruneAgentLocked(h.agent)
}

func (l *Ledger) pruneAuthorityLocked(a *authority) {
	if len(a.holdings) == 0 && !a.taint.known {
		delete(l.authorities, a.id)
	}
}

func (l *Ledger) pruneAgentLocked(g *agent) {
	if len(g.holdings) == 0 && g.contact.At.IsZero() {
		delete(l.agents, g.id)
	}
}

// latestExpiry returns the highest expiry of the authority's rows.
func (a *authority) latestExpiry() int64 {
	if a.latestDropped {
		a.latest, a.latestDropped = 0, false
		for _, h := range a.holdings {
			a.latest = max(a.latest, h.latest)
		}
	}
	return a.latest
}
