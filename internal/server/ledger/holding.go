package ledger

import "time"

// authority is an X.509 authority that somebody could hold SVIDs of, or that is
// known to be tainted.
type authority struct {
	id       string
	taint    taint
	holdings map[string]*holding // by agent
	// Sums over holdings.
	svids, agents int
	latest        int64 // Unix seconds
	stale         bool  // latest is of a holding that has gone
}

// agent is one that could hold something, or that was heard of.
type agent struct {
	id       string
	holdings map[string]*holding // by authority
	contact  Contact
	rate     float64
	reported time.Time // zero: never
	reporter reporter
	// known: there may be a process of it that has reported, and is not remembered.
	known           bool
	duplicatedUntil int64 // as far as it is stored, in Unix seconds
}

// forget drops what the agent has said.
func (g *agent) forget() {
	g.contact, g.reported, g.reporter = Contact{}, time.Time{}, reporter{}
}

// holding is what one agent could hold of one authority: its rows, and what it
// last said.
type holding struct {
	authority *authority
	agent     *agent
	rows      map[string]int64 // by entry, expiry in Unix seconds
	// latest is the highest expiry in rows. Rows go all at once or in the order
	// of their expiry, so it never has to be looked for.
	latest int64
	said   claim
	// version grows with everything that speaks against deleting the rows, and
	// giving counts those who are storing one by themselves.
	version uint64
	giving  int
	counted int // what the sums of the authority have of it
}

// claim is an agent's last word on an authority; the zero value is none.
type claim struct {
	made             bool
	pending, streams int
	beginsAt         time.Time
}

// and is the claim of two processes, or of one that is not believed yet.
func (c claim) and(d claim) claim {
	if !c.made || d.beginsAt.After(c.beginsAt) {
		c.beginsAt = d.beginsAt
	}
	c.made = true
	c.pending, c.streams = max(c.pending, d.pending), max(c.streams, d.streams)
	return c
}

func (c claim) holds() bool { return c.pending > 0 || c.streams > 0 }

// count is how many SVIDs are to be shown: what the agent says of itself where
// it has spoken, but never nothing while something is in the way.
func (h *holding) count() int {
	switch {
	case len(h.rows) == 0 && !h.said.holds():
		return 0
	case h.agent.duplicated():
		return max(1, h.said.pending, len(h.rows))
	case h.said.made:
		return max(1, h.said.pending)
	}
	return len(h.rows)
}

// holding finds or makes what an agent could hold of an authority. Who makes
// one calls recount before mu is released.
func (l *Ledger) holding(authorityID, agentID string) *holding {
	a := l.authority(authorityID)
	h := a.holdings[agentID]
	if h == nil {
		g := l.agent(agentID)
		h = &holding{authority: a, agent: g, rows: make(map[string]int64)}
		a.holdings[g.id], g.holdings[a.id] = h, h
	}
	return h
}

func (l *Ledger) authority(id string) *authority {
	a := l.authorities[id]
	if a == nil {
		a = &authority{id: id, holdings: make(map[string]*holding)}
		l.authorities[id] = a
	}
	return a
}

func (l *Ledger) agent(id string) *agent {
	g := l.agents[id]
	if g == nil {
		g = &agent{id: id, holdings: make(map[string]*holding)}
		l.agents[id] = g
	}
	return g
}

// put adds a row. One that is there already never gets shorter: the agent may
// hold either SVID.
func (l *Ledger) put(h *holding, entry string, notAfter time.Time) (expiry int64) {
	before, known := h.rows[entry]
	expiry = max(before, notAfter.Unix())
	h.rows[entry] = expiry
	h.version++
	if !known {
		l.calendar.add(expiry, appointment{h, entry})
	}
	h.latest = max(h.latest, expiry)
	h.authority.latest = max(h.authority.latest, expiry)
	l.recount(h)
	return expiry
}

// drop forgets the rows of a holding and what was said of it.
func (l *Ledger) drop(h *holding) {
	// Not only emptied: the calendar knows the holding for a while still.
	h.rows, h.said = nil, claim{}
	l.recount(h)
}

// recount keeps the sums after a change of a holding, and drops what nothing
// is known of any more.
func (l *Ledger) recount(h *holding) {
	a, n := h.authority, h.count()
	if a.holdings[h.agent.id] != h {
		return // dropped before, and perhaps there is another by now
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
		a.stale = a.stale || h.latest == a.latest
		h.latest = 0
	}
	if n > 0 {
		return
	}
	delete(a.holdings, h.agent.id)
	delete(h.agent.holdings, a.id)
	l.forgetAuthority(a)
	l.forgetAgent(h.agent)
}

func (l *Ledger) forgetAuthority(a *authority) {
	if len(a.holdings) == 0 && !a.taint.known {
		delete(l.authorities, a.id)
	}
}

func (l *Ledger) forgetAgent(g *agent) {
	if len(g.holdings) == 0 && g.contact.At.IsZero() {
		delete(l.agents, g.id)
	}
}

// latestOf is the highest expiry of an authority's rows.
func (a *authority) latestOf() int64 {
	if a.stale {
		a.latest, a.stale = 0, false
		for _, h := range a.holdings {
			a.latest = max(a.latest, h.latest)
		}
	}
	return a.latest
}
