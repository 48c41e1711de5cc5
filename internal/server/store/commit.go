package store

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// maxCommit bounds the work of one commit, in operations. A change is never split.
const maxCommit = 4096

// op stores a value, or deletes it when value is nil.
type op struct {
	bucket string
	key    []byte
	value  []byte
}

// change is one caller's write.
type change struct {
	deployment string // empty for the federation bucket
	size       int    // approximate number of operations
	heartbeat  bool   // stores the heartbeat alone; there is no plan
	// plan reads the state that the change applies to and returns the operations. It
	// cannot write, so that a rejected change leaves nothing in the transaction that it
	// shares with others.
	plan func(v state) ([]op, error)

	// Set when done is closed.
	err      error
	panicked any // value of a panic in plan; write panics with it again
	done     chan struct{}
}

// state is the bucket of a change before the change.
type state struct{ bucket *bbolt.Bucket } // nil if it does not exist

// get returns the value under a key with its checksum, nil if there is none.
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

// write adds a change to the next commit and returns when it is durable. If ctx ends
// before a commit takes the change, it is not applied.
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

// run commits changes until stop is closed. The channel has no buffer, so that a change
// whose sender still waits was not taken.
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
				c.err = err // replaces plan's answer, which may refer to changes that failed
			}
			close(c.done)
		}
	}
}

// gather takes all changes that wait now, up to maxCommit.
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

// errNothing rolls back a transaction without changes.
var errNothing = errors.New("nothing to write")

func (s *Store) commit(batch []*change) error {
	if s.broken != nil {
		return s.broken
	}
	if err := s.syncHeader(); err != nil {
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
		// bbolt panicked: its state in memory is unknown.
		s.broken = s.writeError(fmt.Errorf("%w; all writes are rejected; %s", err, restore))
		s.log.Error("store damaged, all writes are rejected", "path", s.path, "error", err)
		return s.broken
	}
	return s.commitFailed(id, err)
}

// apply plans and writes the changes in order, each on top of those before it, and
// the heartbeat.
func (s *Store) apply(tx *bbolt.Tx, batch []*change) error {
	deployments := tx.Bucket(bucketDeployments)
	wrote := false
	for _, c := range batch {
		if c.heartbeat {
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
		if err := applyOps(b, ops); err != nil {
			return err
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
	return errors.Join(s.correctRestore(about, c), about.Put(keyHeartbeat, packTime(keyHeartbeat, c.Heartbeat())))
}

// applyOps carries out operations on the bucket of a deployment, or of the federation.
func applyOps(b *bbolt.Bucket, ops []op) error {
	for _, o := range ops {
		bucket := b.Bucket([]byte(o.bucket))
		if o.bucket == audit {
			bucket.FillPercent = 1 // its keys ascend, so that no page gets another one later
		}
		if o.value == nil {
			if err := bucket.Delete(o.key); err != nil {
				return err
			}
		} else if err := bucket.Put(o.key, o.value); err != nil {
			return err
		}
	}
	return nil
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

// commitFailed finds out whether a commit that returned an error was applied, and
// completes it if so.
//
// bbolt syncs the data, writes the header and syncs that. If only the last step fails,
// the commit is visible but may be lost in a crash. The kernel reports such an error
// once, so that another sync alone could succeed without effect: the header has to be
// written again.
func (s *Store) commitFailed(id int, err error) error {
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
	s.headerDirty = true
	if again := s.syncHeader(); again != nil {
		return s.writeError(fmt.Errorf("%w; a crash may undo the change until a later write succeeds", again))
	}
	s.log.Warn("commit completed at the second attempt", "path", s.path, "error", err)
	return nil
}

// syncHeader makes the last commit durable if its header may not be on the disk.
// Nothing else may be written before: it would reuse pages that the commit freed, and
// the header on the disk may still refer to them.
func (s *Store) syncHeader() error {
	if !s.headerDirty {
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
	s.headerDirty = false
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
