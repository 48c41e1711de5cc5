package cache

import (
	"container/list"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
)

// jwtLimit bounds the JWT-SVIDs held, since a workload may ask for any
// audience it likes. Beyond it the least recently used is dropped, which costs
// its next caller a mint.
const jwtLimit = 4096

// jwtBytes bounds their size, audiences included, which is a workload's to
// choose as well. Most tokens have less than 1 KiB.
const jwtBytes = 16 << 20

// JWT is a JWT-SVID. It is immutable.
//
// How long it is held follows from how long it lives, counted from when the
// server was asked for it. That the clock of this node lags or is ahead does
// not matter then: a token that was signed a moment ago is neither too young
// to be held nor held for longer than it is valid.
type JWT struct {
	Token string
	KeyID string
	// IssuedAt and ExpiresAt are the token's iat and exp, by the server's clock.
	IssuedAt, ExpiresAt time.Time
	// AskedAt is when the server was asked for it, by this node's clock.
	AskedAt time.Time
	stale   bool // minted for an earlier revision of the entry
}

// life is how long the token is valid after AskedAt. Its iat has whole seconds
// (RFC 7519, section 2, as servers write it): the token may be that much older.
func (j JWT) life() time.Duration { return j.ExpiresAt.Sub(j.IssuedAt) - time.Second }

// Valid reports whether the token has not expired. The clock that is never set
// decides. The wall clock, too, has to say that its life is not over or that
// exp is still to come, because the other one stands still while the machine
// sleeps.
func (j JWT) Valid(now time.Time) bool {
	return now.Sub(j.AskedAt) < j.life() && (j.wallAge(now) < j.life() || now.Before(j.ExpiresAt))
}

// Fresh reports whether it was minted for the entry as it is and less than half
// of its life has passed.
func (j JWT) Fresh(now time.Time) bool {
	return !j.stale && max(now.Sub(j.AskedAt), j.wallAge(now)) < j.life()/2
}

// wallAge is its age by the wall clock.
func (j JWT) wallAge(now time.Time) time.Duration { return now.Round(0).Sub(j.AskedAt.Round(0)) }

// jwtKey names a JWT-SVID: the order of audiences and repeats do not matter.
type jwtKey struct{ entryID, audience string }

type jwtItem struct {
	key jwtKey
	id  spiffeid.ID // in the token
	jwt JWT
}

func (i jwtItem) size() int { return len(i.key.audience) + len(i.jwt.Token) }

// jwtCache is guarded by Cache.mu.
type jwtCache struct {
	items   map[jwtKey]*list.Element // of jwtItem
	recent  *list.List               // least recently used first
	bytes   int                      // of all items
	byEntry map[string][]jwtKey
	// latest is the last expiry of what was handed out, for each key of the
	// bundle that signed any of it.
	latest map[string]time.Time
}

func newJWTCache() jwtCache {
	return jwtCache{
		items:   make(map[jwtKey]*list.Element),
		recent:  list.New(),
		byEntry: make(map[string][]jwtKey),
		latest:  make(map[string]time.Time),
	}
}

func newJWTKey(entryID string, audience []string) jwtKey {
	a := slices.Clone(audience)
	slices.Sort(a)
	// NUL cannot be part of a JSON string claim that anyone compares.
	return jwtKey{entryID, strings.Join(slices.Compact(a), "\x00")}
}

// JWT returns the JWT-SVID held for an entry and a set of audiences, unless it
// has expired. It is for the entry as it is: one that was deleted or changed
// since e was read has none, so that nobody is given the token of what e used to
// be. Taint does not matter; a token whose key left the bundle is gone. Whether to
// hand it out or to mint a [JWT.Fresh] one is the caller's choice.
func (c *Cache) JWT(e *Entry, audience []string) (JWT, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	el := c.jwts.items[newJWTKey(e.ID, audience)]
	if r := c.records[e.ID]; el == nil || r == nil || r.entry != e {
		return JWT{}, false
	}
	item := el.Value.(jwtItem)
	if item.id != e.SPIFFEID || !item.jwt.Valid(c.now()) {
		c.jwts.drop(el)
		return JWT{}, false
	}
	c.jwts.recent.MoveToBack(el)
	return item.jwt, true
}

