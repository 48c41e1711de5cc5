package keyset

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/renewd/renewd/internal/refusal"
	"github.com/renewd/renewd/internal/server/detach"
)

// mutationTimeout is the longest that a mutation takes to return, even if its checks
// or its storage hang.
const mutationTimeout = 120 * time.Second

// Check can refuse a mutation that the keyset's state allows. It is called with the
// keysets before the step, in order of issue. If it returns an error, nothing is
// changed and the mutation returns that error unwrapped. The step is applied to exactly
// the keysets that the Check has seen: another mutation in between makes this one fail
// with ErrBusy. Other mutations are refused while a Check runs, so it must be fast. It
// runs on another goroutine, possibly after the mutation has returned at its timeout.
type Check func([]Keyset) error

// mutate commits one change and publishes the result. It returns at mutationTimeout at
// the latest, but a disk can hang for longer, in a read or in a commit. Until it answers,
// the mutation is in flight and others are refused. If its commit had not begun, it
// changes nothing; otherwise its result is published when the commit is done. mutate
// keeps waiting if ctx is canceled, so that its caller can log the outcome.
func (d *Deployment) mutate(ctx context.Context, operation string, checks []Check, change func(*Document, *Change) error) (*snapshot, error) {
	if !d.mutating.CompareAndSwap(false, true) {
		return nil, refusal.ErrBusy
	}
	ctx, cancel := context.WithTimeout(ctx, mutationTimeout)
	defer cancel()
	deadline, _ := ctx.Deadline()
	stays, leaves := context.WithDeadline(context.WithoutCancel(ctx), deadline)
	defer leaves()
	then, err := detach.Do(stays, &d.mutations, func() (*snapshot, error) {
		defer d.mutating.Store(false)
		return d.step(ctx, operation, checks, change)
	})
	if errors.Is(err, detach.ErrOpen) {
		err = fmt.Errorf("%s keyset: %w", operation, err)
	}
	return then, err
}

// step carries out a mutation of the stored document, which may be newer than the one
// that this process published last. change modifies the document and sets the keyset's
// ID in the Change, which has the time and the actor. step returns the new snapshot.
func (d *Deployment) step(ctx context.Context, operation string, checks []Check, change func(*Document, *Change) error) (then *snapshot, err error) {
	failed := func(what string, err error) error { return fmt.Errorf("%s keyset: %s%w", operation, what, err) }
	doc, err := d.storage.Load(ctx)
	if err != nil {
		return nil, failed("load: ", err)
	}
	before := new(snapshot)
	if doc.Version > 0 {
		// A Check must see the published keysets.
		if before, err = d.publish(doc); err != nil {
			return nil, failed("", err)
		}
	}
	// UTC also drops the monotonic clock reading, which would not be stored.
	c := Change{At: d.now().UTC(), Actor: Actor(ctx), Operation: operation, Before: states(doc), Note: Note(ctx)}
	if err := change(&doc, &c); err != nil {
		if _, ok := errors.AsType[refusal.Error](err); ok {
			return nil, err // never wrapped
		}
		return nil, failed("", err)
	}
	for _, check := range checks {
		if err := check(slices.Clone(before.keysets)); err != nil {
			return nil, err
		}
	}
	c.After = states(doc)
	doc.Version++
	// Parse before the commit: an unusable document must not be stored.
	if then, err = newSnapshot(d.td, doc); err != nil {
		return nil, failed("", err)
	}
	// The caller may have got ErrOpen: do not begin a commit after that.
	if err := ctx.Err(); err != nil {
		return nil, failed("", err)
	}
	switch err := d.storage.Save(ctx, doc, c); {
	case errors.Is(err, ErrConflict):
		return nil, refusal.ErrBusy
	case err != nil:
		return nil, failed("save: ", err)
	}
	d.advance(then)
	return then, nil
}

// Wait returns when no mutation is waiting for storage. Call it after closing storage.
func (d *Deployment) Wait() { d.mutations.Wait() }

func states(doc Document) map[string]State {
	out := make(map[string]State, len(doc.Records))
	for _, r := range doc.Records {
		out[r.ID] = r.State
	}
	return out
}

// publish makes a stored Document the current one, unless the current one is as new,
// and returns the current snapshot.
func (d *Deployment) publish(doc Document) (*snapshot, error) {
	if cur := d.current.Load(); cur != nil && cur.version >= doc.Version {
		return cur, nil
	}
	s, err := newSnapshot(d.td, doc)
	if err != nil {
		return nil, err
	}
	d.advance(s)
	return s, nil
}

// advance replaces the current snapshot unless it is as new as next.
func (d *Deployment) advance(next *snapshot) {
	for {
		cur := d.current.Load()
		if cur != nil && cur.version >= next.version {
			return
		}
		if d.current.CompareAndSwap(cur, next) {
			if cur != nil {
				close(cur.replaced)
			}
			return
		}
	}
}

func find(doc *Document, id string) *Record {
	for i := range doc.Records {
		if doc.Records[i].ID == id {
			return &doc.Records[i]
		}
	}
	return nil
}
