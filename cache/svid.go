package cache

import (
	"cmp"
	"errors"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// SVID is an X.509-SVID with its private key, in the forms in which the
// Workload API hands them out. It is immutable. It holds no parsed
// certificate: at thousands of SVIDs a node that would be most of the memory.
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
	// RenewAt is half of its life, ±10 %, drawn once.
	RenewAt time.Time
}

// ErrChanged is returned by [Cache.Put] and [Cache.PutJWT] when an SVID is of no
// use any more: its entry was deleted, changed or evicted while it was being minted,
// or the key that signed it has left the bundle.
var ErrChanged = errors.New("the entry or the trust bundle changed while the SVID was being minted")

// authority is one that signed SVIDs that are held. Guarded by Cache.mu.
type authority struct {
	signed []*record
}

// valid counts the SVIDs held that have not ended.
func (a *authority) valid(now time.Time) (n int) {
	for _, r := range a.signed {
		if r.svid.NotAfter.After(now) {
			n++
		}
	}
	return n
}

// For reports whether s is what the entry gives: it was minted for the entry as
// it is, or what makes an SVID is as it was then: the SPIFFE ID, the DNS names and
// the lifetime that the entry asks for. DNS names are compared with the
// certificate, because an entry may have been edited twice meanwhile. Another
// entry of the same ID is told apart by the time of its creation.
func (s *SVID) For(e *Entry) bool {
	return s.mintedFor(e.Revision, e.CreatedAt) ||
		s.ID == e.SPIFFEID && s.TTL == e.X509TTL && slices.Equal(s.DNSNames, e.DNSNames)
}

// Alike reports whether s and o are SVIDs of one state of an entry, or of states
// that give the same; see [SVID.For].
func (s *SVID) Alike(o *SVID) bool {
	return s.mintedFor(o.Revision, o.Created) ||
		s.ID == o.ID && s.TTL == o.TTL && slices.Equal(s.DNSNames, o.DNSNames)
}

func (s *SVID) mintedFor(revision int64, created time.Time) bool {
	return s.Revision == revision && s.Created.Equal(created)
}

// Put replaces what is held for the SVID's entry and wakes its streams. The
// caller has verified it. Others that are above the limit leave now.
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
		// Whoever asked for it has gone, perhaps to ask again.
		c.setWanted(r, true)
	default:
		return ErrChanged
	}
	c.hold(r, s)
	c.evict(r)
	return nil
}

// hold replaces what is held for r by s, which its entry gives, and tells everyone.
func (c *Cache) hold(r *record, s *SVID) {
	r.failed = false
	c.setSVID(r, s)
	if !s.NotBefore.Before(c.newest.x509) {
		c.newest.X509, c.newest.x509 = s.Authority, s.NotBefore
	}
	for sub := range r.watchers {
		notify(sub.c)
	}
	c.changed(r)
}

// Failed notes that minting the first SVID of an entry failed, so that a
// stream that matches other entries as well is served those.
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

// setSVID replaces r's SVID, nil for none, and keeps the index by authority.
func (c *Cache) setSVID(r *record, s *SVID) {
	if r.svid != nil {
		a := c.authorities[r.svid.Authority]
		last := a.signed[len(a.signed)-1]
		a.signed[r.slot], last.slot = last, r.slot
		a.signed[len(a.signed)-1] = nil
		a.signed = a.signed[:len(a.signed)-1]
		c.forget(r.svid.Authority, a)
		c.held--
	}
	r.svid = s
	if s != nil {
		a := c.authority(s.Authority)
		r.slot = len(a.signed)
		a.signed = append(a.signed, r)
		c.held++
	}
	c.file(r)
}

func (c *Cache) authority(id string) *authority {
	a := c.authorities[id]
	if a == nil {
		a = &authority{}
		c.authorities[id] = a
	}
	return a
}

// forget drops an authority that signed nothing of what is held.
func (c *Cache) forget(id string, a *authority) {
	if len(a.signed) == 0 {
		delete(c.authorities, id)
	}
}

// Item is what renewal needs to know of one entry.
type Item struct {
	Entry *Entry
	SVID  *SVID // nil when none is held
	// Streams is the number of open streams that are served this entry.
	Streams int
	// Missing says that the server's answers do not name the entry at present:
	// that it does not mint for it is no fault. See [Cache.SetMissing].
	Missing bool
}

// RenewAt is when the SVID, which there has to be, is to be renewed by its age.
// One that is minted only when asked for, and that nobody has open, is not.
func (i Item) RenewAt() time.Time {
	if i.Entry.NoPrefetch && i.Streams == 0 {
		return i.SVID.NotAfter
	}
	return i.SVID.RenewAt
}

// Item returns the entry with this ID, or false when it is gone or no SVID is
// to be held for it.
func (c *Cache) Item(entryID string) (Item, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.records[entryID]
	if r == nil || !r.wanted || r.list == c.spare && !r.svid.NotAfter.After(c.now()) {
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

// Usage is what still uses one signing authority.
type Usage struct {
	Authority string
	Held      int // valid X.509-SVIDs held
	// Streams counts the open streams, and the processes whose streams have ended,
	// that have not read a replacement of what it signed; see [Process].
	Streams int
}

// Authorities returns what still uses each signing authority, read at one
// moment, by authority ID. Authorities that nothing uses are left out.
func (c *Cache) Authorities() []Usage {
	now := c.now()
	c.mu.Lock()
	defer c.mu.Unlock()
	streams := c.using(now)
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

// Newest names the authorities that signed what was minted last, which is the
// best an agent can tell of which is active. Empty where nothing was minted.
type Newest struct {
	X509, JWT string
	x509, jwt time.Time
}

// Newest returns the authorities that signed what was minted last.
func (c *Cache) Newest() Newest {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.newest
}

// Counts returns how many entries there are, how many X.509-SVIDs are held,
// and how many of those are due by more than grace past RenewAt and are to be
// renewed by their age (see [Item.RenewAt]). It reads all
// of them and is meant for a scrape.
func (c *Cache) Counts(grace time.Duration) (entries, held, overdue int) {
	late := c.now().Add(-grace)
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, a := range c.authorities {
		held += len(a.signed)
		for _, r := range a.signed {
			if r.svid.RenewAt.Before(late) && r.list != c.spare {
				overdue++
			}
		}
	}
	return len(c.records), held, overdue
}

// Follower learns which entries changed: what renewal and the store of
// runtime_dir act on. Close it when done.
type Follower struct {
	cache *Cache
	c     chan struct{}
	dirty map[string]struct{} // guarded by Cache.mu
}

// Follow returns a Follower that starts with every entry as changed.
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

// C receives when there is something to drain or the bundle has changed.
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

// Close ends the following.
func (f *Follower) Close() {
	f.cache.mu.Lock()
	defer f.cache.mu.Unlock()
	delete(f.cache.followers, f)
}

func (c *Cache) changed(r *record) {
	for f := range c.followers {
		f.dirty[r.entry.ID] = struct{}{}
		notify(f.c)
	}
}
