package cache

import "strings"

// kind is the part of selectors that says what they are about: unix:sha256 of
// unix:sha256:9f86d0...
type kind struct{ typ, name string }

func kindOf(s Selector) kind {
	name, _, _ := strings.Cut(s.Value, ":")
	return kind{s.Type, name}
}

// need is how many selectors of a kind the entries have, and which of the kinds
// that have come to be needed so far it was.
type need struct {
	selectors int
	since     uint64
}

// Needs reports whether an entry has a selector of this kind, such as "unix" and
// "sha256": attestors need not find out what no entry asks for. It returns 0 when
// none has, and otherwise a number that is greater each time that this has come
// to be so. Whoever was attested at a lower number may lack the selector; all
// subscriptions and watches are woken then.
func (c *Cache) Needs(typ, name string) uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.needs[kind{typ, name}].since
}

func (c *Cache) need(selectors []Selector) {
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

func (c *Cache) unneed(selectors []Selector) {
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
