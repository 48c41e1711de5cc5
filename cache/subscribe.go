package cache

import (
	"slices"
	"time"

	"github.com/renewd/renewd/bundle"
)

// View is the answer for one caller, read at one moment.
type View struct {
	// Ready is false while the agent is starting and has no answer yet.
	Ready bool
	// Partial means that the entries were not synchronized with the server yet: others
	// may match, too.
	Partial bool
	// Matched is how many entries match the caller's selectors. Zero means that the
	// caller has no identity.
	Matched int
	// Waiting is how many of them have no SVID yet and no failed mint. A first answer
	// without them would be replaced a moment later.
	Waiting int
	// Identities are the matched entries with a valid SVID, by entry ID, one for each
	// hint; see [ByHint]. The first is the default identity (SPIFFE Workload API,
	// 5.2.1).
	Identities []Identity
	// Orphaned is how many of Identities were signed by an authority that is not in
	// Bundle: no peer with this bundle accepts them, and their replacement is due.
	Orphaned int
	// BundlesPending means that a matched entry federates with a trust domain for
	// whose bundle the server has not answered yet.
	BundlesPending bool
	// Hidden are entries with a valid SVID and the hint of an older entry.
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

// Match returns the view of a caller with these selectors. Entries above the limit are
// minted for subscriptions only.
func (c *Cache) Match(selectors []Selector) View {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.viewLocked(c.matchLocked(selectors))
}

// MayMatch reports whether a caller with these selectors could match one of the wanted
// entries if it also had all selectors of the missing types. wanted is called with the
// cache locked.
func (c *Cache) MayMatch(selectors []Selector, missing []string, wanted func(*Entry) bool) bool {
	if len(missing) == 0 {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range c.records {
		lacks := func(s Selector) bool { return !slices.Contains(missing, s.Type) && !slices.Contains(selectors, s) }
		if !slices.ContainsFunc(r.entry.Selectors, lacks) && wanted(r.entry) {
			return true
		}
	}
	return false
}

func (c *Cache) viewLocked(matched []*record) View {
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

// orphans tells which authorities are not in the bundle. It caches the last answer, because
// a view has one or two authorities.
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

// ByHint divides a caller's entries, which are in the order of their IDs, into shown and
// hidden ones. The Workload API requires hints to be unique in an answer. So of several
// entries with one hint only the oldest is shown, and of those created in the same second
// the first. spire-agent does the same, so the default identity does not depend on the
// agent.
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

// Subscription is one open X.509-SVID stream of a process. It makes its entries wanted,
// protects their SVIDs from eviction, and uses the authorities of all SVIDs that it may
// have delivered. Use it from one goroutine, and close it. Each answer takes
// [Subscription.View], [Subscription.Sending] and [Subscription.Read], one answer at a
// time.
type Subscription struct {
	cache    *Cache
	process  Process
	c        chan struct{}
	opened   time.Time
	serial   uint64 // see Cache.serial
	returned bool   // opened while Cache.Returning

	// Guarded by Cache.mu.
	selectors []Selector
	matched   []*record // by entry ID
	viewed    []Use     // in the last View
	sent      []Use     // in flight, perhaps not read
	held      []Use     // in the last answer that was read
	answered  bool      // an answer was read: what the process has is known
	closed    bool
}

// Subscribe opens a subscription for a call of the process. Its entries are those that
// match the selectors, which [Subscription.Select] may change.
func (c *Cache) Subscribe(p Process, selectors []Selector) *Subscription {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := &Subscription{cache: c, process: p, c: make(chan struct{}, 1), opened: time.Now(), serial: c.nextSerialLocked(), returned: c.returning}
	c.pruneLocked(p) // first, because unread streams keep past uses from expiring
	c.readerLocked(p).open[s] = struct{}{}
	c.selectLocked(s, selectors)
	return s
}

// Select changes the entries of the subscription to those that match these selectors. What
// its process can use does not change.
func (s *Subscription) Select(selectors []Selector) {
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	if !s.closed {
		s.cache.selectLocked(s, selectors)
	}
}

// selectLocked sets the selectors and the matching records. Records that match before and
// after keep their stream meanwhile.
func (c *Cache) selectLocked(s *Subscription, selectors []Selector) {
	before := s.matched
	c.unselectLocked(s)
	s.selectors = slices.Clone(selectors)
	for _, sel := range s.selectors {
		if c.subscribers[sel] == nil {
			c.subscribers[sel] = make(map[*Subscription]struct{})
		}
		c.subscribers[sel][s] = struct{}{}
	}
	s.matched = c.matchLocked(selectors)
	for _, r := range s.matched {
		c.addStreamLocked(r, s)
	}
	for _, r := range before {
		if !slices.Contains(s.matched, r) {
			c.removeStreamLocked(r, s)
		}
	}
	c.fillLocked()
	notify(s.c)
}

// unselectLocked removes s from the index by selector.
func (c *Cache) unselectLocked(s *Subscription) {
	for _, sel := range s.selectors {
		if delete(c.subscribers[sel], s); len(c.subscribers[sel]) == 0 {
			delete(c.subscribers, sel)
		}
	}
}

// C returns a channel that receives when the next View may differ from the last, and once
// by the time that Subscribe or Select returns. Its capacity is one.
func (s *Subscription) C() <-chan struct{} { return s.c }

// View returns the current answer for the stream. From now on the stream uses the
// authorities of this view, so that answers in flight count.
func (s *Subscription) View() View {
	c := s.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	v := c.viewLocked(s.matched)
	s.viewed = nil
	for _, id := range v.Identities {
		s.viewed = AddUse(s.viewed, Use{id.SVID.Authority, id.SVID.NotAfter})
	}
	return v
}

// Sending records that the last View is about to be sent, and returns what the process can
// use because of it. The answer read before counts until this one is read.
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

// Read records that the process has read the answer sent: earlier answers of this stream
// count no longer.
func (s *Subscription) Read() {
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	if s.closed {
		return
	}
	s.held, s.sent, s.answered = s.sent, nil, true
	s.cache.readers[s.process].markReplaced(s)
}

// Close ends the subscription. What its process can use because of it still counts; see
// [Process]. Close may be called more than once.
func (s *Subscription) Close() {
	c := s.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.closed {
		return
	}
	s.closed = true
	c.endStreamLocked(s)
	c.unselectLocked(s)
	for _, r := range s.matched {
		c.removeStreamLocked(r, s)
	}
	s.matched, s.selectors = nil, nil
	c.fillLocked()
}

// attachLocked adds an entry that now matches.
func (s *Subscription) attachLocked(r *record) {
	i, _ := slices.BinarySearchFunc(s.matched, r, byEntryID)
	s.matched = slices.Insert(s.matched, i, r)
	s.cache.addStreamLocked(r, s)
}

// detachLocked removes an entry that no longer matches. The caller removes s from
// r.watchers.
func (s *Subscription) detachLocked(r *record) {
	if i := slices.Index(s.matched, r); i >= 0 {
		s.matched = slices.Delete(s.matched, i, i+1)
	}
}

// addStreamLocked and removeStreamLocked maintain the streams of a record. The first and
// the last one change its urgency.
func (c *Cache) addStreamLocked(r *record, s *Subscription) {
	if _, already := r.watchers[s]; already {
		return
	}
	if r.watchers == nil {
		r.watchers = make(map[*Subscription]struct{}, 1)
	}
	r.watchers[s] = struct{}{}
	if len(r.watchers) == 1 {
		c.setWantedLocked(r, true)
		c.relistLocked(r)
		c.changedLocked(r)
	}
}

func (c *Cache) removeStreamLocked(r *record, s *Subscription) {
	delete(r.watchers, s)
	if len(r.watchers) == 0 {
		r.watchers = nil
		c.dropUnusedLocked(r)
		c.relistLocked(r)
		c.changedLocked(r)
	}
}

// Watch notifies of every change of bundle, entries or readiness. It is for streams without
// X.509-SVIDs, which read with [Cache.Match].
type Watch struct {
	cache *Cache
	c     chan struct{}
}

// Watch opens a watch. Close it after use.
func (c *Cache) Watch() *Watch {
	c.mu.Lock()
	defer c.mu.Unlock()
	w := &Watch{cache: c, c: make(chan struct{}, 1)}
	c.watches[w.c] = struct{}{}
	notify(w.c)
	return w
}

// C returns a channel that receives after a change, and once right after [Cache.Watch].
func (w *Watch) C() <-chan struct{} { return w.c }

// Close ends the watch.
func (w *Watch) Close() {
	w.cache.mu.Lock()
	defer w.cache.mu.Unlock()
	delete(w.cache.watches, w.c)
}

func (c *Cache) wakeWatchesLocked() {
	for w := range c.watches {
		notify(w)
	}
}
