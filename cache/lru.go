package cache

// This file decides which entries have an SVID held ready: those that an open
// stream asks for, whatever their number, and others up to the limit, the most
// recently used first.

// settle puts r where it belongs now: among the streamed, the idle or the
// lazy ones.
func (c *Cache) settle(r *record) {
	if len(r.watchers) > 0 {
		c.setWanted(r, true)
		if r.place != nil {
			c.idle.Remove(r.place)
			r.place = nil
		}
		return
	}
	if r.place == nil && r.wanted {
		r.place = c.idle.PushBack(r)
	}
}

// setWanted moves r between the wanted and the lazy ones and keeps the count.
func (c *Cache) setWanted(r *record, wanted bool) {
	if r.wanted == wanted {
		return
	}
	r.wanted = wanted
	if wanted {
		c.wanted++
		if r.place != nil {
			c.lazy.Remove(r.place)
		}
		r.place = c.idle.PushBack(r)
	} else {
		c.wanted--
		if r.place != nil {
			c.idle.Remove(r.place)
		}
		r.place = c.lazy.PushBack(r)
	}
	c.changed(r)
}

// fill brings the number of wanted records to the limit: takes lazy ones in
// while there is room, and gives up the least recently used idle ones while
// there is not.
func (c *Cache) fill() {
	for c.wanted < c.limit && c.lazy.Len() > 0 {
		c.setWanted(c.lazy.Front().Value.(*record), true)
	}
	for !c.restored && c.wanted > c.limit && c.idle.Len() > 0 {
		r := c.idle.Front().Value.(*record)
		c.setWanted(r, false)
		c.setSVID(r, nil)
		r.failed = false
	}
}
