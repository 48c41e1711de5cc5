package ledger

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// Begin says that a signature is on its way: whoever signs calls it before it
// looks which key is active, and end after GiveX509 or GiveJWT has returned and
// the answer is made. A key is not clear before the calls have ended that
// began while it may have signed: so there is no moment in which an SVID is
// neither on its way nor in a row. end may be called more than once; one that
// is never called keeps every key of its time from being clear.
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

// learn notes that a key signs nothing any more. What has begun by now may have
// met it active.
func (l *Ledger) learn(t *taint) {
	if !t.known {
		*t = taint{known: true, barrier: l.generation}
		l.generation++
	}
}

// onTheirWay counts the calls that may have met the key active.
func (l *Ledger) onTheirWay(t taint) int {
	n := 0
	for generation, calls := range l.signing { // seldom more than one
		if t.known && generation <= t.barrier {
			n += calls
		}
	}
	return n
}

// GiveX509 stores that agents are given X.509-SVIDs; it is durable when it
// returns nil, and counts from the call on. With an error the SVIDs must not
// be handed out; that they count until they expire all the same harms nobody,
// and they may have been stored.
//
// A row replaces one of the same authority, agent and entry, of which the later
// expiry stays: the agent may hold either. Entry IDs are kept as they are; give
// those that are in memory anyway.
func (l *Ledger) GiveX509(ctx context.Context, rows ...Row) error {
	if len(rows) == 0 {
		return nil
	}
	l.mu.Lock()
	b := l.pending
	var h *holding
	for _, r := range rows {
		if h == nil || h.authority.id != r.Authority || h.agent.id != r.Agent {
			h = l.holding(r.Authority, r.Agent)
		}
		b.rows[rowKey{h.authority.id, h.agent.id, r.Entry}] = l.put(h, r.Entry, r.NotAfter)
	}
	l.mu.Unlock()
	if err := l.save(ctx, b); err != nil {
		return fmt.Errorf("store who is given X.509-SVIDs: %w", err)
	}
	return nil
}

// GiveWith is [Ledger.GiveX509] for one row that is stored together with something
// else: by store, which makes the row that give returns durable in the ledger's
// Storage in one atomic step with the rest, and calls give once, when nothing but a
// failure of the storage can refuse the step any more. The row counts from then on.
// give waits for nothing but the ledger's lock. An error of store is returned as it
// is; the row counts all the same if give was called.
func (l *Ledger) GiveWith(ctx context.Context, r Row, store func(ctx context.Context, give func() Row) error) error {
	var h *holding
	var again *batch
	give := sync.OnceValue(func() Row {
		l.mu.Lock()
		defer l.mu.Unlock()
		h = l.holding(r.Authority, r.Agent)
		expiry := l.put(h, r.Entry, r.NotAfter)
		h.giving++
		k := rowKey{h.authority.id, h.agent.id, r.Entry}
		if _, ok := l.storing.rows[k]; ok {
			again = l.pending
		} else if _, ok := l.pending.rows[k]; ok {
			again = l.pending
		}
		if again != nil {
			again.rows[k] = expiry
		}
		r.NotAfter = at(expiry)
		return r
	})
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if h != nil {
			h.giving--
		}
	}()
	if err := store(ctx, give); err != nil || again == nil {
		return err
	}
	// A change of the same row was on its way and may have come after this one.
	return l.save(ctx, again)
}

// GiveJWT stores until when a JWT-SVID that a key signed is valid; it is durable
// when it returns nil. With an error the JWT-SVID must not be handed out.
//
// Only the latest expiry of each key is kept, as the next full minute: a busy
// key costs one write a minute.
func (l *Ledger) GiveJWT(ctx context.Context, keyID string, expiresAt time.Time) error {
	expiry := expiresAt.Add(time.Minute - 1).Truncate(time.Minute).Unix()
	l.mu.Lock()
	k := l.jwtKey(keyID)
	k.latest = max(k.latest, expiry)
	if k.durable >= expiry {
		l.mu.Unlock()
		return nil
	}
	b, latest := l.pending, k.latest
	b.jwt[keyID] = latest
	l.mu.Unlock()
	if err := l.save(ctx, b); err != nil {
		return fmt.Errorf("store the expiry of JWT-SVIDs: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	k.durable = max(k.durable, latest)
	return nil
}

func (l *Ledger) jwtKey(id string) *jwtKey {
	k := l.jwt[id]
	if k == nil {
		k = new(jwtKey)
		l.jwt[id] = k
	}
	return k
}
