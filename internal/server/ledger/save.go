package ledger

import (
	"context"
	"errors"
	"time"
)

// batch combines the changes of calls that wait for storage at the same time.
type batch struct {
	rows map[rowKey]int64 // expiry in Unix seconds; zero deletes
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
		r := Row{Authority: k.authority, Agent: k.agent, Entry: k.entry, NotAfter: fromUnix(notAfter)}
		if notAfter == 0 {
			c.Gone = append(c.Gone, r)
		} else {
			c.Put = append(c.Put, r)
		}
	}
	if len(b.jwt) > 0 {
		c.JWT = make(map[string]time.Time, len(b.jwt))
		for id, expiry := range b.jwt {
			c.JWT[id] = fromUnix(expiry)
		}
	}
	return c
}

// save returns when a batch, to which the caller has added under mu, is durable. One
// batch is stored at a time, by one of the calls that wait for it: changes of the same
// row reach storage in the order in which they were made. If ctx ends first, the batch
// remains pending and is stored by a later call.
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
		defer l.finishSave()
		b.err = errUnfinished // unless storage returns
		// Other calls wait for the batch, too.
		b.err = l.storage.SaveLedger(context.WithoutCancel(ctx), b.change())
	}
	// A batch that is no longer pending was stored before this call got saving.
	return b.err
}

// finishSave records that no batch is in SaveLedger.
func (l *Ledger) finishSave() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.storing = newBatch()
}

// errUnfinished is returned to calls that share a batch with one in which storage
// panicked.
var errUnfinished = errors.New("storage did not finish")
