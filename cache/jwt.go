package cache

import (
	"container/list"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
)

// jwtLimit bounds the JWT-SVIDs held, because workloads choose the audiences. Above it
// the least recently used one is dropped, and its next caller waits for a mint.
const jwtLimit = 4096

// jwtBytes bounds the size of all JWT-SVIDs held, including audiences, which workloads
// choose, too. Most tokens have less than 1 KiB.
const jwtBytes = 16 << 20

// JWT is a JWT-SVID. It is immutable.
//
// It is held for its lifetime from the request on. So a wrong clock of this node does not
// matter: a new token is held at once, and for no longer than it is valid.
type JWT struct {
	Token string
	KeyID string
	// IssuedAt and ExpiresAt are the token's iat and exp, by the server's clock.
	IssuedAt, ExpiresAt time.Time
	// AskedAt is when it was requested, by this node's clock.
	AskedAt  time.Time
	outdated bool // minted for an earlier revision of the entry
}

// life returns how long the token is valid after AskedAt. Servers write iat in seconds (RFC
// 7519, section 2), so the token may be up to a second older.
func (j JWT) life() time.Duration { return j.ExpiresAt.Sub(j.IssuedAt) - time.Second }

// Valid reports whether the token has not expired by the monotonic clock. Because that
// clock stops while the machine is suspended, the token's life must not be over by the
// wall clock, or its exp must be in the future.
func (j JWT) Valid(now time.Time) bool {
	return now.Sub(j.AskedAt) < j.life() && (j.wallAge(now) < j.life() || now.Before(j.ExpiresAt))
}

// Fresh reports whether the token was minted for the current revision of the entry and is
// in the first half of its life.
func (j JWT) Fresh(now time.Time) bool {
	return !j.outdated && max(now.Sub(j.AskedAt), j.wallAge(now)) < j.life()/2
}

// wallAge returns the age by the wall clock.
func (j JWT) wallAge(now time.Time) time.Duration { return now.Round(0).Sub(j.AskedAt.Round(0)) }

// jwtKey is the key of a JWT-SVID, independent of the order of audiences and duplicates.
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
	// latest is the last expiry of the tokens handed out, by key ID, for keys in the
	// bundle.
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
	// No audience that is compared has a NUL.
	return jwtKey{entryID, strings.Join(slices.Compact(a), "\x00")}
}

// JWT returns the JWT-SVID held for an entry and a set of audiences, unless it has
// expired. It returns none if the entry was deleted or changed after e was read, so that
// no caller gets the token of another revision. A token whose key is tainted is returned,
// one whose key was removed is not. The caller decides whether to hand it out or to mint
// a [JWT.Fresh] one.
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

// Current reports whether e is the current revision of its entry.
func (c *Cache) Current(e *Entry) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.records[e.ID]
	return r != nil && r.entry == e
}

// PutJWT holds a JWT-SVID that was minted for the entry and records its expiry by key ID.
// It returns [ErrChanged] if the entry was deleted or changed meanwhile or the key is not
// in the bundle: the token must not be handed out. The token of an entry with IncludeJTI
// is recorded and not held.
func (c *Cache) PutJWT(e *Entry, audience []string, j JWT) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.snapshot == nil {
		return ErrChanged
	}
	if _, trusted := c.snapshot.Own.JWTKey(j.KeyID); !trusted {
		return ErrChanged
	}
	// Verifiers have other clocks: the later of the two expiries counts.
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

// JWTExpiry returns, by key ID, the latest expiry of the JWT-SVIDs handed out on this node,
// for keys that are in the bundle.
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

// JWTCounts counts the JWT-SVIDs held by key ID. It reads all of them and is meant for a
// scrape.
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

// markOutdated marks the tokens of an entry as minted for an earlier revision. They stay
// valid until they are replaced.
func (j *jwtCache) markOutdated(entryID string) {
	for _, key := range j.byEntry[entryID] {
		el := j.items[key]
		item := el.Value.(jwtItem)
		item.jwt.outdated = true
		el.Value = item
	}
}

// retain drops the tokens whose key is not in b. It reads the tokens only if there is such
// a key, so that a refresh without a removal costs nothing.
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
