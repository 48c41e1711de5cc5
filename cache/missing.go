package cache

// SetMissing records whether the server lists these entries at present. A missing entry is
// served like any other until it is deleted, but a failed mint for it is expected.
func (c *Cache) SetMissing(missing bool, entryIDs ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, id := range entryIDs {
		if r := c.records[id]; r != nil && r.missing != missing {
			c.setMissingLocked(r, missing)
			c.changedLocked(r)
		}
	}
}

func (c *Cache) setMissingLocked(r *record, missing bool) {
	if r.missing == missing {
		return
	}
	if r.missing = missing; missing {
		c.missing++
	} else {
		c.missing--
	}
}

// Missing reports whether the entry is missing; see [Cache.SetMissing].
func (c *Cache) Missing(entryID string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.records[entryID]
	return r != nil && r.missing
}

// CountMissing counts the entries that are missing; see [Cache.SetMissing].
func (c *Cache) CountMissing() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.missing
}
