// Package cache owns what this node holds in memory: the registration entries
// it may serve, their X.509-SVIDs with keys, JWT-SVIDs, and the open streams.
//
// State goes in by [Cache.Update] (entries), [Cache.SetBundle], [Cache.Put]
// (X.509-SVIDs) and [Cache.PutJWT]. It comes out as a [View]: the SVIDs and
// the trust bundle of one moment, read together, so that an answer to a
// workload never pairs an SVID with a bundle from another time.
//
// X.509-SVIDs are indexed by the authority that signed them, which makes the
// cost of a taint the number of SVIDs it touches, and lets [Cache.Authorities]
// say at any moment what still hangs on an authority. Nothing is dropped
// because of a taint: a held SVID leaves when its replacement arrives, when its
// entry goes or gives another SPIFFE ID, or when another SVID is put while the
// cache is above its limit and nobody streams it.
//
// Everyone who acts on changes is woken by level, not by event: a [Follower]
// or a [Subscription] has a channel of capacity one and reads the state again.
// All methods are safe for concurrent use; no lock is held over I/O.
package cache

import (
	"cmp"
	"container/list"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
)

// DefaultLimit is how many X.509-SVIDs are kept ready when nobody asks.
const DefaultLimit = 1000

// Selector is one attested property of a workload, such as unix:uid:1000.
type Selector struct {
	Type, Value string // "unix", "uid:1000"
}

// String returns type:value.
func (s Selector) String() string { return s.Type + ":" + s.Value }

// Entry is a registration entry: the workloads with all of Selectors get an
// SVID with this SPIFFE ID. It is immutable.
type Entry struct {
	ID            string
	SPIFFEID      spiffeid.ID
	Selectors     []Selector
	FederatesWith []spiffeid.TrustDomain
	Hint          string
	// DNSNames are in X.509-SVIDs beside the SPIFFE ID, in this order. X509TTL and
	// JWTTTL are how long SVIDs live; zero means the server's default.
	DNSNames        []string
	X509TTL, JWTTTL time.Duration
	// NoPrefetch (disable_x509_svid_prefetch) says that an X.509-SVID is minted
	// only when a stream asks for it.
	NoPrefetch bool
	// IncludeJTI (jwt_svid_include_jti) says that a JWT-SVID is for one request:
	// it is never held.
	IncludeJTI bool
	// Revision is the server's revision number: another one means that something
	// of the entry has changed. What of it makes another SVID, see [SVID.For].
	Revision  int64
	CreatedAt time.Time
}

// Config is what a [Cache] needs. The zero value works.
type Config struct {
	// Limit is how many X.509-SVIDs are held for entries that no open stream
	// asks for. It is soft: entries above it are minted when asked for, an SVID
	// with an open stream is never evicted, and any other only when a new one is
	// there in its place. Zero means DefaultLimit. Entries with NoPrefetch are
	// minted when asked for in any case.
	Limit int
	// Now is the wall clock; nil means time.Now.
	Now func() time.Time
}

// Cache is the state of one node. Make it with [New].
type Cache struct {
	now   func() time.Time
	limit int

	mu          sync.Mutex
	synced      bool
	returning   bool // see Returning
	snapshot    *bundle.Snapshot
	records     map[string]*record                      // by entry ID
	anchors     map[Selector][]*record                  // each record under one of its selectors
	federated   map[spiffeid.TrustDomain]int            // entries that federate with it
	needs       map[kind]need                           // kinds of selectors that entries have
	needed      uint64                                  // kinds that have come to be needed so far
	authorities map[string]*authority                   // by authority ID
	subscribers map[Selector]map[*Subscription]struct{} // under each of their selectors
	watches     map[chan struct{}]struct{}              // see Watch
	readers     map[Process]*reader                     // processes with streams, or with what streams left
	serial      uint64                                  // grows as streams are opened and closed, and tells what came first
	followers   map[*Follower]struct{}                  //
	wanted      int                                     // records with wanted set
	held        int                                     // records with an SVID
	missing     int                                     // records with missing set
	idle        *list.List                              // records with an SVID and without a stream, least recently used first
	bare        *list.List                              // wanted records without an SVID and without a stream
	lazy        *list.List                              // records above the limit
	spare       *list.List                              // as idle, of entries with NoPrefetch
	jwts        jwtCache
	newest      Newest
}

