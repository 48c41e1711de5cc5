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

// mutationTimeout is when a mutation returns at the latest, whatever its checks
// and its storage do.
const mutationTimeout = 120 * time.Second

// Check has the last word on a mutation that its state allows. It is called
// with the keysets as they are before the step, in order of issue. When it
// returns an error nothing is changed and the mutation returns that error as
// it is. What it has seen is what the step is applied to: another mutation in
// between makes this one fail with ErrBusy. Other mutations are refused while
// it runs, so it must be fast. It runs on another goroutine, and may do so still
// when the mutation has returned because its time was over.
type Check func([]Keyset) error

// mutate commits one change and publishes what follows from it, at the latest when
// its time is up. A disk can be stuck for longer, in a read as in a commit. The
// mutation is still in flight then and keeps others out. One whose commit had not
// begun changes nothing; what a commit leads to is published when it is done. A
// caller who is gone before that does not end the wait: how it ended is worth its
// line in the log.
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

// step carries out a mutation. What is stored decides, not what this process
// published last. change alters the document and names the keyset that it is
// about; it is told who acts, and when. step returns what is in force then.
func (d *Deployment) step(ctx context.Context, operation string, checks []Check, change func(*Document, *Change) error) (then *snapshot, err error) {
	failed := func(what string, err error) error { return fmt.Errorf("%s keyset: %s%w", operation, what, err) }
	doc, err := d.storage.Load(ctx)
	if err != nil {
		return nil, failed("load: ", err)
	}
	before := new(snapshot)
	if doc.Version > 0 {
		// A Check is to find in force what it is shown.
		if before, err = d.publish(doc); err != nil {
			return nil, failed("", err)
		}
	}
	// UTC also drops the reading of the monotonic clock, which would not be
	// stored.
	c := Change{At: d.now().UTC(), Actor: Actor(ctx), Operation: operation, Before: states(doc), Note: note(ctx)}
	if err := change(&doc, &c); err != nil {
		if _, ok := errors.AsType[refusal.Error](err); ok {
			return nil, err // the operator is to see its text as it is
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
	// Parse before the commit: what could not be used must not be stored.
	if then, err = newSnapshot(d.td, doc); err != nil {
		return nil, failed("", err)
	}
	// The caller may have been told long ago that the time is over.
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

// Wait returns when no mutation waits for its storage any more. It is for who
// has closed that.
func (d *Deployment) Wait() { d.mutations.Wait() }

func states(doc Document) map[string]State {
	out := make(map[string]State, len(doc.Records))
	for _, r := range doc.Records {
		out[r.ID] = r.State
	}
	return out
}

// publish makes a stored Document the one that is signed with, unless a newer
// one is already, and returns what follows from it.
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

// advance swaps the snapshot unless one that is as new is in place already.
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
