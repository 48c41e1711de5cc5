package ledger_test

import (
	"fmt"
	"maps"
	"time"

	"github.com/renewd/renewd/internal/server/ledger"
)

const (
	// reconnects is the time in which workloads reconnect after a restart of their
	// agent. Until then the agent does not report settled.
	reconnects = 30 * time.Second
	timeout    = 30 * time.Second // for calls
)

// agent is a node with its workloads.
type agent struct {
	s    *sim
	id   string
	ttl  time.Duration // of its SVIDs
	slow bool

	partitioned, evicted, destroyed bool

	up      bool
	life    int    // grows with each restart
	process string // ID of the present or last process
	started time.Time
	disk    disk // survives the process; the cache is a little outdated
	cache   map[string]svid
	half    map[string]time.Time // when half of each lifetime is over
	bundle  *bundle
	seen    map[string]time.Time // when the agent saw the taint of an authority
	delays  map[string]time.Duration
	calls   map[*call]struct{}
	jwts    map[string]time.Time // expiry of the workloads' JWT-SVIDs, by key

	workloads []*workload
	entries   []string // the agent SVID first

	cloned       bool      // there are two of it
	heard        time.Time // when the server last stored a report
	reporting    bool
	reports      int // number of reports
	last         ledger.Report
	lastReported time.Time

	saved *image
	// rowless: it holds SVIDs that the server cannot know of before it reports;
	// spoke: it has reported them to the present server process.
	rowless, spoke map[string]bool
}

type disk struct {
	cache  map[string]svid
	bundle *bundle
	seen   map[string]time.Time
}

func newAgent(s *sim, n int) *agent {
	a := &agent{
		s: s, id: fmt.Sprintf("agent-%02d", n), ttl: s.ttl(), entries: []string{""},
		rowless: map[string]bool{}, spoke: map[string]bool{}, jwts: map[string]time.Time{}, delays: map[string]time.Duration{},
	}
	for i := range s.r.IntN(6) {
		a.entries = append(a.entries, fmt.Sprint("entry-", i))
	}
	for range s.r.IntN(4) {
		w := &workload{holds: map[string]svid{}}
		for _, e := range a.entries[1:] {
			if s.r.IntN(2) == 0 {
				w.entries = append(w.entries, e)
			}
		}
		a.workloads = append(a.workloads, w)
	}
	a.disk = disk{cache: map[string]svid{}, seen: map[string]time.Time{}}
	a.begin()
	s.after(s.between(0, 5*time.Second), a.tick)
	return a
}

// begin starts a process of the agent with its data on disk.
func (a *agent) begin() {
	a.s.touched[a] = true
	a.up, a.started = true, a.s.now
	a.process = fmt.Sprint("process-", a.s.r.Uint64())
	a.cache, a.bundle, a.seen = maps.Clone(a.disk.cache), a.disk.bundle, maps.Clone(a.disk.seen)
	a.half = map[string]time.Time{}
	a.calls, a.reporting, a.lastReported = map[*call]struct{}{}, false, time.Time{}
	life := a.life
	for _, w := range a.workloads {
		a.s.after(a.s.between(0, reconnects), func() {
			if a.life == life {
				w.open = true
				a.push(w)
			}
		})
	}
}

func (a *agent) end() {
	a.up = false
	a.life++
	for c := range a.calls {
		c.open = false
	}
	for _, w := range a.workloads {
		w.open, w.viewed, w.sent, w.pushing = false, nil, nil, false
	}
}

// restart ends the process and begins a new one, with the data on disk or without.
func (a *agent) restart(lost bool) {
	if !a.up || a.destroyed {
		return
	}
	a.s.met[fmt.Sprint("agent restarted, state lost ", lost)]++
	a.end()
	if lost {
		a.disk = disk{cache: map[string]svid{}, seen: map[string]time.Time{}}
	}
	life := a.life
	a.s.after(a.s.between(0, 40*time.Second), func() {
		if a.life == life && !a.destroyed {
			a.begin()
		}
	})
}

