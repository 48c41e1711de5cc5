package store

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// maxCommit bounds the work of one commit, in operations; one change is never
// divided.
const maxCommit = 4096

// op stores a value, or deletes it when value is nil.
type op struct {
	bucket string
	key    []byte
	value  []byte
}

// change is what one caller wants to have written.
type change struct {
	deployment string // empty: what belongs to none
	size       int    // about how many operations it makes
	beat       bool   // it is only for the heartbeat, and has no plan
	// plan looks at the state that the change is to be applied to and returns
	// the operations. It cannot write, so that a change that is refused leaves
	// nothing in the transaction that it shares with others.
	plan func(v state) ([]op, error)

	// Set when done is closed.
	err      error
	panicked any // by plan; goes on in the caller
	done     chan struct{}
}

// state is a deployment, or what belongs to none, as a change finds it.
type state struct{ bucket *bbolt.Bucket } // nil when it is not there yet

// get returns the payload under a key, nil when there is none.
func (v state) get(bucket string, key []byte) (value []byte, err error) {
	if v.bucket == nil {
		return nil, nil
	}
	err = guard(func() error {
		value = v.bucket.Bucket([]byte(bucket)).Get(key)
		return nil
	})
	return value, err
}

// write hands a change over to the next commit and returns when it is durable.
// When ctx ends before the change was taken, it will not be applied.
func (d *Deployment) write(ctx context.Context, size int, plan func(v state) ([]op, error)) error {
	if d.name == "" {
		return errors.New("the deployment has no name")
	}
	return d.s.write(ctx, &change{deployment: d.name, size: size, plan: plan, done: make(chan struct{})})
}

func (s *Store) write(ctx context.Context, c *change) error {
	if s.db.IsReadOnly() {
		return fmt.Errorf("write store %s: %w", s.path, ErrReadOnly)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case s.changes <- c:
	case <-ctx.Done():
		return fmt.Errorf("write store %s: %w; nothing was changed", s.path, ctx.Err())
	case <-s.stop:
		return fmt.Errorf("write store %s: %w", s.path, ErrClosed)
	}
	<-c.done
	if c.panicked != nil {
		panic(c.panicked)
	}
	return c.err
}

// run commits what is handed over until stop is closed. The channel has no
// buffer: who waits to send is who has not been taken.
func (s *Store) run() {
	defer close(s.stopped)
	for {
		var batch []*change
		select {
		case c := <-s.changes:
			batch = s.gather(c)
		case <-s.stop:
			return
		}
		err := s.commit(batch)
		for _, c := range batch {
			if err != nil {
				// What plan saw and answered may not have come to be.
				c.err = err
			}
			close(c.done)
		}
	}
}

// gather takes all that wait at this moment.
func (s *Store) gather(first *change) []*change {
	batch, size := []*change{first}, first.size
	for size < maxCommit {
		select {
		case c := <-s.changes:
			batch, size = append(batch, c), size+c.size
		default:
			return batch
		}
	}
	return batch
}

// errNothing ends a transaction that nothing was written in.
var errNothing = errors.New("nothing to write")

func (s *Store) commit(batch []*change) error {
	if s.broken != nil {
		return s.broken
	}
	if err := s.settle(); err != nil {
		return s.writeError(err)
	}
	var id int
	finished := false
	err := guard(func() error {
		err := s.update(func(tx *bbolt.Tx) error {
			id = tx.ID()
			return s.apply(tx, batch)
		})
		finished = true
		return err
	})
	switch {
	case err == nil, errors.Is(err, errNothing):
		return nil
	case !finished:
		// Whether bbolt is still fit to write is unknown.
		s.broken = s.writeError(fmt.Errorf("%w; nothing more is written; %s", err, restore))
		s.log.Error("the store is damaged, nothing more is written", "file", s.path, "error", err)
		return s.broken
	}
	return s.failed(id, err)
}

