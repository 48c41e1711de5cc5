package cache

import (
	"cmp"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Update applies a change of the registration entries: upsert has the new and changed
// ones, gone the IDs of the deleted ones. The first call, even without entries, marks the
// cache as synced.
func (c *Cache) Update(upsert []*Entry, gone []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	first, needed := !c.synced, c.needed
	c.synced = true
	for _, id := range gone {
		if r := c.records[id]; r != nil {
			c.removeLocked(r)
		}
	}
	for _, e := range upsert {
		c.upsertLocked(e)
	}
	c.fillLocked()
	if first {
		for f := range c.followers {
			notify(f.c)
		}
	}
	if first || len(upsert) > 0 || len(gone) > 0 {
		c.wakeWatchesLocked()
	}
	if first || c.needed > needed {
		c.wakeSubscribersLocked()
	}
}

// removeLocked removes the record of a deleted entry.
func (c *Cache) removeLocked(r *record) {
	c.unindexLocked(r)
	c.removeNeedsLocked(r.entry.Selectors)
	for sub := range r.watchers {
		sub.detachLocked(r)
		notify(sub.c)
	}
	r.watchers = nil
	c.setMissingLocked(r, false)
	c.setWantedLocked(r, false)
	if r.list != nil {
		r.list.Remove(r.place)
	}
	delete(c.records, r.entry.ID)
	c.jwts.dropEntry(r.entry.ID)
	c.changedLocked(r)
}

func (c *Cache) upsertLocked(e *Entry) {
	r := c.records[e.ID]
	c.addNeedsLocked(e.Selectors) // before those of the last revision are removed: what both have stays needed
	if r == nil {
		r = &record{entry: e}
		c.records[e.ID] = r
		c.indexLocked(r)
	} else {
		c.unindexLocked(r)
		c.removeNeedsLocked(r.entry.Selectors)
		switch {
		case r.entry.SPIFFEID != e.SPIFFEID || e.IncludeJTI:
			c.jwts.dropEntry(e.ID)
		case r.entry.JWTTTL != e.JWTTTL:
			c.jwts.markOutdated(e.ID)
		}
		r.entry, r.failed = e, false
		if r.svid != nil && !r.gives(r.svid) {
			c.setSVIDLocked(r, nil)
		}
		c.setMissingLocked(r, false)
		c.indexLocked(r)
		for sub := range r.watchers {
			if !subset(e.Selectors, sub.selectors) {
				sub.detachLocked(r)
				delete(r.watchers, sub)
			}
			notify(sub.c)
		}
	}
	for sub := range c.subscribers[r.anchor] {
		if _, has := r.watchers[sub]; !has && subset(e.Selectors, sub.selectors) {
			sub.attachLocked(r)
			notify(sub.c)
		}
	}
	c.dropUnusedLocked(r)
	c.relistLocked(r)
	c.changedLocked(r)
}

// gives reports whether s has the entry's SPIFFE ID. No other SVID is ever held for it, so
// that callers that match only after an edit never get the SPIFFE ID from before.
func (r *record) gives(s *SVID) bool { return s.ID == r.entry.SPIFFEID }

// indexLocked indexes the record by that of its selectors which has the fewest records, so
// that a lookup has few candidates that do not match.
func (c *Cache) indexLocked(r *record) {
	r.anchor = slices.MinFunc(r.entry.Selectors, func(a, b Selector) int {
		return cmp.Compare(len(c.anchors[a]), len(c.anchors[b]))
	})
	c.anchors[r.anchor] = append(c.anchors[r.anchor], r)
	for _, td := range r.entry.FederatesWith {
		c.federated[td]++
	}
}

func (c *Cache) unindexLocked(r *record) {
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

// BundlesPending reports whether an entry federates with a trust domain for whose bundle
// the server has not answered yet.
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

// Entries returns all entries by ID. The map is the caller's.
func (c *Cache) Entries() map[string]*Entry {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make(map[string]*Entry, len(c.records))
	for id, r := range c.records {
		out[id] = r.entry
	}
	return out
}

// matchLocked returns the records whose selectors the caller has, by entry ID.
func (c *Cache) matchLocked(selectors []Selector) []*record {
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