// record is what is known of one entry. Guarded by Cache.mu.
type record struct {
	entry  *Entry
	svid   *SVID
	anchor Selector
	// wanted says that an SVID is to be held ready: within the limit, or asked
	// for by a stream.
	wanted bool
	// failed says that a first mint was tried in vain, so that streams with
	// other identities need not wait for this one.
	failed bool
	// missing says that the server's answers do not name the entry at present.
	missing  bool
	list     *list.List    // idle, bare, lazy or spare; nil while a stream is open, or until one is
	place    *list.Element // in list
	watchers map[*Subscription]struct{}
	slot     int // index in authority.signed
}

// New returns an empty cache: not ready until it has been given entries and a
// bundle.
func New(cfg Config) *Cache {
	if cfg.Limit <= 0 {
		cfg.Limit = DefaultLimit
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Cache{
		now:         cfg.Now,
		limit:       cfg.Limit,
		records:     make(map[string]*record),
		anchors:     make(map[Selector][]*record),
		federated:   make(map[spiffeid.TrustDomain]int),
		needs:       make(map[kind]need),
		authorities: make(map[string]*authority),
		subscribers: make(map[Selector]map[*Subscription]struct{}),
		watches:     make(map[chan struct{}]struct{}),
		readers:     make(map[Process]*reader),
		followers:   make(map[*Follower]struct{}),
		idle:        list.New(),
		bare:        list.New(),
		lazy:        list.New(),
		spare:       list.New(),
		jwts:        newJWTCache(),
	}
}

// Now is the cache's wall clock.
func (c *Cache) Now() time.Time { return c.now() }

// Ready reports whether entries and bundle have arrived. Until then nothing
// can be said about any workload, except for what [Cache.Restore] brought.
func (c *Cache) Ready() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.synced && c.snapshot != nil
}

// Bundle returns the snapshot in force; nil before the first [Cache.SetBundle].
func (c *Cache) Bundle() *bundle.Snapshot {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.snapshot
}

// SetBundle puts a new snapshot in force and wakes everyone. JWT-SVIDs whose
// key has left the bundle are dropped; X.509-SVIDs are never dropped by this.
func (c *Cache) SetBundle(s *bundle.Snapshot) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.snapshot = s
	c.jwts.retain(s.Own)
	c.wakeSubscribers()
	c.wakeWatches()
	for f := range c.followers {
		notify(f.c)
	}
}

// Restore says that this agent was restarted, and puts in what is known of the time
// before: entries, SVIDs, and what each process can use. Call it before anything else.
// The SVIDs are served as soon as there is a bundle. But they are not all that the server
// has: until the first [Cache.Update] nothing is known of callers that none of
// these entries match. An SVID that is not for its entry's SPIFFE ID is left out.
// Workloads are [Cache.Returning] from now on until [Cache.Release].
func (c *Cache) Restore(entries []*Entry, svids []*SVID, uses map[Process][]Use) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.returning = true
	for _, e := range entries {
		c.upsert(e)
	}
	for _, s := range svids {
		if r := c.records[s.EntryID]; r != nil && r.gives(s) {
			c.setWanted(r, true)
			c.hold(r, s)
		}
	}
	for p, all := range uses {
		for _, u := range all {
			c.reader(p).leave(leftover{Use: u})
		}
	}
}

// Returning reports whether workloads of the time before a restart may still be on
// their way back, with SVIDs that nothing is known of. Meanwhile nothing is evicted,
// so that those whose streams kept an SVID above the limit find it.
func (c *Cache) Returning() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.returning
}

// Release ends the time that [Cache.Restore] gives workloads to come back. What
// is above the limit leaves when the next SVID is put.
func (c *Cache) Release() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.returning = false
}

// Update applies a change of the registration entries: upsert holds new and
// changed entries, gone the IDs of those deleted. The first call, empty or
// not, marks the cache as synced.
func (c *Cache) Update(upsert []*Entry, gone []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	first, needed := !c.synced, c.needed
	c.synced = true
	for _, id := range gone {
		if r := c.records[id]; r != nil {
			c.remove(r)
		}
	}
	for _, e := range upsert {
		c.upsert(e)
	}
	c.fill()
	if first {
		for f := range c.followers {
			notify(f.c)
		}
	}
	if first || len(upsert) > 0 || len(gone) > 0 {
		c.wakeWatches()
	}
	if first || c.needed > needed {
		c.wakeSubscribers()
	}
}

func (c *Cache) wakeSubscribers() {
	woken := make(map[*Subscription]struct{})
	for _, subs := range c.subscribers {
		for sub := range subs {
			if _, done := woken[sub]; !done {
				woken[sub] = struct{}{}
				notify(sub.c)
			}
		}
	}
}

