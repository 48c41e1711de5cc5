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
	"container/list"
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

// notify wakes by level: a wake-up already waiting is enough.
func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
