package cache

import (
	"cmp"
	"errors"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// SVID is an X.509-SVID with its private key, in the encoding of the Workload API. It is
// immutable. It has no parsed certificate, which would take most of the memory of a node
// with thousands of SVIDs.
type SVID struct {
	ID      spiffeid.ID
	EntryID string
	// Revision, Created and TTL are those of the entry that it was minted for.
	Revision int64
	Created  time.Time
	TTL      time.Duration
	// DNSNames are those of the certificate.
	DNSNames []string
	// Leaf is DER; Intermediates is concatenated DER, without the root.
	Leaf, Intermediates []byte
	// Key is PKCS#8 DER.
	Key []byte
	// Authority is the ID of the authority that the chain ends in.
	Authority string
	NotBefore time.Time
	NotAfter  time.Time
	// RenewAt is at half of its life, ±10 %, drawn once.
	RenewAt time.Time
}

// ErrChanged is returned by [Cache.Put] and [Cache.PutJWT] if the SVID must not be used:
// its entry was deleted, changed or evicted during the mint, or the key that signed it is
// no longer in the bundle.
var ErrChanged = errors.New("entry or trust bundle changed while the SVID was being minted")

// authority is an authority that signed SVIDs held. Guarded by Cache.mu.
type authority struct {
	signed []*record
}

// valid counts the SVIDs held that have not expired.
func (a *authority) valid(now time.Time) (n int) {
	for _, r := range a.signed {
		if r.svid.NotAfter.After(now) {
			n++
		}
	}
	return n
}

// For reports whether s is an SVID of the entry: it was minted for the current revision,
// or SPIFFE ID, DNS names and lifetime are the same. DNS names are compared with the
// certificate's, because the entry may have been edited twice meanwhile. The time of
// creation distinguishes entries that had the same ID one after the other.
func (s *SVID) For(e *Entry) bool {
	return s.mintedFor(e.Revision, e.CreatedAt) ||
		s.ID == e.SPIFFEID && s.TTL == e.X509TTL && slices.Equal(s.DNSNames, e.DNSNames)
}

// Equivalent reports whether s and o are SVIDs of one revision of an entry, or of
// revisions with the same SPIFFE ID, DNS names and lifetime; see [SVID.For].
func (s *SVID) Equivalent(o *SVID) bool {
	return s.mintedFor(o.Revision, o.Created) ||
		s.ID == o.ID && s.TTL == o.TTL && slices.Equal(s.DNSNames, o.DNSNames)
}

func (s *SVID) mintedFor(revision int64, created time.Time) bool {
	return s.Revision == revision && s.Created.Equal(created)
}

// Put replaces the SVID held for the entry, notifies its streams and evicts SVIDs above the
// limit. The caller must have verified the SVID.
func (c *Cache) Put(s *SVID) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.records[s.EntryID]
	if r == nil || !s.For(r.entry) || !r.gives(s) {
		return ErrChanged
	}
	switch {
	case r.wanted:
	case r.entry.NoPrefetch:
		// Its stream has ended and may reconnect.
		c.setWantedLocked(r, true)
	default:
		return ErrChanged
	}
	c.replaceLocked(r, s)
	c.evictLocked(r)
	return nil
}

// replaceLocked replaces the SVID held for r and notifies streams and followers.
func (c *Cache) replaceLocked(r *record, s *SVID) {
	r.failed = false
	c.setSVIDLocked(r, s)
	if !s.NotBefore.Before(c.newest.x509) {
		c.newest.X509, c.newest.x509 = s.Authority, s.NotBefore
	}
	for sub := range r.watchers {
		notify(sub.c)
	}
	c.changedLocked(r)
}

// Failed records that minting the first SVID of an entry failed, so that streams that match
// other entries, too, do not wait for it.
func (c *Cache) Failed(entryID string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.records[entryID]
	if r == nil || r.failed || r.svid != nil {
		return
	}
	r.failed = true
	for sub := range r.watchers {
		notify(sub.c)
	}
}

// setSVIDLocked replaces r's SVID, nil for none, and updates the index by authority.
func (c *Cache) setSVIDLocked(r *record, s *SVID) {
	if r.svid != nil {
		a := c.authorities[r.svid.Authority]
		last := a.signed[len(a.signed)-1]
		a.signed[r.slot], last.slot = last, r.slot
		a.signed[len(a.signed)-1] = nil
		a.signed = a.signed[:len(a.signed)-1]
		c.dropAuthorityLocked(r.svid.Authority, a)
		c.held--
	}
	r.svid = s
	if s != nil {
		a := c.authorityLocked(s.Authority)
		r.slot = len(a.signed)
		a.signed = append(a.signed, r)
		c.held++
	}
	c.relistLocked(r)
}

func (c *Cache) authorityLocked(id string) *authority {
	a := c.authorities[id]
	if a == nil {
		a = &authority{}
		c.authorities[id] = a
	}
	return a
}

// dropAuthorityLocked drops an authority that signed no SVID held.
func (c *Cache) dropAuthorityLocked(id string, a *authority) {
	if len(a.signed) == 0 {
		delete(c.authorities, id)
	}
}

// Item is the state of one entry for renewal.
type Item struct {
	Entry *Entry
	SVID  *SVID // nil when none is held
	// Streams is the number of open streams of this entry.
	Streams int
	// Missing means that the server does not list the entry at present; see
	// [Cache.SetMissing].
	Missing bool
}

