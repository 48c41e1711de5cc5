package ledger

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// Begin announces a signature. Call it before reading which key is active, and call end
// after RecordX509 or RecordJWT has returned and the answer is complete. A key is not
// clear until all calls have ended that began while it may have been active: so at any
// moment an SVID is in flight or in a row. end may be called more than once. If it is
// never called, no key that was active since then becomes clear.
func (l *Ledger) Begin() (end func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	generation := l.generation
	l.signing[generation]++
	return sync.OnceFunc(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.signing[generation]--; l.signing[generation] == 0 {
			delete(l.signing, generation)
		}
	})
}

// learnTaintLocked records that a key no longer signs. Calls that have begun before may
// still sign with it.
func (l *Ledger) learnTaintLocked(t *taint) {
	if !t.known {
		*t = taint{known: true, barrier: l.generation}
		l.generation++
	}
}

// inFlightLocked counts the calls in flight that may sign with a tainted key.
func (l *Ledger) inFlightLocked(t taint) int {
	n := 0
	for generation, calls := range l.signing { // seldom more than one
		if t.known && generation <= t.barrier {
			n += calls
		}
	}
	return n
}

// RecordX509 records that agents may hold X.509-SVIDs. The rows count from the call on,
// and are durable if it returns nil. With an error the SVIDs must not be sent; the rows
// count until they expire all the same, because they may have been stored.
//
// A row replaces one with the same authority, agent and entry, and the later expiry of
// the two counts, because the agent may hold either SVID. The ledger keeps the strings
// of entry IDs, so pass those that are in memory anyway.
func (l *Ledger) RecordX509(ctx context.Context, rows ...Row) error {
	if len(rows) == 0 {
		return nil
	}
	l.mu.Lock()
	b := l.pending
	var h *holding
	for _, r := range rows {
		if h == nil || h.authority.id != r.Authority || h.agent.id != r.Agent {
			h = l.holdingLocked(r.Authority, r.Agent)
		}
		b.rows[rowKey{h.authority.id, h.agent.id, r.Entry}] = l.putLocked(h, r.Entry, r.NotAfter)
	}
	l.mu.Unlock()
	if err := l.save(ctx, b); err != nil {
		return fmt.Errorf("record X.509-SVIDs: %w", err)
	}
	return nil
}

// RecordWith is [Ledger.RecordX509] for one row that is stored together with other data.
// store makes the row that add returns durable in the ledger's Storage, in one atomic
// step with that data. It calls add once, when only a failure of storage can refuse the
// step. The row counts from then on. add waits only for the ledger's mutex. An error of
// store is returned unwrapped; the row counts all the same if add was called.
func (l *Ledger) RecordWith(ctx context.Context, r Row, store func(ctx context.Context, add func() Row) error) error {
	var h *holding
	var again *batch
	add := sync.OnceValue(func() Row {
		l.mu.Lock()
		defer l.mu.Unlock()
		h = l.holdingLocked(r.Authority, r.Agent)
		expiry := l.putLocked(h, r.Entry, r.NotAfter)
		h.recording++
		k := rowKey{h.authority.id, h.agent.id, r.Entry}
		if _, ok := l.storing.rows[k]; ok {
			again = l.pending
		} else if _, ok := l.pending.rows[k]; ok {
			again = l.pending
		}
		if again != nil {
			again.rows[k] = expiry
		}
		r.NotAfter = fromUnix(expiry)
		return r
	})
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if h != nil {
			h.recording--
		}
	}()
	if err := store(ctx, add); err != nil || again == nil {
		return err
	}
	// A change of the same row was in flight and may have been stored after this one.
	return l.save(ctx, again)
}

// RecordJWT records the expiry of a JWT-SVID that a key signed; it is durable if it
// returns nil. With an error the JWT-SVID must not be sent.
//
// Only the latest expiry of each key is kept, rounded up to a minute, so that a busy key
// causes one write a minute.
func (l *Ledger) RecordJWT(ctx context.Context, keyID string, expiresAt time.Time) error {
	expiry := expiresAt.Add(time.Minute - 1).Truncate(time.Minute).Unix()
	l.mu.Lock()
	k := l.jwtKeyLocked(keyID)
	k.latest = max(k.latest, expiry)
	if k.durable >= expiry {
		l.mu.Unlock()
		return nil
	}
	b, latest := l.pending, k.latest
	b.jwt[keyID] = latest
	l.mu.Unlock()
	if err := l.save(ctx, b); err != nil {
		return fmt.Errorf("record JWT-SVID: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	k.durable = max(k.durable, latest)
	return nil
}

func (l *Ledger) jwtKeyLocked(id string) *jwtKey {
	k := l.jwt[id]
	if k == nil {
		k = new(jwtKey)
		l.jwt[id] = k
	}
	return k
}
