package cache

import (
	"slices"

	"github.com/renewd/renewd/bundle"
)

// View is what one caller may be told, read at one moment.
type View struct {
	// Ready is false while the agent is starting: nothing can be said yet.
	Ready bool
	// Partial says that the server has not been asked for its entries yet:
	// more of them than are known may match.
	Partial bool
	// Matched is how many entries match the caller's selectors. Zero means
	// that the caller has no identity here.
	Matched int
	// Waiting is how many of them have no SVID yet and none has failed either:
	// a first answer without them would be withdrawn a moment later.
	Waiting int
	// Identities are the matched entries that have an SVID valid now, by entry
	// ID, one for each hint; see [ByHint]. The first is the default identity
	// (SPIFFE Workload API, 5.2.1).
	Identities []Identity
	// Orphaned is how many of Identities were signed by an authority that
	// Bundle no longer has: nobody with this bundle accepts them, and their
	// replacement is being minted.
	Orphaned int
	// BundlesPending says that a matched entry federates with a trust domain of
	// whose bundle the server has said nothing yet.
	BundlesPending bool
	// Hidden are entries that have an SVID valid now and the hint of an older one.
	Hidden []*Entry
	// Entries are all matched entries, by entry ID.
	Entries []*Entry
	// Bundle is the trust bundle of the same moment; nil until Ready.
	Bundle *bundle.Snapshot
}

// Identity is an entry with its SVID.
type Identity struct {
	Entry *Entry
	SVID  *SVID
}

// Match reads what a caller with these selectors may be told, once. Entries
// above the limit are minted for subscriptions only.
func (c *Cache) Match(selectors []Selector) View {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.view(c.match(selectors))
}

// view must be called with mu held.
func (c *Cache) view(matched []*record) View {
	if c.snapshot == nil || (!c.synced && len(matched) == 0) {
		return View{}
	}
	v := View{
		Ready:      true,
		Partial:    !c.synced,
		Matched:    len(matched),
		Bundle:     c.snapshot,
		Entries:    make([]*Entry, len(matched)),
		Identities: make([]Identity, 0, len(matched)),
	}
	now := c.now()
	hinted := 0
	orphans := orphans{own: c.snapshot.Own}
	for i, r := range matched {
		v.Entries[i] = r.entry
		for _, td := range r.entry.FederatesWith {
			v.BundlesPending = v.BundlesPending || c.snapshot.Pending(td)
		}
		switch {
		case r.svid == nil:
			if !r.failed {
				v.Waiting++
			}
		case r.svid.NotAfter.After(now):
			v.Identities = append(v.Identities, Identity{Entry: r.entry, SVID: r.svid})
			if r.entry.Hint != "" {
				hinted++
			}
		}
	}
	if hinted > 1 {
		valid := make([]*Entry, len(v.Identities))
		for i, id := range v.Identities {
			valid[i] = id.Entry
		}
		_, v.Hidden = ByHint(valid)
		v.Identities = slices.DeleteFunc(v.Identities, func(id Identity) bool { return slices.Contains(v.Hidden, id.Entry) })
	}
	for _, id := range v.Identities {
		if orphans.has(id.SVID.Authority) {
			v.Orphaned++
		}
	}
	return v
}

// orphans says which authorities the bundle no longer has. It remembers the
// last one asked for, since a view has one authority or two.
type orphans struct {
	own    *bundle.Bundle
	asked  string
	answer bool
}

func (o *orphans) has(authorityID string) bool {
	if o.asked != authorityID {
		_, trusted := o.own.X509Authority(authorityID)
		o.asked, o.answer = authorityID, !trusted
	}
	return o.answer
}

// ByHint divides a caller's entries, which are in the order of their IDs, into
// those that it is shown and those that are hidden. The Workload API requires
// hints to be unique in an answer. So of several entries with one hint only the
// oldest is shown, of those created in the same second the first. spire-agent does
// so: the default identity is the same with both.
func ByHint(entries []*Entry) (shown, hidden []*Entry) {
	keeper := make(map[string]*Entry)
	for _, e := range entries {
		if k := keeper[e.Hint]; k == nil || e.CreatedAt.Before(k.CreatedAt) {
			keeper[e.Hint] = e
		}
	}
	for _, e := range entries {
		if e.Hint == "" || keeper[e.Hint] == e {
			shown = append(shown, e)
		} else {
			hidden = append(hidden, e)
		}
	}
	return shown, hidden
}

// Subscription is one open X.509-SVID stream: it asks for its entries to be
// minted, protects them from eviction, and is counted against the authorities
// of what it was last sent. Use it from one goroutine, and close it.
type Subscription struct {
	cache     *Cache
	c         chan struct{}
	selectors []Selector

	// Guarded by Cache.mu.
	matched []*record // by entry ID
	viewed  []string  // authorities in the last View
	sent    []string  // authorities in the last View that was sent
	// answered: something was sent, so what the workload has is known.
	answered, closed bool
}

