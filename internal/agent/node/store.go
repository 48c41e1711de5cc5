package node

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
)

// The files of a [Store].
const (
	identityFile  = "identity.json" // key and agent SVID together, so that they always match
	bundleFile    = "bundle.json"
	federatedFile = "federated.json"
	seedFile      = "seed"
	lockFile      = "lock"
)

// IdentityFile is the one of [Files] that has the agent SVID.
const IdentityFile = identityFile

// Files are the files that a [Store] keeps, the most precious first.
var Files = []string{identityFile, bundleFile, federatedFile, seedFile}

// CorruptError says that a file of the store cannot be read as what it should
// be. Nothing was changed.
type CorruptError struct {
	Path   string
	Remedy string
	Err    error
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("%s is corrupt (%v): %s", e.Path, e.Err, e.Remedy)
}

// Unwrap returns what is wrong with the file.
func (e *CorruptError) Unwrap() error { return e.Err }

// errNewer says that a file was written by a newer version of the agent. Such a
// file is whole.
var errNewer = errors.New("a newer version of the agent has written it")

// Store keeps what a node must not lose over a restart: its identity, the last
// trust bundles, and a seed. The folder has mode 0700 and its files 0600; they
// are replaced atomically. One process at a time can have the folder open.
//
// What is loaded or saved becomes what is to be on disk. [Store.Sync] brings the
// disk to it, however the two came to differ: a write that failed, a file that
// somebody removed, a folder that was replaced. [Store.Run] does so until it is
// told to end. Methods may be called concurrently.
type Store struct {
	dir   string
	log   *slog.Logger
	wake  chan struct{}
	fresh bool

	// turn is held (by a value in it) by whoever reads or writes the disk. It
	// guards what follows it up to mu.
	turn    chan struct{}
	folder  *folder
	closed  bool
	failing time.Time // since when a Sync fails; zero when the last did not

	mu          sync.Mutex
	files       map[string]kept
	stored      []*Identity // see Stored
	syncing     time.Time   // since when a Sync is under way; zero when none is
	folderErr   error       // why the folder cannot be used now
	identityErr error       // why the last identity could not be saved
}

// kept is one file: what is to be in it, and whether it is.
type kept struct {
	generation uint64                 // another one each time that encode changes
	encode     func() ([]byte, error) // nil: the file is not to be there
	identity   *Identity              // what encode encodes, of identityFile
	stamp      stamp                  // of the file as it was last read or written here
	// since is when encode became what is to be there, while it is not known to
	// be; zero afterwards.
	since time.Time
	err   error // of the last try to write it
}

// OpenStore opens the folder dir and makes it when it is missing. Permissions
// that let others in are tightened. It fails when the folder belongs to
// another user or is open in another process. log may be nil.
func OpenStore(dir string, log *slog.Logger) (*Store, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	f, err := openFolder(dir)
	if err != nil {
		return nil, err
	}
	s := &Store{
		dir: dir, log: log, folder: f, files: make(map[string]kept), fresh: true,
		turn: make(chan struct{}, 1), wake: make(chan struct{}, 1),
	}
	for _, file := range Files {
		if at, err := f.stamp(file); at != (stamp{}) || err != nil {
			s.fresh = false
		}
	}
	return s, nil
}

// Fresh reports whether the folder had none of [Files] when it was opened: no agent
// has used it before.
func (s *Store) Fresh() bool { return s.fresh }

// Close writes what is still to be written, as Sync does, and gives the folder
// free. The Store is of no use afterwards.
func (s *Store) Close() error {
	_ = s.Sync() // logged
	s.turn <- struct{}{}
	defer func() { <-s.turn }()
	if s.closed {
		return errClosed
	}
	s.closed = true
	return s.folder.close()
}

