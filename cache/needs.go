package cache

import "strings"

// kind is the part of a selector before its value: unix:sha256 of
// unix:sha256:9f86d0...
type kind struct{ typ, name string }

func kindOf(s Selector) kind {
	name, _, _ := strings.Cut(s.Value, ":")
	return kind{s.Type, name}
}

// need is how many selectors of a kind the entries have, and the value of Cache.needed
// when the first one was added.
type need struct {
	selectors int
	since     uint64
}

// Needs returns 0 if no entry has a selector of this kind, such as "unix" and "sha256".
// Attestors need not determine such selectors. Otherwise it returns a number that grows
// each time that a kind becomes needed, when all subscriptions and watches are woken.
// Callers that were attested at a lower number may lack the selector.
func (c *Cache) Needs(typ, name string) uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.needs[kind{typ, name}].since
}

func (c *Cache) addNeedsLocked(selectors []Selector) {
	for _, s := range selectors {
		k := kindOf(s)
		n := c.needs[k]
		if n.selectors++; n.selectors == 1 {
			c.needed++
			n.since = c.needed
		}
		c.needs[k] = n
	}
}

func (c *Cache) removeNeedsLocked(selectors []Selector) {
	for _, s := range selectors {
		k := kindOf(s)
		n := c.needs[k]
		if n.selectors--; n.selectors == 0 {
			delete(c.needs, k)
			continue
		}
		c.needs[k] = n
	}
}