// Current reports whether e is the entry of its ID as it is now.
func (c *Cache) Current(e *Entry) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.records[e.ID]
	return r != nil && r.entry == e
}

// PutJWT holds a JWT-SVID that was minted for the entry and notes its expiry
// under its key ID. One for an entry that was deleted or changed meanwhile, or by
// a key that is not in the bundle, is not held and must not be handed out. One of
// an entry with IncludeJTI is for the caller that asked for it: it is noted, and
// not held.
func (c *Cache) PutJWT(e *Entry, audience []string, j JWT) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.snapshot == nil {
		return ErrChanged
	}
	if _, trusted := c.snapshot.Own.JWTKey(j.KeyID); !trusted {
		return ErrChanged
	}
	// Others read this with other clocks: the later of the two ends counts.
	end := j.AskedAt.Round(0).Add(j.life())
	if j.ExpiresAt.After(end) {
		end = j.ExpiresAt
	}
	if end.After(c.jwts.latest[j.KeyID]) {
		c.jwts.latest[j.KeyID] = end
	}
	if !j.AskedAt.Before(c.newest.jwt) {
		c.newest.JWT, c.newest.jwt = j.KeyID, j.AskedAt
	}
	if r := c.records[e.ID]; r == nil || r.entry != e {
		return ErrChanged
	}
	if e.IncludeJTI {
		return nil
	}
	key := newJWTKey(e.ID, audience)
	if el := c.jwts.items[key]; el != nil {
		c.jwts.drop(el)
	}
	item := jwtItem{key, e.SPIFFEID, j}
	c.jwts.items[key] = c.jwts.recent.PushBack(item)
	c.jwts.bytes += item.size()
	c.jwts.byEntry[e.ID] = append(c.jwts.byEntry[e.ID], key)
	for len(c.jwts.items) > jwtLimit || c.jwts.bytes > jwtBytes {
		c.jwts.drop(c.jwts.recent.Front())
	}
	return nil
}

// JWTExpiry returns, by key ID, the latest expiry among the JWT-SVIDs that
// were handed out on this node, for keys still in the bundle.
func (c *Cache) JWTExpiry() map[string]time.Time {
	now := c.now()
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make(map[string]time.Time, len(c.jwts.latest))
	for id, t := range c.jwts.latest {
		if now.Before(t) {
			out[id] = t
		}
	}
	return out
}

// JWTCounts returns how many JWT-SVIDs are held by key ID. It reads all of
// them and is meant for a scrape.
func (c *Cache) JWTCounts() map[string]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make(map[string]int)
	for el := c.jwts.recent.Front(); el != nil; el = el.Next() {
		out[el.Value.(jwtItem).jwt.KeyID]++
	}
	return out
}

func (j *jwtCache) drop(el *list.Element) {
	item := j.recent.Remove(el).(jwtItem)
	key := item.key
	j.bytes -= item.size()
	delete(j.items, key)
	keys := slices.DeleteFunc(j.byEntry[key.entryID], func(k jwtKey) bool { return k == key })
	if j.byEntry[key.entryID] = keys; len(keys) == 0 {
		delete(j.byEntry, key.entryID)
	}
}

func (j *jwtCache) dropEntry(entryID string) {
	for _, key := range slices.Clone(j.byEntry[entryID]) {
		j.drop(j.items[key])
	}
}

// age has what is held for an entry minted again at the next chance. Until then
// it is as good as before.
func (j *jwtCache) age(entryID string) {
	for _, key := range j.byEntry[entryID] {
		el := j.items[key]
		item := el.Value.(jwtItem)
		item.jwt.stale = true
		el.Value = item
	}
}

// retain drops what was signed by keys that b does not have. Only when such a
// key is known does it look at the tokens, so a bundle refresh that removes
// nothing costs nothing.
func (j *jwtCache) retain(b *bundle.Bundle) {
	gone := make(map[string]bool)
	for id := range j.latest {
		if _, ok := b.JWTKey(id); !ok {
			gone[id] = true
			delete(j.latest, id)
		}
	}
	if len(gone) == 0 {
		return
	}
	var next *list.Element
	for el := j.recent.Front(); el != nil; el = next {
		next = el.Next()
		if gone[el.Value.(jwtItem).jwt.KeyID] {
			j.drop(el)
		}
	}
}
