package cache

// SetMissing notes that the server's answers do not name these entries at
// present, or that they do again. An entry that is missing is served like any
// other until it is deleted; but that nothing is minted for it is no fault.
func (c *Cache) SetMissing(missing bool, entryIDs ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, id := range entryIDs {
		if r := c.records[id]; r != nil && r.missing != missing {
			c.setMissing(r, missing)
			c.changed(r)
		}
	}
}

func (c *Cache) setMissing(r *record, missing bool) {
	if r.missing == missing {
		return
	}
	if r.missing = missing; missing {
		c.missing++
	} else {
		c.missing--
	}
}

// Missing reports whether the server's answers do not name an entry that is
// held; see [Cache.SetMissing].
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