func (a *agent) destroy() {
	a.end()
	a.destroyed = true
}

// image is a snapshot of a virtual machine.
type image struct {
	disk  disk
	cache map[string]svid
	holds []map[string]svid
}

func (a *agent) snapshot() {
	a.saved = &image{disk: a.disk, cache: maps.Clone(a.cache)}
	a.saved.disk.cache = maps.Clone(a.disk.cache)
	a.saved.disk.seen = maps.Clone(a.disk.seen)
	for _, w := range a.workloads {
		a.saved.holds = append(a.saved.holds, maps.Clone(w.holds))
	}
}

// rollBack restores the machine's image: it holds SVIDs again that were settled.
func (a *agent) rollBack() {
	if a.saved == nil || !a.up || a.destroyed {
		return
	}
	a.end()
	a.disk = a.saved.disk
	for i, w := range a.workloads {
		w.holds = maps.Clone(a.saved.holds[i])
	}
	a.begin()
	a.cache = maps.Clone(a.saved.cache)
	a.saved = nil
	a.unknown()
}

// clone adds a second node with the same disk, or with all of a running machine.
func (a *agent) clone(running bool) {
	if a.cloned || !a.up || a.destroyed {
		return
	}
	s := a.s
	b := &agent{
		s: s, id: a.id, ttl: a.ttl, slow: a.slow, entries: a.entries, evicted: a.evicted, cloned: true,
		disk:    disk{cache: maps.Clone(a.disk.cache), bundle: a.disk.bundle, seen: maps.Clone(a.disk.seen)},
		rowless: map[string]bool{}, spoke: map[string]bool{}, jwts: maps.Clone(a.jwts), delays: maps.Clone(a.delays),
	}
	for _, w := range a.workloads {
		b.workloads = append(b.workloads, &workload{entries: w.entries, holds: maps.Clone(w.holds)})
	}
	b.begin()
	if running {
		b.process, b.reports, b.cache = a.process, a.reports, maps.Clone(a.cache)
	}
	a.cloned = true
	b.unknown()
	s.agents = append(s.agents, b)
	s.after(s.between(0, 5*time.Second), b.tick)
}

// unknown records that the server cannot know which SVIDs the agent holds now.
func (a *agent) unknown() {
	for _, m := range a.places() {
		for _, v := range m {
			a.rowless[v.authority] = true
		}
	}
	for c := range a.s.server.calls {
		if c.agent == a && c.signer != nil {
			a.rowless[c.signer.authority] = true
		}
	}
	clear(a.spoke)
}

// places returns the SVIDs on the node by their place.
func (a *agent) places() map[string]map[string]svid {
	out := map[string]map[string]svid{"the cache": a.cache, "the disk": a.disk.cache}
	if !a.up {
		delete(out, "the cache")
	}
	for i, w := range a.workloads {
		out[fmt.Sprint("workload ", i)] = w.holds
		out[fmt.Sprint("an answer to workload ", i)] = w.viewed
	}
	return out
}

// has returns the place on the node of an unexpired SVID of the authority, "" for none.
func (a *agent) has(authority string) string {
	valid := func(m map[string]svid) bool {
		for _, v := range m {
			if v.authority == authority && v.notAfter.After(a.s.now) {
				return true
			}
		}
		return false
	}
	switch {
	case a.up && valid(a.cache):
		return "the cache"
	case valid(a.disk.cache):
		return "the disk"
	}
	for i, w := range a.workloads {
		if valid(w.holds) || valid(w.viewed) {
			return fmt.Sprint("workload ", i)
		}
	}
	return ""
}

