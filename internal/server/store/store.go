// Package store stores the durable state of the signing server in one file:
// keysets with their signing keys, the audit log, agents, join tokens, entries
// and the issuance ledger, of one or several deployments of one trust domain.
//
// The file is a bbolt database. There is one server, it looks everything up by
// key, and it must know when a write is durable. bbolt provides that in pure Go.
// It has one writer at a time, so that compare-and-swap costs nothing, and readers
// never wait for it. It writes new pages beside the old ones and switches to them
// with one header, so that a crash leaves the state before a commit or after it.
// etcd has run on it for a decade. No query here needs an SQL engine.
//
//	about                 store: format version and trust domain
//	                      copied_at: in a copy only, when it was taken
//	                      restored: for each restore, what is not known because of it,
//	                      until all of that has expired
//	                      heartbeat: when the last commit was made
//	deployments
//	  NAME                name: NAME again
//	    keysets           document: all keysets; private keys are sealed
//	    audit             number -> record
//	    agents            SPIFFE ID -> agent
//	    tokens            SHA-256 of the token -> token, sealed
//	    entries           entry ID -> entry
//	    ledger            authority, agent, entry -> not after
//	    jwt               key ID -> latest expiry
//	federation            of a server that federates with other trust domains
//	  bundles             trust domain -> its bundle
//
// Each value ends with a checksum over its key and itself. [Open] checks everything
// before anything is used: the structure of the file, each checksum, and that each
// signing key can be decrypted. A file that passes is complete. An Open that fails
// never changes the file.
//
// Open compacts a file of which more than half is free. See [Store.Backup] for
// copies, which are compacted likewise.
//
// Writes share commits. One goroutine takes all waiting changes, applies them in
// one transaction and syncs once, so 64 writers cost little more than one. A single
// writer never waits for others, as it would with bbolt's own Batch. A rejected change
// fails alone. If a commit fails, all its changes fail and none of them is stored.
// After a failed write, such as on a full disk, reads succeed and the next write is
// tried as usual.
package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/config"
	"github.com/renewd/renewd/internal/server/seal"
)

// The causes of failures. They are wrapped in errors that name the file and the
// remedy.
var (
	ErrInUse    = errors.New("another process has it open")
	ErrDamaged  = config.Permanent(errors.New("the file is damaged"))
	ErrReadOnly = errors.New("the store was opened for reading only")
	ErrClosed   = errors.New("the store is closed")
)

// Options are the options of [Open]. TrustDomain and Seal are required.
type Options struct {
	// TrustDomain is stored when the file is created, and must not change afterwards.
	TrustDomain spiffeid.TrustDomain
	// Seal encrypts signing keys.
	Seal seal.Manager
	// ReadOnly opens an existing file, shared with other readers.
	ReadOnly bool
	// Log is slog's discard handler when nil.
	Log *slog.Logger
	// Now is the clock; time.Now when nil.
	Now func() time.Time

	temporary bool // nothing is synced
}

// Store is an open file. All methods may be called concurrently.
type Store struct {
	path  string
	td    spiffeid.TrustDomain
	seal  seal.Manager
	log   *slog.Logger
	now   func() time.Time
	clock atomic.Pointer[clock.Clock] // see SetClock
	file  *os.File
	db    *bbolt.DB

	format    int           // see formatVersion
	heartbeat time.Time     // of the last commit before Open
	copied    time.Time     // when this copy was taken; zero for a store in use
	restored  []restored    // what is not known, by restore
	adopted   bool          // the last restore is of this Open
	copying   chan struct{} // semaphore of Backup
	reading   chan struct{} // semaphore of view

	changes chan *change
	stop    chan struct{}
	stopped chan struct{}

	// The rest is owned by the committing goroutine, and after it by Close.

	update      func(func(*bbolt.Tx) error) error // db.Update
	headerDirty bool                              // see syncHeader
	broken      error                             // set: every write fails with it
}

// Close waits for the commit in flight, fails waiting writes, and closes the file. It
// must be called once.
func (s *Store) Close() error {
	close(s.stop)
	<-s.stopped
	if s.broken != nil {
		// bbolt may still hold its writer's lock, so its Close could block for ever.
		// Unlock the file explicitly, because its mapping would keep the lock.
		return errors.Join(unix.Flock(int(s.file.Fd()), unix.LOCK_UN), s.file.Close())
	}
	return s.db.Close()
}

// Heartbeat returns when the last commit before [Open] was made, by a clock that was not
// in doubt ([clock.Clock.Heartbeat]); zero if that is not known.
func (s *Store) Heartbeat() time.Time { return s.heartbeat }

// SetClock sets the clock whose heartbeat every later commit stores for the next process
// ([clock.Clock.Heartbeat]). Earlier commits leave the stored heartbeat as it is.
func (s *Store) SetClock(c *clock.Clock) { s.clock.Store(c) }

// StoreHeartbeat commits the heartbeat alone.
func (s *Store) StoreHeartbeat(ctx context.Context) error {
	return s.write(ctx, &change{heartbeat: true, size: 1, done: make(chan struct{})})
}

// Deployment returns the part of the store that belongs to a deployment. The first
// write creates it.
func (s *Store) Deployment(name string) *Deployment { return &Deployment{s: s, name: name} }

// Deployments returns the names of all deployments in the store, sorted.
func (s *Store) Deployments(ctx context.Context) ([]string, error) {
	var names []string
	err := s.view(ctx, func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketDeployments).ForEachBucket(func(name []byte) error {
			names = append(names, string(name))
			return nil
		})
	})
	return names, err
}

// Deployment stores everything of one deployment. It implements keyset.Storage,
// spireapi.Storage and ledger.Storage, and is safe for concurrent use.
type Deployment struct {
	s    *Store
	name string
}

// maxReads bounds concurrent reads. A read of a disk that hangs blocks a thread of the
// operating system, and their number is limited.
const maxReads = 64

// view calls fn with one consistent state of the store. fn must not call view. A disk
// that fails under the mapped file causes an error, not a crash.
func (s *Store) view(ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case s.reading <- struct{}{}:
		defer func() { <-s.reading }()
	case <-ctx.Done():
		return fmt.Errorf("read store %s: %w", s.path, ctx.Err())
	}
	err := guard(func() error { return s.db.View(fn) })
	return s.readError(err)
}

// read is view for one deployment. It does not call fn if the store has no such
// deployment.
func (d *Deployment) read(ctx context.Context, fn func(b *bbolt.Bucket) error) error {
	return d.s.view(ctx, func(tx *bbolt.Tx) error {
		if b := tx.Bucket(bucketDeployments).Bucket([]byte(d.name)); b != nil {
			return fn(b)
		}
		return nil
	})
}

func (s *Store) readError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, bolterrors.ErrDatabaseNotOpen):
		err = ErrClosed
	case errors.Is(err, ErrDamaged):
		err = fmt.Errorf("%w; %s", err, restore)
	}
	return fmt.Errorf("read store %s: %w", s.path, err)
}

// guard turns panics and memory faults into errors: bbolt has both on a damaged file.
func guard(fn func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", ErrDamaged, p)
		}
	}()
	return fn()
}

// restore is the remedy for damage.
const restore = "keep the file for inspection and restore a backup"
