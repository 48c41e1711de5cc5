package cache

import "container/list"

// This file decides for which entries an SVID is held: all with an open stream, and the
// most recently used of the others, up to the limit. The SVID of an entry with NoPrefetch
// is minted for a stream and then held while it is fresh and within the limit.

// relistLocked moves r to the list where it belongs. A record with an open stream, or
// that needs nothing before there is one, is in no list.
func (c *Cache) relistLocked(r *record) {
	var to *list.List
	switch {
	case len(r.watchers) > 0:
	case !r.wanted && r.entry.NoPrefetch:
	case !r.wanted:
		to = c.overLimit
	case r.svid == nil:
		to = c.unheld
	case r.entry.NoPrefetch:
		to = c.onDemand
	default:
		to = c.idle
	}
	if r.list == to {
		return
	}
	if r.list != nil {
		r.list.Remove(r.place)
		r.place = nil
	}
	if r.list = to; to != nil {
		r.place = to.PushBack(r)
	}
}

// setWantedLocked sets whether an SVID is to be held for r. If not, it drops the SVID.
func (c *Cache) setWantedLocked(r *record, wanted bool) {
	if r.wanted == wanted {
		return
	}
	if r.wanted = wanted; wanted {
		c.wanted++
	} else {
		c.wanted--
		r.failed = false
		c.setSVIDLocked(r, nil)
	}
	c.relistLocked(r)
	c.changedLocked(r)
}

// fillLocked brings the number of wanted records to the limit without dropping an SVID:
// below it records over the limit become wanted, above it those without an SVID do not
// stay so.
func (c *Cache) fillLocked() {
	for c.wanted < c.limit && c.overLimit.Len() > 0 {
		c.setWantedLocked(c.overLimit.Front().Value.(*record), true)
	}
	for c.wanted > c.limit && c.unheld.Len() > 0 {
		c.setWantedLocked(c.unheld.Front().Value.(*record), false)
	}
}

// evictLocked drops the least recently used SVIDs above the limit, and those of entries
// with NoPrefetch that are due. It is called after a Put, which shows that the server
// signs, so that a dropped SVID can be minted again. In an outage nothing is evicted. The
// SVID of put stays for the caller that it was minted for.
func (c *Cache) evictLocked(put *record) {
	if c.returning {
		return
	}
	now := c.now()
	for el := c.onDemand.Front(); el != nil; {
		r := el.Value.(*record)
		el = el.Next()
		if r != put && (c.held > c.limit || !now.Before(r.svid.RenewAt)) {
			c.setWantedLocked(r, false)
		}
	}
	for c.held > c.limit && c.idle.Len() > 0 {
		c.setWantedLocked(c.idle.Front().Value.(*record), false)
	}
}

// dropUnusedLocked makes an entry with NoPrefetch unwanted if it has no stream and its
// SVID would have to be minted.
func (c *Cache) dropUnusedLocked(r *record) {
	if r.entry.NoPrefetch && len(r.watchers) == 0 && (r.svid == nil || !r.svid.For(r.entry)) {
		c.setWantedLocked(r, false)
	}
}