// RenewAt returns when the SVID, which must not be nil, is due by its age. With NoPrefetch
// and without a stream it is not renewed before it expires.
func (i Item) RenewAt() time.Time {
	if i.Entry.NoPrefetch && i.Streams == 0 {
		return i.SVID.NotAfter
	}
	return i.SVID.RenewAt
}

// Item returns the entry with this ID, or false if it was deleted or no SVID is to be held
// for it.
func (c *Cache) Item(entryID string) (Item, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.records[entryID]
	if r == nil || !r.wanted || r.list == c.onDemand && !r.svid.NotAfter.After(c.now()) {
		return Item{}, false
	}
	return Item{Entry: r.entry, SVID: r.svid, Streams: len(r.watchers), Missing: r.missing}, true
}

// SignedBy lists the IDs of the entries whose SVID the authority signed.
func (c *Cache) SignedBy(authorityID string) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	a := c.authorities[authorityID]
	if a == nil {
		return nil
	}
	out := make([]string, len(a.signed))
	for i, r := range a.signed {
		out[i] = r.entry.ID
	}
	return out
}

// Held counts the valid X.509-SVIDs held that the authority signed.
func (c *Cache) Held(authorityID string) int {
	now := c.now()
	c.mu.Lock()
	defer c.mu.Unlock()
	if a := c.authorities[authorityID]; a != nil {
		return a.valid(now)
	}
	return 0
}

// Usage is what uses one signing authority.
type Usage struct {
	Authority string
	Held      int // valid X.509-SVIDs held
	// Streams counts the open streams, and the processes whose streams have ended,
	// that have not read the replacement of an SVID that it signed; see [Process].
	Streams int
}

// Authorities returns what uses each signing authority, read at one moment, by authority
// ID. Unused authorities are left out.
func (c *Cache) Authorities() []Usage {
	now := c.now()
	c.mu.Lock()
	defer c.mu.Unlock()
	streams := c.countUsesLocked(now)
	out := make([]Usage, 0, len(c.authorities))
	for id, a := range c.authorities {
		if n := a.valid(now); n+streams[id] > 0 {
			out = append(out, Usage{Authority: id, Held: n, Streams: streams[id]})
		}
		delete(streams, id)
	}
	for id, n := range streams {
		out = append(out, Usage{Authority: id, Streams: n})
	}
	slices.SortFunc(out, func(a, b Usage) int { return cmp.Compare(a.Authority, b.Authority) })
	return out
}

// Newest are the authorities that signed the newest SVIDs, which an agent takes for the
// active ones. Empty if none was minted.
type Newest struct {
	X509, JWT string
	x509, jwt time.Time
}

// Newest returns the authorities that signed the newest SVIDs.
func (c *Cache) Newest() Newest {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.newest
}

// Overdue counts the X.509-SVIDs held that are due by their age (see [Item.RenewAt]) for
// longer than grace. It reads all of them and is meant for a scrape.
func (c *Cache) Overdue(grace time.Duration) (overdue int) {
	late := c.now().Add(-grace)
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, a := range c.authorities {
		for _, r := range a.signed {
			if r.svid.RenewAt.Before(late) && r.list != c.onDemand {
				overdue++
			}
		}
	}
	return overdue
}

// Serving returns the number of entries, and whether a valid X.509-SVID is held for any of
// them.
func (c *Cache) Serving() (entries int, valid bool) {
	now := c.now()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, a := range c.authorities {
		valid = valid || a.valid(now) > 0
	}
	return len(c.records), valid
}

// Follower is notified of changed entries. Close it after use.
type Follower struct {
	cache *Cache
	c     chan struct{}
	dirty map[string]struct{} // guarded by Cache.mu
}

// Follow returns a Follower that begins with every entry as changed.
func (c *Cache) Follow() *Follower {
	c.mu.Lock()
	defer c.mu.Unlock()
	f := &Follower{cache: c, c: make(chan struct{}, 1), dirty: make(map[string]struct{}, len(c.records))}
	for id := range c.records {
		f.dirty[id] = struct{}{}
	}
	c.followers[f] = struct{}{}
	notify(f.c)
	return f
}

// C returns a channel that receives when there is something to drain or the bundle has
// changed.
func (f *Follower) C() <-chan struct{} { return f.c }

// Drain returns the IDs of the entries that changed since the last call: the
// entry, its SVID, whether it is wanted, or whether a stream asks for it.
func (f *Follower) Drain() []string {
	f.cache.mu.Lock()
	defer f.cache.mu.Unlock()
	if len(f.dirty) == 0 {
		return nil
	}
	out := make([]string, 0, len(f.dirty))
	for id := range f.dirty {
		out = append(out, id)
	}
	// A new map, because one that once held a full sync never shrinks.
	f.dirty = make(map[string]struct{})
	return out
}

// Close ends the notifications.
func (f *Follower) Close() {
	f.cache.mu.Lock()
	defer f.cache.mu.Unlock()
	delete(f.cache.followers, f)
}

func (c *Cache) changedLocked(r *record) {
	for f := range c.followers {
		f.dirty[r.entry.ID] = struct{}{}
		notify(f.c)
	}
}
