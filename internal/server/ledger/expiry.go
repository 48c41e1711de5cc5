package ledger

import (
	"context"
	"math"
	"slices"
	"time"

	"github.com/renewd/renewd/internal/clock"
)

// expiryQueue holds rows and agents by the minute in which they may expire. There are at
// most as many minutes as the longest lifetime has.
type expiryQueue struct {
	at   map[int64][]expiryItem
	next int64 // no minute in at is earlier
}

// expiryItem is a row whose expiry is to be checked. There is one for each row: if the
// row's expiry has moved, it is added again. The item of an agent has no holding.
type expiryItem struct {
	*holding
	entry string // or the agent's ID
}

func newExpiryQueue() expiryQueue {
	return expiryQueue{at: make(map[int64][]expiryItem), next: math.MaxInt64}
}

// add adds an item that expires at a time in Unix seconds.
func (c *expiryQueue) add(end int64, a expiryItem) {
	const minute = 60
	m := (clock.Over(time.Unix(end, 0)).Unix() + minute - 1) / minute
	c.at[m] = append(c.at[m], a)
	c.next = min(c.next, m)
}

// due removes and returns the items up to now, in any order.
func (c *expiryQueue) due(now time.Time) []expiryItem {
	last := now.Unix() / 60
	if last < c.next {
		return nil
	}
	var due []expiryItem
	c.next = math.MaxInt64
	for m, items := range c.at {
		if m <= last {
			due = append(due, items...)
			delete(c.at, m)
		} else {
			c.next = min(c.next, m)
		}
	}
	return due
}

// expireLocked drops expired rows and agents from memory. Every method that reads calls
// it, so that their results do not depend on when Run does.
func (l *Ledger) expireLocked() time.Time {
	now := l.now()
	for _, a := range l.expiryQueue.due(now) {
		if a.holding == nil {
			l.expireAgentLocked(a.entry, now)
			continue
		}
		expiry, ok := a.rows[a.entry]
		switch {
		case !ok:
			// Deleted before, after a report of the agent.
		case !over(expiry, now):
			l.expiryQueue.add(expiry, a)
		default:
			delete(a.rows, a.entry)
			l.expired = append(l.expired, Row{Authority: a.authority.id, Agent: a.agent.id, Entry: a.entry})
			if len(a.rows) == 0 {
				// The SVIDs that the agent reported have expired, too.
				a.claim = claim{}
			}
			l.recountLocked(a.holding)
		}
	}
	return now
}

// expireAgentLocked drops the reports of an agent whose last contact is longer ago than
// the longest lifetime of an SVID. Claims without a row have expired by then, too.
func (l *Ledger) expireAgentLocked(id string, now time.Time) {
	g := l.agents[id]
	if g == nil || g.contact.At.IsZero() {
		return
	}
	if end := g.contact.At.Add(longest); end.After(now) {
		l.expiryQueue.add(end.Unix(), expiryItem{entry: id})
		return
	}
	g.resetReports()
	g.known = true
	for _, h := range g.holdings {
		h.claim = claim{}
		l.recountLocked(h)
	}
	l.pruneAgentLocked(g)
}

// sweepInterval is how often expired rows are deleted from storage.
const sweepInterval = time.Minute

// maxPerSave bounds the rows that are deleted in one change, so that calls which wait
// for storage are not delayed.
const maxPerSave = 4096

// Run deletes expired rows from storage until ctx ends, and returns nil.
func (l *Ledger) Run(ctx context.Context) error {
	ticker := time.NewTicker(sweepInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		for {
			n, err := l.sweep(ctx)
			if err != nil && ctx.Err() == nil {
				l.log.Error("expired rows not deleted", "count", n, "error", err, "delay", sweepInterval)
			}
			if err != nil || n == 0 {
				break
			}
		}
	}
}

// sweep deletes some expired rows and returns how many.
func (l *Ledger) sweep(ctx context.Context) (int, error) {
	l.mu.Lock()
	l.expireLocked()
	n := min(len(l.expired), maxPerSave)
	expired := slices.Clone(l.expired[:n])
	if l.expired = l.expired[n:]; len(l.expired) == 0 {
		l.expired = nil
	}
	b := l.pending
	for _, r := range expired {
		// It may have been added again.
		if a := l.authorities[r.Authority]; a != nil {
			if h := a.holdings[r.Agent]; h != nil {
				if _, back := h.rows[r.Entry]; back {
					continue
				}
			}
		}
		b.rows[rowKey{r.Authority, r.Agent, r.Entry}] = 0
	}
	l.mu.Unlock()
	if n == 0 {
		return 0, nil
	}
	err := l.save(ctx, b)
	if err != nil {
		l.mu.Lock()
		l.expired = append(l.expired, expired...)
		l.mu.Unlock()
	}
	return n, err
}