// Subscribe opens a subscription for a caller with these selectors.
func (c *Cache) Subscribe(selectors []Selector) *Subscription {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := &Subscription{cache: c, c: make(chan struct{}, 1), selectors: slices.Clone(selectors)}
	for _, sel := range selectors {
		if c.subscribers[sel] == nil {
			c.subscribers[sel] = make(map[*Subscription]struct{})
		}
		c.subscribers[sel][s] = struct{}{}
	}
	s.matched = c.match(selectors)
	for _, r := range s.matched {
		c.watch(r, s)
	}
	c.unanswered++
	c.fill()
	notify(s.c)
	return s
}

// Unanswered counts the open subscriptions that nothing was sent on yet. Their
// workloads may still use what they got from an earlier one.
func (c *Cache) Unanswered() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.unanswered
}

// C receives when the next View may differ from the last. It has capacity one
// and has received once when Subscribe returns.
func (s *Subscription) C() <-chan struct{} { return s.c }

// View reads what the stream is to be told now. From this moment on the
// stream counts against the authorities of both this view and the last one
// sent, so that no answer on its way is overlooked.
func (s *Subscription) View() View {
	c := s.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	v := c.view(s.matched)
	var viewed []string
	for _, id := range v.Identities {
		if !slices.Contains(viewed, id.SVID.Authority) {
			viewed = append(viewed, id.SVID.Authority)
		}
	}
	s.hang(viewed, s.sent)
	return v
}

// Sent says that the last View has been sent: what was sent before it no
// longer counts.
func (s *Subscription) Sent() {
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	if !s.answered && !s.closed {
		s.answered = true
		s.cache.unanswered--
	}
	s.hang(s.viewed, s.viewed)
}

// hang makes the stream count against the union of viewed and sent.
func (s *Subscription) hang(viewed, sent []string) {
	before, after := union(s.viewed, s.sent), union(viewed, sent)
	s.viewed, s.sent = viewed, sent
	for _, id := range after {
		if !slices.Contains(before, id) {
			s.cache.authority(id).streams++
		}
	}
	for _, id := range before {
		if !slices.Contains(after, id) {
			a := s.cache.authority(id)
			a.streams--
			s.cache.forget(id, a)
		}
	}
}

func union(a, b []string) []string {
	out := slices.Clone(a)
	for _, s := range b {
		if !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	return out
}

// Close ends the subscription. It may be called more than once.
func (s *Subscription) Close() {
	c := s.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	if !s.answered && !s.closed {
		c.unanswered--
	}
	s.closed = true
	s.hang(nil, nil)
	for _, sel := range s.selectors {
		if delete(c.subscribers[sel], s); len(c.subscribers[sel]) == 0 {
			delete(c.subscribers, sel)
		}
	}
	for _, r := range s.matched {
		c.unwatch(r, s)
	}
	s.matched = nil
	c.fill()
}

// attach adds an entry that has come to match. Cache.mu is held.
func (s *Subscription) attach(r *record) {
	i, _ := slices.BinarySearchFunc(s.matched, r, byEntryID)
	s.matched = slices.Insert(s.matched, i, r)
	s.cache.watch(r, s)
}

// detach drops an entry that no longer matches; the caller takes s out of
// r.watchers. Cache.mu is held.
func (s *Subscription) detach(r *record) {
	if i := slices.Index(s.matched, r); i >= 0 {
		s.matched = slices.Delete(s.matched, i, i+1)
	}
}

// watch and unwatch keep the streams of a record; the first and the last of
// them change its urgency.
func (c *Cache) watch(r *record, s *Subscription) {
	if r.watchers == nil {
		r.watchers = make(map[*Subscription]struct{}, 1)
	}
	r.watchers[s] = struct{}{}
	if len(r.watchers) == 1 {
		c.setWanted(r, true)
		c.file(r)
		c.changed(r)
	}
}

func (c *Cache) unwatch(r *record, s *Subscription) {
	delete(r.watchers, s)
	if len(r.watchers) == 0 {
		r.watchers = nil
		c.relinquish(r)
		c.file(r)
		c.changed(r)
	}
}

// Watch wakes on every change of bundle, entries or readiness. It is for
// streams that are not about X.509-SVIDs; they read with [Cache.Match].
type Watch struct {
	cache *Cache
	c     chan struct{}
}

// Watch opens a watch. Close it when done.
func (c *Cache) Watch() *Watch {
	c.mu.Lock()
	defer c.mu.Unlock()
	w := &Watch{cache: c, c: make(chan struct{}, 1)}
	c.watches[w.c] = struct{}{}
	notify(w.c)
	return w
}

// C receives when something changed, and once right after [Cache.Watch].
func (w *Watch) C() <-chan struct{} { return w.c }

// Close ends the watch.
func (w *Watch) Close() {
	w.cache.mu.Lock()
	defer w.cache.mu.Unlock()
	delete(w.cache.watches, w.c)
}

func (c *Cache) wakeWatches() {
	for w := range c.watches {
		notify(w)
	}
}
