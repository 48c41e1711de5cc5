package ledger

import (
	"context"
	"errors"
	"time"
)

// batch gathers the changes of those who wait for storage at the same time.
type batch struct {
	rows map[rowKey]int64 // expiry in Unix seconds; gone when zero
	jwt  map[string]int64
	done chan struct{} // closed when err is set
	err  error
}

type rowKey struct{ authority, agent, entry string }

func newBatch() *batch {
	return &batch{rows: make(map[rowKey]int64), jwt: make(map[string]int64), done: make(chan struct{})}
}

func (b *batch) change() Change {
	var c Change
	for k, notAfter := range b.rows {
		r := Row{Authority: k.authority, Agent: k.agent, Entry: k.entry, NotAfter: at(notAfter)}
		if notAfter == 0 {
			c.Gone = append(c.Gone, r)
		} else {
			c.Put = append(c.Put, r)
		}
	}
	if len(b.jwt) > 0 {
		c.JWT = make(map[string]time.Time, len(b.jwt))
		for id, expiry := range b.jwt {
			c.JWT[id] = at(expiry)
		}
	}
	return c
}

// save returns when a batch, to which the caller has added under mu, is
// durable. One batch is stored at a time, by one of those who wait for it: two
// changes of one row reach storage in the order in which they were made.
// When ctx ends first, the batch is stored with the next one's.
func (l *Ledger) save(ctx context.Context, b *batch) error {
	select {
	case l.saving <- struct{}{}:
		defer func() { <-l.saving }()
	case <-b.done:
		return b.err
	case <-ctx.Done():
		return ctx.Err()
	}
	l.mu.Lock()
	mine := l.pending == b
	if mine {
		l.pending, l.storing = newBatch(), b
	}
	l.mu.Unlock()
	if mine {
		defer close(b.done)
		defer l.stored()
		b.err = errUnfinished // unless storage returns
		// The others in the batch do not give up with this caller.
		b.err = l.storage.SaveLedger(context.WithoutCancel(ctx), b.change())
	}
	// A batch that is pending no more was done before saving was free.
	return b.err
}

// stored says that nothing is in SaveLedger any more.
func (l *Ledger) stored() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.storing = newBatch()
}

// errUnfinished is what those learn who shared a batch with a caller in whose
// hands storage panicked.
var errUnfinished = errors.New("storage did not finish")
