package cache

import (
	"slices"
	"time"

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

// Subscription is one open X.509-SVID stream of a process: it asks for its entries
// to be minted, protects them from eviction, and is counted against the authorities
// of what its process may use because of it. Use it from one goroutine, and close
// it. An answer goes through [Subscription.View], [Subscription.Sending] and
// [Subscription.Read], one at a time.
type Subscription struct {
	cache   *Cache
	process Process
	c       chan struct{}
	opened  time.Time
	serial  uint64 // see Cache.serial
	early   bool   // opened while workloads of the process before were returning

	// Guarded by Cache.mu.
	selectors []Selector
	matched   []*record // by entry ID
	viewed    []Use     // in the last View
	sent      []Use     // on the way, not known to have been read
	held      []Use     // in the last answer that was read
	answered  bool      // an answer was read: what the process has is known
	closed    bool
}

// Subscribe opens a subscription for a call of the process. It counts from now on;
// its entries are those of the selectors, which may be found out later: see
// [Subscription.Select].
func (c *Cache) Subscribe(p Process, selectors []Selector) *Subscription {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := &Subscription{cache: c, process: p, c: make(chan struct{}, 1), opened: time.Now(), serial: c.next(), early: c.returning}
	c.prune(p) // what is over does not count again because this stream has read nothing
	c.reader(p).open[s] = struct{}{}
	c.choose(s, selectors)
	return s
}

// Select makes the entries of the subscription those that match these selectors.
// What its process may use does not change by it.
func (s *Subscription) Select(selectors []Selector) {
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	if !s.closed {
		s.cache.choose(s, selectors)
	}
}

// choose must be called with mu held. What matches before and after is watched all
// the time.
func (c *Cache) choose(s *Subscription, selectors []Selector) {
	before := s.matched
	c.unlist(s)
	s.selectors = slices.Clone(selectors)
	for _, sel := range s.selectors {
		if c.subscribers[sel] == nil {
			c.subscribers[sel] = make(map[*Subscription]struct{})
		}
		c.subscribers[sel][s] = struct{}{}
	}
	s.matched = c.match(selectors)
	for _, r := range s.matched {
		c.watch(r, s)
	}
	for _, r := range before {
		if !slices.Contains(s.matched, r) {
			c.unwatch(r, s)
		}
	}
	c.fill()
	notify(s.c)
}

// unlist takes s from under its selectors.
func (c *Cache) unlist(s *Subscription) {
	for _, sel := range s.selectors {
		if delete(c.subscribers[sel], s); len(c.subscribers[sel]) == 0 {
			delete(c.subscribers, sel)
		}
	}
}

// C receives when the next View may differ from the last. It has capacity one
// and has received once when Subscribe or Select returns.
func (s *Subscription) C() <-chan struct{} { return s.c }

// View reads what the stream is to be told now. From this moment on the stream
// counts against the authorities of this view, so that no answer on its way is
// overlooked.
func (s *Subscription) View() View {
	c := s.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	v := c.view(s.matched)
	s.viewed = nil
	for _, id := range v.Identities {
		s.viewed = AddUse(s.viewed, Use{id.SVID.Authority, id.SVID.NotAfter})
	}
	return v
}

// Sending says that the last View is about to be sent, and returns what the process
// can use because of it. What was read before goes on counting until this is read.
func (s *Subscription) Sending() []Use {
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	uses := s.viewed
	for _, u := range s.viewed {
		s.sent = AddUse(s.sent, u)
	}
	s.viewed = nil
	return uses
}

// Read says that the process has read what was sent: nothing that this stream was
// sent before counts any longer.
func (s *Subscription) Read() {
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	if s.closed {
		return
	}
	s.held, s.sent, s.answered = s.sent, nil, true
	s.cache.readers[s.process].replaced(s)
}

// Close ends the subscription. What its process can use because of it counts on, as
// [Process] says. It may be called more than once.
func (s *Subscription) Close() {
	c := s.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.closed {
		return
	}
	s.closed = true
	c.leave(s)
	c.unlist(s)
	for _, r := range s.matched {
		c.unwatch(r, s)
	}
	s.matched, s.selectors = nil, nil
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
	if _, already := r.watchers[s]; already {
		return
	}
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