// remove takes a deleted entry's record out of everything.
func (c *Cache) remove(r *record) {
	c.unindex(r)
	c.unneed(r.entry.Selectors)
	for sub := range r.watchers {
		sub.detach(r)
		notify(sub.c)
	}
	r.watchers = nil
	c.setMissing(r, false)
	c.setWanted(r, false)
	if r.list != nil {
		r.list.Remove(r.place)
	}
	delete(c.records, r.entry.ID)
	c.jwts.dropEntry(r.entry.ID)
	c.changed(r)
}

func (c *Cache) upsert(e *Entry) {
	r := c.records[e.ID]
	c.need(e.Selectors) // before those of its last revision go: what both have stays needed
	if r == nil {
		r = &record{entry: e}
		c.records[e.ID] = r
		c.index(r)
	} else {
		c.unindex(r)
		c.unneed(r.entry.Selectors)
		switch {
		case r.entry.SPIFFEID != e.SPIFFEID || e.IncludeJTI:
			c.jwts.dropEntry(e.ID)
		case r.entry.JWTTTL != e.JWTTTL:
			c.jwts.age(e.ID)
		}
		r.entry, r.failed = e, false
		if r.svid != nil && !r.gives(r.svid) {
			c.setSVID(r, nil)
		}
		c.setMissing(r, false)
		c.index(r)
		for sub := range r.watchers {
			if !subset(e.Selectors, sub.selectors) {
				sub.detach(r)
				delete(r.watchers, sub)
			}
			notify(sub.c)
		}
	}
	for sub := range c.subscribers[r.anchor] {
		if _, has := r.watchers[sub]; !has && subset(e.Selectors, sub.selectors) {
			sub.attach(r)
			notify(sub.c)
		}
	}
	c.relinquish(r)
	c.file(r)
	c.changed(r)
}

// gives reports whether s is an SVID that the entry gives. No other is ever held
// for it: whoever an entry matches after an edit gets what it gives now, and
// never what it gave before.
func (r *record) gives(s *SVID) bool { return s.ID == r.entry.SPIFFEID }

// index files the record under the selector that the fewest records are filed
// under, so that a look-up meets few candidates that do not match.
func (c *Cache) index(r *record) {
	r.anchor = slices.MinFunc(r.entry.Selectors, func(a, b Selector) int {
		return cmp.Compare(len(c.anchors[a]), len(c.anchors[b]))
	})
	c.anchors[r.anchor] = append(c.anchors[r.anchor], r)
	for _, td := range r.entry.FederatesWith {
		c.federated[td]++
	}
}

func (c *Cache) unindex(r *record) {
	filed := c.anchors[r.anchor]
	i := slices.Index(filed, r)
	filed[i] = filed[len(filed)-1]
	filed[len(filed)-1] = nil
	if c.anchors[r.anchor] = filed[:len(filed)-1]; len(filed) == 1 {
		delete(c.anchors, r.anchor)
	}
	for _, td := range r.entry.FederatesWith {
		if c.federated[td]--; c.federated[td] == 0 {
			delete(c.federated, td)
		}
	}
}

// FederatesWith lists the trust domains that the entries federate with.
func (c *Cache) FederatesWith() []spiffeid.TrustDomain {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make([]spiffeid.TrustDomain, 0, len(c.federated))
	for td := range c.federated {
		out = append(out, td)
	}
	slices.SortFunc(out, func(a, b spiffeid.TrustDomain) int { return cmp.Compare(a.Name(), b.Name()) })
	return out
}

// BundlesPending reports whether an entry federates with a trust domain of whose
// bundle the server has said nothing yet.
func (c *Cache) BundlesPending() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for td := range c.federated {
		if c.snapshot != nil && c.snapshot.Pending(td) {
			return true
		}
	}
	return false
}

// Entries returns every entry held, by ID. The map is the caller's.
func (c *Cache) Entries() map[string]*Entry {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make(map[string]*Entry, len(c.records))
	for id, r := range c.records {
		out[id] = r.entry
	}
	return out
}

// match returns the records whose selectors the caller all has, by entry ID.
func (c *Cache) match(selectors []Selector) []*record {
	var out []*record
	for i, s := range selectors {
		if slices.Contains(selectors[:i], s) {
			continue
		}
		for _, r := range c.anchors[s] {
			if subset(r.entry.Selectors, selectors) {
				out = append(out, r)
			}
		}
	}
	slices.SortFunc(out, byEntryID)
	return out
}

func byEntryID(a, b *record) int { return cmp.Compare(a.entry.ID, b.entry.ID) }

// subset reports whether every selector in some is in all. Both are short.
func subset(some, all []Selector) bool {
	for _, s := range some {
		if !slices.Contains(all, s) {
			return false
		}
	}
	return true
}

// notify wakes by level: a wake-up already waiting is enough.
func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
