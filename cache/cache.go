// Package cache owns the node's state in memory: registration entries, their
// X.509-SVIDs with keys, JWT-SVIDs, and open streams.
//
// [Cache.Update] (entries), [Cache.SetBundle], [Cache.Put] (X.509-SVIDs) and
// [Cache.PutJWT] change it. A [View] reads the SVIDs and the trust bundle of one moment
// together, so that no answer to a workload has an SVID and a bundle of different times.
//
// X.509-SVIDs are indexed by the authority that signed them. So a taint costs only the
// SVIDs of that authority, and [Cache.Authorities] tells at any moment what still depends
// on it. A taint drops nothing. An SVID is dropped when its replacement is put, when its
// entry is deleted or gets another SPIFFE ID, or, without an open stream, when another
// SVID is put while the cache is above its limit.
//
// Changes are notified by level: a [Follower] or a [Subscription] has a channel of
// capacity one and re-reads the state. All methods are safe for concurrent use, and no
// lock is held during I/O.
package cache

import (
	"cmp"
	"container/list"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
)

// DefaultLimit is how many X.509-SVIDs are held without an open stream.
const DefaultLimit = 1000

// Selector is one attested property of a workload, such as unix:uid:1000.
type Selector struct {
	Type, Value string // "unix", "uid:1000"
}

// String returns type:value.
func (s Selector) String() string { return s.Type + ":" + s.Value }

// Entry is a registration entry: workloads that have all of Selectors get an SVID with
// this SPIFFE ID. It is immutable.
type Entry struct {
	ID            string
	SPIFFEID      spiffeid.ID
	Selectors     []Selector
	FederatesWith []spiffeid.TrustDomain
	Hint          string
	// DNSNames are in X.509-SVIDs beside the SPIFFE ID, in this order. X509TTL and
	// JWTTTL are the lifetimes of SVIDs; zero means the server's default.
	DNSNames        []string
	X509TTL, JWTTTL time.Duration
	// NoPrefetch (disable_x509_svid_prefetch) means that an X.509-SVID is minted only
	// for an open stream.
	NoPrefetch bool
	// IncludeJTI (jwt_svid_include_jti) means that a JWT-SVID is for one request and
	// never held.
	IncludeJTI bool
	// Revision is the server's revision number, which changes with the entry. Not
	// every change requires another SVID; see [SVID.For].
	Revision  int64
	CreatedAt time.Time
}

// Config is what a [Cache] needs. The zero value works.
type Config struct {
	// Limit is how many X.509-SVIDs are held without an open stream. It is soft:
	// entries above it are minted for an open stream, an SVID with an open stream is
	// never evicted, and any other only when a new one is put. Zero means
	// DefaultLimit.
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
	needed      uint64                                  // grows each time that another kind is needed
	authorities map[string]*authority                   // by authority ID
	subscribers map[Selector]map[*Subscription]struct{} // under each of their selectors
	watches     map[chan struct{}]struct{}              // see Watch
	readers     map[Process]*reader                     // processes with streams, or with what streams left
	serial      uint64                                  // grows with each opened and closed stream: their order
	followers   map[*Follower]struct{}                  // each is notified of changes
	wanted      int                                     // records with wanted set
	held        int                                     // records with an SVID
	missing     int                                     // records with missing set
	idle        *list.List                              // records with an SVID and without a stream, least recently used first
	unheld      *list.List                              // wanted records without an SVID and without a stream
	overLimit   *list.List                              // records above the limit
	onDemand    *list.List                              // as idle, of entries with NoPrefetch
	jwts        jwtCache
	newest      Newest
}

// record is what is known of one entry. Guarded by Cache.mu.
type record struct {
	entry  *Entry
	svid   *SVID
	anchor Selector
	// wanted means that an SVID is to be held: within the limit, or for a stream.
	wanted bool
	// failed means that the first mint failed, so that streams with other identities
	// do not wait for this one.
	failed bool
	// missing means that the server does not list the entry at present.
	missing  bool
	list     *list.List    // idle, unheld, overLimit or onDemand; nil with an open stream, or until there is one
	place    *list.Element // in list
	watchers map[*Subscription]struct{}
	slot     int // index in authority.signed
}

// New returns an empty cache, which is not ready until it has entries and a bundle.
func New(cfg Config) *Cache {
	cfg.Limit = cmp.Or(cfg.Limit, DefaultLimit)
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
		unheld:      list.New(),
		overLimit:   list.New(),
		onDemand:    list.New(),
		jwts:        newJWTCache(),
	}
}

// Now returns the time of the cache's wall clock.
func (c *Cache) Now() time.Time { return c.now() }

// Ready reports whether the cache has entries and a bundle. Until then it serves only
// workloads that [Cache.Restore] restored.
func (c *Cache) Ready() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.synced && c.snapshot != nil
}

// Bundle returns the current snapshot; nil before the first [Cache.SetBundle].
func (c *Cache) Bundle() *bundle.Snapshot {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.snapshot
}

// SetBundle sets the current snapshot and notifies all subscriptions, watches and
// followers. It drops the JWT-SVIDs whose key is no longer in the bundle, and no
// X.509-SVID.
func (c *Cache) SetBundle(s *bundle.Snapshot) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.snapshot = s
	c.jwts.retain(s.Own)
	c.wakeSubscribersLocked()
	c.wakeWatchesLocked()
	for f := range c.followers {
		notify(f.c)
	}
}

// Restore restores the state from before a restart of the agent: entries, SVIDs, and what
// each process can use. Call it before anything else. The SVIDs are served as soon as
// there is a bundle. The entries are not complete: until the first [Cache.Update] nothing
// is known about callers that match none of them. An SVID with another SPIFFE ID than its
// entry is left out. Workloads are [Cache.Returning] until [Cache.Release].
func (c *Cache) Restore(entries []*Entry, svids []*SVID, uses map[Process][]Use) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.returning = true
	for _, e := range entries {
		c.upsertLocked(e)
	}
	for _, s := range svids {
		if r := c.records[s.EntryID]; r != nil && r.gives(s) {
			c.setWantedLocked(r, true)
			c.replaceLocked(r, s)
		}
	}
	for p, all := range uses {
		for _, u := range all {
			c.readerLocked(p).addPast(pastUse{Use: u})
		}
	}
}

// Returning reports whether workloads from before a restart may not have reconnected yet,
// with SVIDs that the cache does not know. Meanwhile nothing is evicted, so that a stream
// finds the SVID that it kept above the limit.
func (c *Cache) Returning() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.returning
}

// Release ends the time that [Cache.Restore] gives workloads to reconnect. SVIDs above the
// limit are evicted when the next one is put.
func (c *Cache) Release() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.returning = false
}

func (c *Cache) wakeSubscribersLocked() {
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

// notify wakes the receiver, unless it is to wake already.
func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
