// Package store keeps what the signing server must not lose in one file:
// keysets with their signing keys, the audit log, agents, join tokens, entries
// and the issuance ledger, of one or several deployments of one trust domain.
//
// The file is a bbolt database. There is one server, it looks everything up by
// key, and it must know when a write is durable. bbolt gives exactly that in
// pure Go: one writer at a time, so that compare-and-swap costs nothing; readers
// that never wait for it; pages that are written beside the old ones and take
// effect with one header, so that a crash leaves one side of a commit or the
// other. etcd has run on it for a decade. There is no query that would be worth
// an SQL engine.
//
//	about                 store: format version and trust domain
//	                      copied_at: of a copy, when it was taken
//	                      restored: of what was a copy, what is not known since, once
//	                      for each restore until all of that has expired
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
//	federation            of a server that follows other trust domains
//	  bundles             trust domain -> its bundle
//
// Each value ends with a checksum over its key and itself. [Open] looks at
// everything before anything is used: the structure of the file, each checksum,
// and that each signing key can be opened. What passes is whole, and the file is
// never changed by an Open that fails.
//
// A file of which more than half is free is compacted by Open. See [Store.Backup] for
// copies, which are compacted likewise.
//
// Writes share commits. One goroutine takes all changes that wait, makes one
// transaction of them and syncs once, so 64 writers cost little more than one,
// and a writer that is alone never waits for company, as it would with bbolt's
// own Batch. A change fails alone when it is refused, and with its commit when
// that fails; then nothing of it was kept. After a failed write, such as on a
// full disk, reading goes on and the next write is tried as if nothing was.
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
	"github.com/renewd/renewd/internal/server/seal"
)

// The errors that tell one cause from another. They come wrapped, with the file
// and what to do.
var (
	ErrInUse    = errors.New("another process has it open")
	ErrDamaged  = errors.New("the file is damaged")
	ErrReadOnly = errors.New("the store was opened for reading only")
	ErrClosed   = errors.New("the store is closed")
)

// Options say how to open a store. TrustDomain and Seal are required.
type Options struct {
	// TrustDomain is stored when the file is made, and must be the same ever
	// after.
	TrustDomain spiffeid.TrustDomain
	// Seal encrypts signing keys.
	Seal seal.Manager
	// ReadOnly opens a file that exists, next to others who read it.
	ReadOnly bool
	// Log is slog's discard handler when nil.
	Log *slog.Logger
	// Now is the clock; time.Now when nil.
	Now func() time.Time
}

// Store is an open file. All methods may be called concurrently.
type Store struct {
	path  string
	td    spiffeid.TrustDomain
	seal  seal.Manager
	log   *slog.Logger
	now   func() time.Time
	clock atomic.Pointer[clock.Clock] // see Follow
	file  *os.File
	db    *bbolt.DB

	format    int           // see formatVersion
	heartbeat time.Time     // of the last commit before it was opened
	copied    time.Time     // when this copy was taken; zero of a store in use
	restored  []restored    // what is not known of it, by restore
	tookOver  bool          // the last one is of this Open
	copying   chan struct{} // held by who is in Backup
	reading   chan struct{} // held by each of those who are in view

	changes chan *change
	stop    chan struct{}
	stopped chan struct{}

	// The rest belongs to the committing goroutine, and after it to Close.

	update    func(func(*bbolt.Tx) error) error // db.Update
	unsettled bool                              // see settle
	broken    error                             // writing is over
}

// Close waits for the commit in flight, refuses those that wait, and closes the
// file. It must be called once.
func (s *Store) Close() error {
	close(s.stop)
	<-s.stopped
	if s.broken != nil {
		// bbolt may still hold its writer's lock and would wait for ever. The
		// mapping would keep the file's lock.
		return errors.Join(unix.Flock(int(s.file.Fd()), unix.LOCK_UN), s.file.Close())
	}
	return s.db.Close()
}

// Heartbeat is when the last commit was made before the store was opened, by a clock
// that was not in doubt ([clock.Clock.Heartbeat]); zero when that is not known.
func (s *Store) Heartbeat() time.Time { return s.heartbeat }

// Follow has each commit from now on keep the time of a clock for the next process
// ([clock.Clock.Heartbeat]). Before it commits keep the time that they find.
func (s *Store) Follow(c *clock.Clock) { s.clock.Store(c) }

// Beat makes a commit of nothing but the heartbeat.
func (s *Store) Beat(ctx context.Context) error {
	return s.write(ctx, &change{beat: true, size: 1, done: make(chan struct{})})
}

// Deployment returns the part of the store that belongs to a deployment. It
// comes into being with the first write.
func (s *Store) Deployment(name string) *Deployment { return &Deployment{s: s, name: name} }

// Deployments returns the names of all deployments that something was written
// for, sorted.
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

// Deployment keeps everything of one deployment. It implements keyset.Storage,
// spireapi.Storage and ledger.Storage, and is safe for concurrent use.
type Deployment struct {
	s    *Store
	name string
}

// maxReading is how many read at a time. A read of a disk that is stuck keeps a thread of
// the operating system, and a process may not have any number of them.
const maxReading = 64

// view runs fn in one consistent state of the store, which must not call view. A disk
// that fails under the mapped file becomes an error.
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

// read is view for one deployment; fn is not called when it is not there yet.
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

// guard turns the ways in which bbolt meets a damaged file, panics and memory
// faults, into errors.
func guard(fn func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", ErrDamaged, p)
		}
	}()
	return fn()
}

// restore is what to do about damage.
const restore = "keep the file for inspection and put a backup of it in its place"
