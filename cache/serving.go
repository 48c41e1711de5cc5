package cache

// Serving returns the number of entries, and whether a valid X.509-SVID is held for any of
// them.
func (c *Cache) Serving() (entries int, valid bool) {
	now := c.now()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, a := range c.authorities {
		for _, r := range a.signed {
			if r.svid.NotAfter.After(now) {
				return len(c.records), true
			}
		}
	}
	return len(c.records), false
}
