package cache

import "container/list"

// This file decides which entries have an SVID held ready: those that an open
// stream asks for, whatever their number, and others up to the limit, the most
// recently used first. Of those with NoPrefetch that is what a stream has asked
// for before: it is held as long as it is fresh and there is room.

// file puts r into the list where it belongs now; into none while a stream is
// open, nor when nothing is to be done before one is.
func (c *Cache) file(r *record) {
	var to *list.List
	switch {
	case len(r.watchers) > 0:
	case !r.wanted && r.entry.NoPrefetch:
	case !r.wanted:
		to = c.lazy
	case r.svid == nil:
		to = c.bare
	case r.entry.NoPrefetch:
		to = c.spare
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

// setWanted moves r between the wanted and the lazy ones and keeps the count.
// What is not wanted is not held.
func (c *Cache) setWanted(r *record, wanted bool) {
	if r.wanted == wanted {
		return
	}
	if r.wanted = wanted; wanted {
		c.wanted++
	} else {
		c.wanted--
		r.failed = false
		c.setSVID(r, nil)
	}
	c.file(r)
	c.changed(r)
}

// fill brings the number of wanted records to the limit, as far as no SVID is
// lost by that: it takes lazy ones in while there is room, and gives up those
// that hold nothing yet while there is not.
func (c *Cache) fill() {
	for c.wanted < c.limit && c.lazy.Len() > 0 {
		c.setWanted(c.lazy.Front().Value.(*record), true)
	}
	for c.wanted > c.limit && c.bare.Len() > 0 {
		c.setWanted(c.bare.Front().Value.(*record), false)
	}
}

// evict gives up the least recently used SVIDs above the limit, and of entries
// with NoPrefetch also those that would be due for renewal. It follows a Put: what
// has been minted shows that the server signs, so what is given up can be had
// again. In an outage all that is held is kept. What was put stays, for whoever
// has asked for it.
func (c *Cache) evict(put *record) {
	if c.returning {
		return
	}
	now := c.now()
	for el := c.spare.Front(); el != nil; {
		r := el.Value.(*record)
		el = el.Next()
		if r != put && (c.held > c.limit || !now.Before(r.svid.RenewAt)) {
			c.setWanted(r, false)
		}
	}
	for c.held > c.limit && c.idle.Len() > 0 {
		c.setWanted(c.idle.Front().Value.(*record), false)
	}
}

// relinquish gives up what is not to be minted because nobody asks for it any
// more: the SVID of an entry with NoPrefetch that is not there yet, or would have
// to be minted again.
func (c *Cache) relinquish(r *record) {
	if r.entry.NoPrefetch && len(r.watchers) == 0 && (r.svid == nil || !r.svid.For(r.entry)) {
		c.setWanted(r, false)
	}
}
