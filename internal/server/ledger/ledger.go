// Package ledger records, for each agent and entry, which authority signed the
// X.509-SVIDs that the server issued, and when they expire. From that it answers
// the question before the removal of a key: which agents could still hold an SVID of
// it?
//
// A row says that an agent could hold an SVID that an authority signed for an
// entry. It is durable before the SVID is sent. It is deleted in one of four cases:
// the SVID has expired; the agent has seen that the authority is tainted and has
// reported that nothing on its node depends on it; the operator confirms that the node
// is gone; the authority was removed. It is not enough that a replacement was sent: it
// may not have arrived at the agent, or not yet at the workloads. So an agent that does
// not report is counted until its SVIDs expire.
//
// The state of an authority follows from the rows and the last reports at every
// moment; there is no list of completed waves.
//
// A server that was restored from a copy does not know what was signed since the
// copy; see [Restored].
//
// # Order
//
// All changes are stored in the order in which they are made in memory. A row
// counts before it is stored, and until its deletion is durable. So the ledger in
// memory never lacks a row that a restart would bring back, except those that are
// expired or that an agent has reported as replaced. A row that failed to be stored
// still counts, because it may have been stored. If a row is added while the same
// agent's rows of the same authority are being deleted, all of them are kept in memory;
// the agent's next report decides again.
//
// Reads never wait for storage.
//
// # Clocks
//
// A row counts until a few minutes after its expiry by the server's clock,
// [clock.Over], since the clocks of verifiers differ. A clock that was set ahead is
// trusted after a day; see [clock.Clock.AtLeast].
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

// longest is how long after its signing an SVID can be valid by any clock.
const longest = keyset.MaxX509TTL + clock.Skew

// Row says that an agent could hold an X.509-SVID. Entry is empty for the agent SVID.
type Row struct {
	Authority string // X.509 authority ID
	Agent     string // SPIFFE ID
	Entry     string // entry ID
	NotAfter  time.Time
}

// Change is one atomic change of a [Storage]. A row replaces a stored one with the
// same Authority, Agent and Entry.
type Change struct {
	Put  []Row
	Gone []Row                // to be deleted; NotAfter is not set
	JWT  map[string]time.Time // latest expiry by key ID; zero deletes
}

// Storage keeps the ledger. It must be safe for concurrent use.
type Storage interface {
	// LoadLedger calls row with every row, in any order, and returns the latest
	// expiry of JWT-SVIDs by key ID.
	LoadLedger(ctx context.Context, row func(Row)) (jwt map[string]time.Time, err error)
	// SaveLedger returns when the change is durable. Concurrent calls may
	// share one commit.
	SaveLedger(ctx context.Context, c Change) error
}

// Restored describes a restore from a copy. Storage has no rows of the SVIDs that
// were signed between the copy and the restore. It is unknown which agents hold them,
// so no report removes them; they count until they have expired.
type Restored struct {
	CopiedAt time.Time
	// The latest possible expiry of an SVID that was signed in that time, by X.509
	// authority ID and by JWT key ID.
	X509, JWT map[string]time.Time
}

// Config says how to open a ledger. Only Storage is required.
type Config struct {
	Storage Storage
	// Restored describes each restore of Storage; it must not be modified.
	Restored []Restored
	// RestoredAt is when this process started, by the clock at that time, which may have
	// been behind, if the last restore was at this start; otherwise zero.
	RestoredAt time.Time
	Clock      *clock.Clock // a new one of the machine, without heartbeat, when nil
	Log        *slog.Logger // optional
}

// Ledger is the ledger of one deployment. All methods may be called
// concurrently.
type Ledger struct {
	storage  Storage
	restored []Restored
	now      func() time.Time // a lower bound of the time, not the wall clock
	uptime   func() time.Duration
	late     func() time.Duration // how much later the last of restored was than recorded
	log      *slog.Logger
	saving   chan struct{} // a semaphore for SaveLedger

	mu          sync.Mutex // never held during a call of storage
	authorities map[string]*authority
	agents      map[string]*agent
	jwt         map[string]*jwtKey
	expiryQueue expiryQueue
	expired     []Row // to be deleted from storage
	pending     *batch
	storing     *batch // the one in SaveLedger, or the last that was

	// Signatures in flight, by generation. Every new taint ends a generation.
	generation uint64
	signing    map[uint64]int
}

// jwtKey describes the JWT-SVIDs that a key has signed. Times are in Unix seconds,
// in full minutes.
type jwtKey struct {
	latest  int64 // expiry of the last one
	durable int64 // the latest that is stored
	taint   taint
}

// taint records when the ledger learned that a key no longer signs.
type taint struct {
	known   bool
	barrier uint64 // the generation that ended with it
}

// Open loads a ledger. Expired rows are left out, and deleted by [Ledger.Run].
func Open(ctx context.Context, c Config) (*Ledger, error) {
	l := &Ledger{
		storage: c.Storage, restored: c.Restored, log: c.Log,
		saving:      make(chan struct{}, 1),
		authorities: make(map[string]*authority),
		agents:      make(map[string]*agent),
		jwt:         make(map[string]*jwtKey),
		expiryQueue: newExpiryQueue(),
		signing:     make(map[uint64]int),
	}
	if c.Clock == nil {
		c.Clock = clock.New(nil, nil, time.Time{})
	}
	l.now, l.uptime, l.late = c.Clock.AtLeast, c.Clock.Uptime, func() time.Duration { return 0 }
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
		h := l.holdingLocked(r.Authority, r.Agent)
		expiry := l.putLocked(h, r.Entry, r.NotAfter)
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

// over reports whether something with an expiry in Unix seconds has expired by every
// machine's clock.
func over(expiry int64, now time.Time) bool {
	return !now.Before(clock.Over(time.Unix(expiry, 0)))
}

// fromUnix converts Unix seconds; zero is the zero time.
func fromUnix(unix int64) time.Time {
	if unix == 0 {
		return time.Time{}
	}
	return time.Unix(unix, 0).UTC()
}
