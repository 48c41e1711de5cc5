package cache

import (
	"cmp"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// This file owns the registration entries: what changes them, and which match.

// Update applies a change of the registration entries: upsert holds new and
// changed entries, gone the IDs of those deleted. The first call, empty or
// not, marks the cache as synced.
func (c *Cache) Update(upsert []*Entry, gone []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	first, needed := !c.synced, c.needed
	c.synced = true
	for _, id := range gone {
		if r := c.records[id]; r != nil {
			c.remove(r)
		}
	}
	for _, e := range upsert {
		c.upsert(e)
	}
	c.fill()
	if first {
		for f := range c.followers {
			notify(f.c)
		}
	}
	if first || len(upsert) > 0 || len(gone) > 0 {
		c.wakeWatches()
	}
	if first || c.needed > needed {
		c.wakeSubscribers()
	}
}

// remove takes a deleted entry's record out of everything.
func (c *Cache) remove(r *record) {
	c.unindex(r)
	c.unneed(r.entry.Selectors)
	for sub := range r.watchers {
		sub.detach(r)
		notify(sub.c)
	}
	r.watchers = nil
	c.setMissing(r, false)
	c.setWanted(r, false)
	if r.list != nil {
		r.list.Remove(r.place)
	}
	delete(c.records, r.entry.ID)
	c.jwts.dropEntry(r.entry.ID)
	c.changed(r)
}

func (c *Cache) upsert(e *Entry) {
	r := c.records[e.ID]
	c.need(e.Selectors) // before those of its last revision go: what both have stays needed
	if r == nil {
		r = &record{entry: e}
		c.records[e.ID] = r
		c.index(r)
	} else {
		c.unindex(r)
		c.unneed(r.entry.Selectors)
		switch {
		case r.entry.SPIFFEID != e.SPIFFEID || e.IncludeJTI:
			c.jwts.dropEntry(e.ID)
		case r.entry.JWTTTL != e.JWTTTL:
			c.jwts.age(e.ID)
		}
		r.entry, r.failed = e, false
		if r.svid != nil && !r.gives(r.svid) {
			c.setSVID(r, nil)
		}
		c.setMissing(r, false)
		c.index(r)
		for sub := range r.watchers {
			if !subset(e.Selectors, sub.selectors) {
				sub.detach(r)
				delete(r.watchers, sub)
			}
			notify(sub.c)
		}
	}
	for sub := range c.subscribers[r.anchor] {
		if _, has := r.watchers[sub]; !has && subset(e.Selectors, sub.selectors) {
			sub.attach(r)
			notify(sub.c)
		}
	}
	c.relinquish(r)
	c.file(r)
	c.changed(r)
}

// gives reports whether s is an SVID that the entry gives. No other is ever held
// for it: whoever an entry matches after an edit gets what it gives now, and
// never what it gave before.
func (r *record) gives(s *SVID) bool { return s.ID == r.entry.SPIFFEID }

// index files the record under the selector that the fewest records are filed
// under, so that a look-up meets few candidates that do not match.
func (c *Cache) index(r *record) {
	r.anchor = slices.MinFunc(r.entry.Selectors, func(a, b Selector) int {
		return cmp.Compare(len(c.anchors[a]), len(c.anchors[b]))
	})
	c.anchors[r.anchor] = append(c.anchors[r.anchor], r)
	for _, td := range r.entry.FederatesWith {
		c.federated[td]++
	}
}

func (c *Cache) unindex(r *record) {
	filed := c.anchors[r.anchor]
	i := slices.Index(filed, r)
	filed[i] = filed[len(filed)-1]
	filed[len(filed)-1] = nil
	if c.anchors[r.anchor] = filed[:len(filed)-1]; len(filed) == 1 {
		delete(c.anchors, r.anchor)
	}
	for _, td := range r.entry.FederatesWith {
		if c.federated[td]--; c.federated[td] == 0 {
			delete(c.federated, td)
		}
	}
}

// FederatesWith lists the trust domains that the entries federate with.
func (c *Cache) FederatesWith() []spiffeid.TrustDomain {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make([]spiffeid.TrustDomain, 0, len(c.federated))
	for td := range c.federated {
		out = append(out, td)
	}
	slices.SortFunc(out, func(a, b spiffeid.TrustDomain) int { return cmp.Compare(a.Name(), b.Name()) })
	return out
}

// BundlesPending reports whether an entry federates with a trust domain of whose
// bundle the server has said nothing yet.
func (c *Cache) BundlesPending() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for td := range c.federated {
		if c.snapshot != nil && c.snapshot.Pending(td) {
			return true
		}
	}
	return false
}

// Entries returns every entry held, by ID. The map is the caller's.
func (c *Cache) Entries() map[string]*Entry {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make(map[string]*Entry, len(c.records))
	for id, r := range c.records {
		out[id] = r.entry
	}
	return out
}

// match returns the records whose selectors the caller all has, by entry ID.
func (c *Cache) match(selectors []Selector) []*record {
	var out []*record
	for i, s := range selectors {
		if slices.Contains(selectors[:i], s) {
			continue
		}
		for _, r := range c.anchors[s] {
			if subset(r.entry.Selectors, selectors) {
				out = append(out, r)
			}
		}
	}
	slices.SortFunc(out, byEntryID)
	return out
}

func byEntryID(a, b *record) int { return cmp.Compare(a.entry.ID, b.entry.ID) }

// subset reports whether every selector in some is in all. Both are short.
func subset(some, all []Selector) bool {
	for _, s := range some {
		if !slices.Contains(all, s) {
			return false
		}
	}
	return true
}