// apply plans and writes one change after the other, each on top of the ones
// before it, and the heartbeat.
func (s *Store) apply(tx *bbolt.Tx, batch []*change) error {
	deployments := tx.Bucket(bucketDeployments)
	wrote := false
	for _, c := range batch {
		if c.beat {
			wrote = true
			continue
		}
		b := tx.Bucket(bucketFederation)
		if c.deployment != "" {
			b = deployments.Bucket([]byte(c.deployment))
		}
		ops := c.run(state{b})
		if len(ops) == 0 {
			continue
		}
		wrote = true
		if b == nil {
			var err error
			if c.deployment == "" {
				b, err = newFederation(tx)
			} else {
				b, err = newDeployment(deployments, c.deployment)
			}
			if err != nil {
				return err
			}
		}
		for _, o := range ops {
			bucket := b.Bucket([]byte(o.bucket))
			if o.value == nil {
				if err := bucket.Delete(o.key); err != nil {
					return err
				}
			} else if err := bucket.Put(o.key, o.value); err != nil {
				return err
			}
		}
	}
	if !wrote {
		return errNothing
	}
	c := s.clock.Load()
	if c == nil {
		return nil
	}
	about := tx.Bucket(bucketAbout)
	return errors.Join(s.correct(about, c), about.Put(keyHeartbeat, packTime(keyHeartbeat, c.Heartbeat())))
}

func (c *change) run(v state) (ops []op) {
	defer func() {
		if c.panicked = recover(); c.panicked != nil {
			ops = nil
		}
	}()
	ops, c.err = c.plan(v)
	if c.err != nil {
		return nil
	}
	return ops
}

func newDeployment(deployments *bbolt.Bucket, name string) (*bbolt.Bucket, error) {
	b, err := deployments.CreateBucket([]byte(name))
	if err != nil {
		return nil, err
	}
	for _, inner := range buckets {
		if _, err := b.CreateBucket([]byte(inner)); err != nil {
			return nil, err
		}
	}
	return b, b.Put(keyName, pack(keyName, []byte(name)))
}

// failed says what has become of a commit that returned an error.
//
// bbolt syncs the data, writes the header and syncs that. When only the last
// step fails, the commit can be seen already and yet may be gone after a crash.
// The kernel reports such an error once, so another sync alone would prove
// nothing: the header has to be written again.
func (s *Store) failed(id int, err error) error {
	visible := 0
	if err := guard(func() error {
		return s.db.View(func(tx *bbolt.Tx) error { visible = tx.ID(); return nil })
	}); err != nil {
		s.broken = s.writeError(err)
		return s.broken
	}
	if visible < id || id == 0 {
		return s.writeError(fmt.Errorf("%w; nothing was changed", err))
	}
	s.unsettled = true
	if again := s.settle(); again != nil {
		return s.writeError(fmt.Errorf("%w; whether the change outlives a crash is open until a later one succeeds", again))
	}
	s.log.Warn("a commit was completed at the second attempt", "file", s.path, "error", err)
	return nil
}

// settle makes a commit durable whose header may not have reached the disk.
// Before that nothing else may be written: the pages that the commit gave up
// would be used again, and the header on the disk may still need them.
func (s *Store) settle() error {
	if !s.unsettled {
		return nil
	}
	var id int
	if err := s.db.View(func(tx *bbolt.Tx) error { id = tx.ID(); return nil }); err != nil {
		return err
	}
	header := make([]byte, s.db.Info().PageSize)
	at := int64(id%2) * int64(len(header))
	if _, err := s.file.ReadAt(header, at); err != nil {
		return err
	}
	if _, err := s.file.WriteAt(header, at); err != nil {
		return err
	}
	if err := unix.Fdatasync(int(s.file.Fd())); err != nil {
		return err
	}
	s.unsettled = false
	return nil
}

func (s *Store) writeError(err error) error {
	for _, full := range []syscall.Errno{syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG} {
		if errors.Is(err, full) {
			return fmt.Errorf("write store %s: %w; make room for it", s.path, err)
		}
	}
	return fmt.Errorf("write store %s: %w", s.path, err)
}
