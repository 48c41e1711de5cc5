package ledger

import (
	"container/heap"
	"context"
	"slices"
	"time"

	"github.com/renewd/renewd/internal/clock"
)

// calendar says what is to be looked at when, to the minute. The minutes are a
// heap and not walked through, so that a clock may be set to whatever it will.
type calendar struct {
	minutes minuteHeap
	at      map[int64][]appointment
}

// appointment is a row to be looked at, once for each row: one that was given a
// later expiry meanwhile gets another. An agent's own visit has no holding.
type appointment struct {
	*holding
	entry string // or the agent's ID
}

func newCalendar() calendar { return calendar{at: make(map[int64][]appointment)} }

// add files what ends at a Unix time.
func (c *calendar) add(end int64, a appointment) {
	const minute = 60
	m := (clock.Over(time.Unix(end, 0)).Unix() + minute - 1) / minute
	list, ok := c.at[m]
	if !ok {
		heap.Push(&c.minutes, m)
	}
	c.at[m] = append(list, a)
}

// due takes out what is filed up to now.
func (c *calendar) due(now time.Time) []appointment {
	var due []appointment
	for len(c.minutes) > 0 && c.minutes[0] <= now.Unix()/60 {
		m := heap.Pop(&c.minutes).(int64)
		due = append(due, c.at[m]...)
		delete(c.at, m)
	}
	return due
}

type minuteHeap []int64

func (h minuteHeap) Len() int           { return len(h) }
func (h minuteHeap) Less(i, j int) bool { return h[i] < h[j] }
func (h minuteHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *minuteHeap) Push(m any)        { *h = append(*h, m.(int64)) }
func (h *minuteHeap) Pop() any {
	last := len(*h) - 1
	m := (*h)[last]
	*h = (*h)[:last]
	return m
}

// expire drops from memory what is over. Every method that reads calls it, so
// that what they say does not depend on when Run comes by.
func (l *Ledger) expire() time.Time {
	now := l.now()
	for _, a := range l.calendar.due(now) {
		if a.holding == nil {
			l.visit(a.entry, now)
			continue
		}
		expiry, ok := a.rows[a.entry]
		switch {
		case !ok:
			// Gone before, with the agent's word.
		case !over(expiry, now):
			l.calendar.add(expiry, a)
		default:
			delete(a.rows, a.entry)
			l.expired = append(l.expired, Row{Authority: a.authority.id, Agent: a.agent.id, Entry: a.entry})
			if len(a.rows) == 0 {
				// Whatever it said that it holds has expired with them.
				a.said = claim{}
			}
			l.recount(a.holding)
		}
	}
	return now
}

// visit looks whether an agent that was heard of is to be remembered still.
// What it said that it holds, where no row tells until when, has expired after
// the longest life of an SVID.
func (l *Ledger) visit(id string, now time.Time) {
	g := l.agents[id]
	if g == nil || g.contact.At.IsZero() {
		return
	}
	if end := g.contact.At.Add(longest); end.After(now) {
		l.calendar.add(end.Unix(), appointment{entry: id})
		return
	}
	g.forget()
	g.known = true
	for _, h := range g.holdings {
		h.said = claim{}
		l.recount(h)
	}
	l.forgetAgent(g)
}

// sweep is how often what has expired is deleted from storage.
const sweep = time.Minute

// perSave bounds one change that nobody waits for, so that those who wait for
// theirs are not kept.
const perSave = 4096

// Run deletes from storage what has expired, until ctx ends, and returns nil.
func (l *Ledger) Run(ctx context.Context) error {
	ticker := time.NewTicker(sweep)
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
				l.log.Error("expired rows not deleted, tried again in a minute", "rows", n, "error", err)
			}
			if err != nil || n == 0 {
				break
			}
		}
	}
}

// sweep deletes some expired rows and says how many.
func (l *Ledger) sweep(ctx context.Context) (int, error) {
	l.mu.Lock()
	l.expire()
	n := min(len(l.expired), perSave)
	gone := slices.Clone(l.expired[:n])
	if l.expired = l.expired[n:]; len(l.expired) == 0 {
		l.expired = nil
	}
	b := l.pending
	for _, r := range gone {
		// It may have come back since.
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
		l.expired = append(l.expired, gone...)
		l.mu.Unlock()
	}
	return n, err
}
