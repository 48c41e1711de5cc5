// Package ledger knows, for each agent and entry, which authority signed the
// X.509-SVIDs that it was given and until when, and answers from that what an
// operator must know before a key is removed: who could still hold an SVID
// of it.
//
// A row says that an agent could hold an SVID that an authority signed for an
// entry. It is written, durably, before the SVID is handed out, and goes in one
// of four ways: the SVID has expired; the agent, having seen that the authority is
// tainted, has reported that nothing on its node depends on it any more; the
// operator says that the node is gone; the authority was removed. That the agent
// was given a replacement is not enough: it may not have arrived, and the
// workloads may not have it yet. An agent that does not report is therefore
// counted until its SVIDs expire.
//
// What is true of an authority follows from the rows and the last reports at
// every moment; there is no list of waves that are over.
//
// A server whose storage was put back from a copy does not know what was signed
// since the copy; see [Restored].
//
// # Order
//
// All changes are stored in the order in which they were made in memory. A row
// is seen from the moment it is to be stored; one that is to go is seen until
// that is durable. So what is seen never lacks what a restart would bring back,
// except what an agent or the clock has declared over. A row whose storing failed
// stays: it may have been stored all the same. A row that is given while
// the same agent's rows of the same authority are being deleted keeps them all in
// memory; the next report says again whether they may go.
//
// Reads never wait for storage.
//
// # Clocks
//
// Everything counts until a few minutes after its expiry by the server's
// clock, since clocks differ, and those who verify have clocks of their own: until
// [clock.Over]. A
// clock that went ahead by itself is believed after a day: until then what has
// expired is what the uptime explains; see [clock.Clock.Sure].
package ledger

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/server/keyset"
)

// longest is how long anything can be held: an SVID of the longest life.
const longest = keyset.MaxX509TTL + clock.Skew

// Row says that an agent could hold an X.509-SVID. Entry is empty for the
// agent's own.
type Row struct {
	Authority string // X.509 authority ID
	Agent     string // SPIFFE ID
	Entry     string // entry ID
	NotAfter  time.Time
}

// Change is what a [Storage] keeps in one atomic step. Of two rows with the
// same Authority, Agent and Entry the later one replaces the earlier.
type Change struct {
	Put  []Row
	Gone []Row                // NotAfter does not matter
	JWT  map[string]time.Time // latest expiry by key ID; zero deletes
}

// Storage keeps the ledger. It must be safe for concurrent use.
type Storage interface {
	// LoadLedger hands every row to row, in any order, and returns the latest
	// expiry of JWT-SVIDs by key ID.
	LoadLedger(ctx context.Context, row func(Row)) (jwt map[string]time.Time, err error)
	// SaveLedger returns when the change is durable. Concurrent calls may
	// share one commit.
	SaveLedger(ctx context.Context, c Change) error
}

// Restored says what storage that was put back from a copy cannot know: what the
// keys that it had were used for between the copy and the restore. Nobody can
// say who was given that, so no report takes it back; it ends when it has
// expired.
type Restored struct {
	CopiedAt time.Time
	// Until when an SVID that was signed in that time can be valid, by X.509
	// authority ID and by JWT key ID.
	X509, JWT map[string]time.Time
}

// Config says how to open a ledger. The zero value works.
type Config struct {
	Storage Storage // memory when nil
	// Restored is what Storage cannot know, of each restore; it must not be modified.
	Restored []Restored
	// RestoredAt is when this process began, if the last restore was then, by a clock that
	// may have been behind; else zero.
	RestoredAt time.Time
	Clock      *clock.Clock // one of the machine's, of which nothing is known, when nil
	Log        *slog.Logger // discarded when nil
}

// Ledger is the ledger of one deployment. All methods may be called
// concurrently.
type Ledger struct {
	storage  Storage
	restored []Restored
	now      func() time.Time // what has passed for sure, not the wall clock
	uptime   func() time.Duration
	late     func() time.Duration // by how much the last of restored was later than it says
	log      *slog.Logger
	saving   chan struct{} // held by who is in SaveLedger

	mu          sync.Mutex // never held over storage
	authorities map[string]*authority
	agents      map[string]*agent
	jwt         map[string]*jwtKey
	calendar    calendar
	expired     []Row // to be deleted from storage
	pending     *batch
	storing     *batch // is in SaveLedger, or was the last that was

	// Signatures on their way, by generation. Every taint that is learned of
	// ends a generation.
	generation uint64
	signing    map[uint64]int
}

// jwtKey is what is known of the JWT-SVIDs that a key has signed. Times are in
// Unix seconds, a full minute.
type jwtKey struct {
	latest  int64 // expiry of the last one
	durable int64 // as far as it is stored
	taint   taint
}

// taint is what the ledger remembers of the moment when it learned that a key
// signs nothing any more.
type taint struct {
	known   bool
	barrier uint64 // the generation that ended with it
}

// Open loads a ledger. What has expired is left out, and deleted by
// [Ledger.Run].
func Open(ctx context.Context, c Config) (*Ledger, error) {
	l := &Ledger{
		storage: c.Storage, restored: c.Restored, log: c.Log,
		saving:      make(chan struct{}, 1),
		authorities: make(map[string]*authority),
		agents:      make(map[string]*agent),
		jwt:         make(map[string]*jwtKey),
		calendar:    newCalendar(),
		signing:     make(map[uint64]int),
	}
	if l.storage == nil {
		l.storage = nowhere{}
	}
	if c.Clock == nil {
		c.Clock = clock.New(nil, nil, time.Time{})
	}
	l.now, l.uptime, l.late = c.Clock.Sure, c.Clock.Uptime, func() time.Duration { return 0 }
	if !c.RestoredAt.IsZero() {
		l.late = func() time.Duration { return max(0, c.Clock.Start().Sub(c.RestoredAt)) }
	}
	if l.log == nil {
		l.log = slog.New(slog.DiscardHandler)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pending, l.storing = newBatch(), newBatch()
	now := l.now()
	// Two rows of an entry, before and after a rotation, share its ID.
	ids := make(map[string]string)
	latest, err := l.storage.LoadLedger(ctx, func(r Row) {
		if over(r.NotAfter.Unix(), now) {
			l.expired = append(l.expired, r)
			return
		}
		if id, ok := ids[r.Entry]; ok {
			r.Entry = id
		} else {
			ids[r.Entry] = r.Entry
		}
		h := l.holding(r.Authority, r.Agent)
		expiry := l.put(h, r.Entry, r.NotAfter)
		h.agent.known = true
		if r.Authority == duplicates {
			h.agent.duplicatedUntil = expiry
		}
	})
	if err != nil {
		return nil, fmt.Errorf("open ledger: load: %w", err)
	}
	for id, t := range latest {
		if over(t.Unix(), now) {
			l.pending.jwt[id] = 0 // with the next change
			continue
		}
		l.jwt[id] = &jwtKey{latest: t.Unix(), durable: t.Unix()}
	}
	return l, nil
}

// over reports whether something that expires at a Unix time is over for
// everybody.
func over(expiry int64, now time.Time) bool {
	return !now.Before(clock.Over(time.Unix(expiry, 0)))
}

// at is a Unix time as a time, zero for none.
func at(unix int64) time.Time {
	if unix == 0 {
		return time.Time{}
	}
	return time.Unix(unix, 0).UTC()
}

// nowhere is the storage of a ledger that ends with the process.
type nowhere struct{}

func (nowhere) LoadLedger(context.Context, func(Row)) (map[string]time.Time, error) { return nil, nil }
func (nowhere) SaveLedger(context.Context, Change) error                            { return nil }