// tick runs every five seconds.
func (a *agent) tick() {
	s := a.s
	if a.destroyed {
		return
	}
	pace := s.between(4500*time.Millisecond, 5500*time.Millisecond)
	if a.slow {
		pace *= 10
	}
	s.after(pace, a.tick)
	if !a.up {
		return
	}
	if s.server.reaches(a) && !s.happens(20, "refresh lost") {
		b, life := s.server.bundle, a.life
		delay := s.between(0, time.Second)
		if a.slow {
			delay *= 60
		}
		s.after(delay, func() {
			if a.life == life {
				a.apply(b)
			}
		})
	}
	a.renew()
	a.report()
}

func (a *agent) apply(b *bundle) {
	if a.bundle != nil && b.sequence <= a.bundle.sequence {
		return
	}
	a.bundle = b
	for id, mark := range b.tainted {
		if !mark {
			delete(a.seen, id) // a restore has undone the taint
		}
		if _, known := a.seen[id]; mark && !known {
			a.seen[id] = a.s.now
			if a.delays[id] == 0 {
				a.delays[id] = a.s.between(1, time.Minute)
			}
		}
	}
	a.disk.bundle, a.disk.seen = b, maps.Clone(a.seen)
}

// renew asks for missing and old SVIDs, and at a slow rate for tainted ones.
func (a *agent) renew() {
	now := a.s.now
	asked := map[string]bool{}
	for c := range a.calls {
		for _, e := range c.entries {
			asked[e] = true
		}
	}
	var due []string
	wave := 2
	for _, e := range a.entries {
		v, held := a.cache[e]
		if held && !v.notAfter.After(now) {
			delete(a.cache, e)
			held = false
		}
		if asked[e] {
			continue
		}
		seen, marked := a.seen[v.authority]
		_, trusted := a.bundleOrNone()[v.authority]
		switch {
		case !held, v.notAfter.Sub(now) < minTTL/2, !a.half[e].IsZero() && now.After(a.half[e]), a.bundle != nil && !trusted:
			if e == "" {
				a.call(&call{entries: []string{e}})
			} else {
				due = append(due, e)
			}
		case marked && wave > 0 && !now.Before(seen.Add(a.delays[v.authority])):
			wave--
			a.call(&call{entries: []string{e}})
		}
	}
	if len(due) > 0 {
		a.call(&call{entries: due})
	}
	if a.s.r.IntN(50) == 0 {
		a.call(&call{jwt: true})
	}
}

func (a *agent) bundleOrNone() map[string]bool {
	if a.bundle == nil {
		return nil
	}
	return a.bundle.tainted
}

// call sends a request to the server, with a timeout.
func (a *agent) call(c *call) {
	c.agent, c.began, c.open = a, a.s.now, true
	a.calls[c] = struct{}{}
	life := a.life
	a.s.after(a.s.between(0, 200*time.Millisecond), func() { a.s.server.mint(c) })
	a.s.after(timeout, func() {
		if a.life == life {
			c.open = false
			delete(a.calls, c)
		}
	})
}

// take stores an answer, unless the agent holds something better.
func (a *agent) take(c *call) {
	a.s.touched[a] = true
	delete(a.calls, c)
	c.open = false
	if c.jwt {
		k := c.signer.key
		a.jwts[k] = later(a.jwts[k], c.expiry)
		return
	}
	for e, v := range c.svids {
		held, have := a.cache[e]
		if a.bundleOrNone()[v.authority] && have && !a.bundleOrNone()[held.authority] {
			continue
		}
		a.cache[e] = v
		a.half[e] = a.s.now.Add(v.notAfter.Sub(a.s.now) / 2)
	}
	if _, own := c.svids[""]; own {
		a.disk.cache[""] = a.cache[""]
	}
	life := a.life
	a.s.after(a.s.between(0, 5*time.Second), func() {
		if a.life == life {
			a.s.touched[a] = true
			a.disk.cache = maps.Clone(a.cache)
		}
	})
	for _, w := range a.workloads {
		a.push(w)
	}
}

func later(x, y time.Time) time.Time {
	if x.After(y) {
		return x
	}
	return y
}