// LoadIdentity returns the identity kept, nil when there is none. A file that
// cannot be read as an identity is a [CorruptError], and stays as it is.
func (s *Store) LoadIdentity() (*Identity, error) {
	s.turn <- struct{}{}
	defer func() { <-s.turn }()
	b, at, err := s.folder.read(identityFile)
	if at == (stamp{}) || err != nil {
		return nil, err
	}
	id, err := decodeIdentity(b)
	if errors.Is(err, errNewer) {
		return nil, fmt.Errorf("%s: %w: install that version again, or move the file away and re-attest, with a new join token for instance", s.folder.name(identityFile), err)
	}
	if err != nil {
		return nil, &CorruptError{s.folder.name(identityFile), "move it away and re-attest, with a new join token for instance", err}
	}
	s.keep(identityFile, kept{identity: id, encode: func() ([]byte, error) { return encodeIdentity(id) }, stamp: at})
	s.noteStored(id)
	return id, nil
}

// Stored returns the identities one of which a restart would find on disk, as far as
// is known: while one is being written, and after a write that failed, it may be that
// or the one before. It does no I/O.
func (s *Store) Stored() []*Identity {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.stored)
}

// noteStored adds an identity to those that may be on disk.
func (s *Store) noteStored(id *Identity) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if id != nil && !slices.Contains(s.stored, id) {
		s.stored = append(s.stored, id)
	}
}

// SaveIdentity has id on disk, in place of the identity kept before, when it
// returns nil. When it cannot be written the one before remains what is to be
// on disk, unless insist is set: then it is id, and a later Sync writes it.
//
// It returns soon also when the disk does not answer, which is an error like any
// other: while the agent SVID is on its way much else waits.
func (s *Store) SaveIdentity(id *Identity, insist bool) error {
	encode := func() ([]byte, error) { return encodeIdentity(id) }
	if err := s.take(); err != nil {
		s.noteIdentity(err)
		if insist {
			s.wantIdentity(id, encode)
		}
		return err
	}
	before := s.file(identityFile)
	s.wantIdentity(id, encode)
	written := make(chan error, 1)
	go func() { // has the turn, for which Close waits
		defer func() { <-s.turn }()
		err := s.write(identityFile)
		s.noteIdentity(err)
		if err != nil && !insist {
			s.keep(identityFile, before)
		}
		written <- err
	}()
	select {
	case err := <-written:
		return err
	case <-time.After(answerLimit):
		if !insist {
			s.wantIdentity(before.identity, before.encode) // in place of what may get there yet
		}
		return errHangs
	}
}

func (s *Store) noteIdentity(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.identityErr = err
}

// take waits for the turn, unless the disk does not answer whoever has it.
func (s *Store) take() error {
	select {
	case s.turn <- struct{}{}:
		return nil
	case <-time.After(answerLimit):
		return errHangs
	}
}

// WipeIdentity removes the identity kept, if any. When that fails a later Sync
// removes it.
func (s *Store) WipeIdentity() error {
	s.wantIdentity(nil, nil)
	if err := s.take(); err != nil {
		return err
	}
	defer func() { <-s.turn }()
	return s.write(identityFile)
}

// leaveIdentity makes the identity file none of the Store's business, until one
// is saved.
func (s *Store) leaveIdentity() {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.files, identityFile)
	s.stored = nil
}

// LoadBundle returns the trust bundle kept, with its taint marks and their
// times, nil when there is none, and the names of the authorities that are no news
// when the operator gives them, nil when that is not known. A file that cannot be
// read is moved aside, as the log says, and is none: the server has what was in it.
func (s *Store) LoadBundle() (b *bundle.Bundle, adopted []string) {
	s.load(bundleFile,
		func(raw []byte) (err error) { b, adopted, err = decodeBundle(raw); return err },
		func() ([]byte, error) { return encodeBundle(b, adopted) })
	return b, adopted
}

// SaveBundle makes b the trust bundle that is to be on disk, and adopted the
// names beside it. [Store.Run] is woken to write them.
func (s *Store) SaveBundle(b *bundle.Bundle, adopted []string) {
	s.want(bundleFile, func() ([]byte, error) { return encodeBundle(b, adopted) })
	s.notify()
}

// LoadFederated returns the federated bundles kept, nil when there are none. A
// file that cannot be read is moved aside as by LoadBundle.
func (s *Store) LoadFederated() (bundles map[spiffeid.TrustDomain]*bundle.Bundle) {
	s.load(federatedFile,
		func(raw []byte) (err error) { bundles, err = decodeBundles(raw); return err },
		func() ([]byte, error) { return encodeBundles(bundles) })
	return bundles
}

// SaveFederated makes bundles the federated bundles that are to be on disk.
// [Store.Run] is woken to write them. The map must not be changed afterwards.
func (s *Store) SaveFederated(bundles map[spiffeid.TrustDomain]*bundle.Bundle) {
	s.want(federatedFile, func() ([]byte, error) { return encodeBundles(bundles) })
	s.notify()
}

// Seed returns random bytes that are this node's own: made at the first call
// in the life of the folder, the same ever after. A file that cannot be read is
// moved aside, and a new seed made.
func (s *Store) Seed() (seed [32]byte) {
	encode := func() ([]byte, error) { return seed[:], nil }
	if s.load(seedFile, func(raw []byte) error {
		if len(raw) != len(seed) {
			return fmt.Errorf("it has %d bytes instead of %d", len(raw), len(seed))
		}
		copy(seed[:], raw)
		return nil
	}, encode) {
		return seed
	}
	rand.Read(seed[:]) // never fails
	made := seed
	s.want(seedFile, func() ([]byte, error) { return made[:], nil })
	s.turn <- struct{}{}
	defer func() { <-s.turn }()
	_ = s.write(seedFile) // a later Sync tries again
	return seed
}

// load reads a file and gives it to decode. It reports whether there was one
// that could be decoded; encode then makes the same content again.
func (s *Store) load(file string, decode func([]byte) error, encode func() ([]byte, error)) bool {
	s.turn <- struct{}{}
	defer func() { <-s.turn }()
	b, at, err := s.folder.read(file)
	if at == (stamp{}) && err == nil {
		return false
	}
	if err == nil {
		err = decode(b)
	}
	if err == nil {
		s.keep(file, kept{encode: encode, stamp: at})
		return true
	}
	why := "corrupt"
	if errors.Is(err, errNewer) {
		why = "newer"
	}
	to, asideErr := s.folder.setAside(file, why, time.Now())
	if asideErr != nil {
		s.log.Warn("stored file is "+why+", going on without it", "file", s.folder.name(file), "error", errors.Join(err, asideErr))
	} else {
		s.log.Warn("stored file is "+why+", moved aside, going on without it", "file", s.folder.name(file), "moved_to", to, "error", err)
	}
	return false
}

// writable checks that an identity could be saved now.
func (s *Store) writable() error {
	if err := s.take(); err != nil {
		return err
	}
	defer func() { <-s.turn }()
	if err := s.follow(); err != nil {
		return err
	}
	return s.folder.probe()
}

// setAside moves the identity file out of the way and returns where it is now.
func (s *Store) setAside(now time.Time) (string, error) {
	s.turn <- struct{}{}
	defer func() { <-s.turn }()
	return s.folder.setAside(identityFile, "corrupt", now)
}

// want makes what encode returns, or no file at all, what is to be on disk.
func (s *Store) want(file string, encode func() ([]byte, error)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.files[file]
	s.files[file] = kept{generation: k.generation + 1, encode: encode, stamp: k.stamp, since: time.Now()}
}

func (s *Store) wantIdentity(id *Identity, encode func() ([]byte, error)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.files[identityFile]
	s.files[identityFile] = kept{generation: k.generation + 1, identity: id, encode: encode, stamp: k.stamp, since: time.Now()}
}

func (s *Store) keep(file string, k kept) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.files[file] = k
}

func (s *Store) file(file string) kept {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.files[file]
}

func (s *Store) notify() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Run brings the disk to what it should be until ctx is done: whenever
// something is saved, and every few seconds.
func (s *Store) Run(ctx context.Context) error {
	for {
		_ = s.Sync() // logged, and tried again
		select {
		case <-ctx.Done():
			return nil
		case <-s.wake:
		case <-time.After(syncInterval):
		}
	}
}
