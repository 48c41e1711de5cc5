package node

import (
	"cmp"
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
	"github.com/renewd/renewd/internal/config"
	"github.com/renewd/renewd/internal/loglimit"
)

// The files of a [Store].
const (
	identityFile  = "identity.json" // key and agent SVID together, so that they always match
	bundleFile    = "bundle.json"
	federatedFile = "federated.json"
	seedFile      = "seed"
	lockFile      = "lock"
)

// Files are the files of a [Store], the most important first.
var Files = []string{identityFile, bundleFile, federatedFile, seedFile}

// CorruptError means that the content of a file in the store is invalid. The file was
// not changed.
type CorruptError struct {
	Path   string
	Remedy string
	Err    error
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("%s is corrupt (%v): %s", e.Path, e.Err, e.Remedy)
}

// Unwrap returns the cause.
func (e *CorruptError) Unwrap() error { return e.Err }

// errNewer means that a newer version of the agent has written the file. Such a file
// is not corrupt.
var errNewer = errors.New("a newer version of the agent has written it")

// Store stores what a node needs after a restart: its identity, the last trust
// bundles, and a seed. The folder has mode 0700 and its files 0600. Files are replaced
// atomically. One process at a time can have the folder open.
//
// What was loaded or saved last is the wanted content of the folder. [Store.Sync]
// writes whatever differs from it: after a failed write, a removed file or a replaced
// folder. [Store.Run] does so until its context is done. A Store is safe for
// concurrent use.
type Store struct {
	dir      string
	log      *slog.Logger
	lines    *loglimit.Log // of Sync
	wake     chan struct{}
	wasEmpty bool

	// diskLock is a lock (a value in it holds it) for reading and writing the disk.
	// It guards the fields up to mu. Unlike a mutex it can be given up after a time.
	diskLock chan struct{}
	folder   *folder
	closed   bool

	mu          sync.Mutex
	files       map[string]fileState
	stored      []*Identity // see Stored
	syncing     time.Time   // start of the Sync in progress; zero when there is none
	folderErr   error       // why the folder cannot be used now
	identityErr error       // why the last identity was not saved
}

// fileState is the wanted content of one file, and whether it is on disk.
type fileState struct {
	generation uint64                 // counts the changes of encode
	encode     func() ([]byte, error) // nil: the file is to be removed
	identity   *Identity              // what encode encodes, of identityFile
	stamp      stamp                  // of the file as it was last read or written here
	// since is when encode was set, until its content is known to be on disk; zero
	// afterwards.
	since time.Time
	err   error // of the last attempt to write the file
}

// OpenStore opens the folder dir and creates it if it is missing. It removes the
// permissions of group and others. It fails when the folder belongs to another user
// or is open in another process. log may be nil.
func OpenStore(dir string, log *slog.Logger) (*Store, error) {
	log = cmp.Or(log, slog.New(slog.DiscardHandler))
	f, err := openFolder(dir)
	if err != nil {
		return nil, err
	}
	s := &Store{
		dir: dir, log: log, lines: loglimit.New(log, loglimit.Interval, 1), folder: f, files: make(map[string]fileState), wasEmpty: true,
		diskLock: make(chan struct{}, 1), wake: make(chan struct{}, 1),
	}
	for _, file := range Files {
		if at, err := f.stamp(file); at != (stamp{}) || err != nil {
			s.wasEmpty = false
		}
	}
	return s, nil
}

// WasEmpty reports whether the folder had none of [Files] when it was opened: this is
// the first start of the agent.
func (s *Store) WasEmpty() bool { return s.wasEmpty }

// Close syncs the folder, unlocks and closes it.
func (s *Store) Close() error {
	_ = s.Sync() // logged
	s.diskLock <- struct{}{}
	defer func() { <-s.diskLock }()
	if s.closed {
		return errClosed
	}
	s.closed = true
	return s.folder.close()
}

// LoadIdentity returns the stored identity, nil when there is none. It fails with a
// [CorruptError] when the file is invalid, and leaves the file as it is.
func (s *Store) LoadIdentity() (*Identity, error) {
	s.diskLock <- struct{}{}
	defer func() { <-s.diskLock }()
	b, at, err := s.folder.read(identityFile)
	if at == (stamp{}) || err != nil {
		return nil, err
	}
	id, err := decodeIdentity(b)
	if errors.Is(err, errNewer) {
		return nil, config.Permanent(fmt.Errorf("%s: %w: install that version again, or move the file away and re-attest, with a new join token for instance", s.folder.pathOf(identityFile), err))
	}
	if err != nil {
		return nil, &CorruptError{s.folder.pathOf(identityFile), "move it away and re-attest, with a new join token for instance", err}
	}
	s.setFile(identityFile, fileState{identity: id, encode: func() ([]byte, error) { return encodeIdentity(id) }, stamp: at})
	s.addStored(id)
	return id, nil
}

// Stored returns the identities that may be on disk. There can be two: during a write,
// and after a failed one, the file may have the new identity or the one before. It
// does no I/O.
func (s *Store) Stored() []*Identity {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.stored)
}

// addStored adds an identity to those that may be on disk.
func (s *Store) addStored(id *Identity) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if id != nil && !slices.Contains(s.stored, id) {
		s.stored = append(s.stored, id)
	}
}

// SaveIdentity writes id to disk in place of the stored identity. If that fails, the
// stored identity stays the wanted one, unless retry is set: then a later Sync writes
// id.
//
// It returns an error soon when the disk does not answer, because other work waits
// for the renewal of the agent SVID.
func (s *Store) SaveIdentity(id *Identity, retry bool) error {
	encode := func() ([]byte, error) { return encodeIdentity(id) }
	if err := s.lockDisk(); err != nil {
		s.setIdentityErr(err)
		if retry {
			s.setIdentity(id, encode)
		}
		return err
	}
	before := s.file(identityFile)
	s.setIdentity(id, encode)
	written := make(chan error, 1)
	go func() { // holds diskLock, for which Close waits
		defer func() { <-s.diskLock }()
		err := s.writeLocked(identityFile)
		s.setIdentityErr(err)
		if err != nil && !retry {
			s.setFile(identityFile, before)
		}
		written <- err
	}()
	select {
	case err := <-written:
		return err
	case <-time.After(diskTimeout):
		if !retry {
			s.setIdentity(before.identity, before.encode) // the write may still succeed
		}
		return errDiskTimeout
	}
}

func (s *Store) setIdentityErr(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.identityErr = err
}

// lockDisk acquires diskLock. It fails when the disk does not answer the holder.
func (s *Store) lockDisk() error {
	select {
	case s.diskLock <- struct{}{}:
		return nil
	case <-time.After(diskTimeout):
		return errDiskTimeout
	}
}

// WipeIdentity removes the stored identity, if any. If that fails, a later Sync
// removes it.
func (s *Store) WipeIdentity() error {
	s.setIdentity(nil, nil)
	if err := s.lockDisk(); err != nil {
		return err
	}
	defer func() { <-s.diskLock }()
	return s.writeLocked(identityFile)
}

// ignoreIdentity leaves the identity file alone until an identity is saved.
func (s *Store) ignoreIdentity() {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.files, identityFile)
	s.stored = nil
}

// LoadBundle returns the stored trust bundle with its taints and their times, nil when
// there is none, and the fingerprints given to SaveBundle, nil when none were. A file
// that is corrupt or of a newer version is moved aside, logged, and counts as none:
// the server has the bundle.
func (s *Store) LoadBundle() (b *bundle.Bundle, adopted []string) {
	s.load(bundleFile,
		func(raw []byte) (err error) { b, adopted, err = decodeBundle(raw); return err },
		func() ([]byte, error) { return encodeBundle(b, adopted) })
	return b, adopted
}

// SaveBundle wakes [Store.Run] to write b, and with it the fingerprints of the
// authorities of trust_bundle_file that the agent already knows.
func (s *Store) SaveBundle(b *bundle.Bundle, adopted []string) {
	s.setContent(bundleFile, func() ([]byte, error) { return encodeBundle(b, adopted) })
	s.notify()
}

// LoadFederated returns the stored federated bundles, nil when there are none. It
// moves an unreadable file aside as LoadBundle does.
func (s *Store) LoadFederated() (bundles map[spiffeid.TrustDomain]*bundle.Bundle) {
	s.load(federatedFile,
		func(raw []byte) (err error) { bundles, err = decodeBundles(raw); return err },
		func() ([]byte, error) { return encodeBundles(bundles) })
	return bundles
}

// SaveFederated wakes [Store.Run] to write the federated bundles. The map must not be
// changed afterwards.
func (s *Store) SaveFederated(bundles map[spiffeid.TrustDomain]*bundle.Bundle) {
	s.setContent(federatedFile, func() ([]byte, error) { return encodeBundles(bundles) })
	s.notify()
}

// Seed returns the node's random bytes: generated at the first call, and read from the
// folder after that. An unreadable file is moved aside and a new seed generated.
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
	s.setContent(seedFile, func() ([]byte, error) { return made[:], nil })
	s.diskLock <- struct{}{}
	defer func() { <-s.diskLock }()
	_ = s.writeLocked(seedFile) // a later Sync retries
	return seed
}

// load reads a file and passes it to decode. It reports whether the file exists and
// was decoded. encode encodes the same content again.
func (s *Store) load(file string, decode func([]byte) error, encode func() ([]byte, error)) bool {
	s.diskLock <- struct{}{}
	defer func() { <-s.diskLock }()
	b, at, err := s.folder.read(file)
	if at == (stamp{}) && err == nil {
		return false
	}
	if err == nil {
		err = decode(b)
	}
	if err == nil {
		s.setFile(file, fileState{encode: encode, stamp: at})
		return true
	}
	why := "corrupt"
	if errors.Is(err, errNewer) {
		why = "newer"
	}
	to, asideErr := s.folder.moveAside(file, why, time.Now())
	if asideErr != nil {
		s.log.Warn("stored file not usable, continuing without it", "reason", why, "path", s.folder.pathOf(file), "error", errors.Join(err, asideErr))
	} else {
		s.log.Warn("stored file not usable, moved aside, continuing without it", "reason", why, "path", s.folder.pathOf(file), "moved_to", to, "error", err)
	}
	return false
}

// writable returns an error when an identity could not be saved now.
func (s *Store) writable() error {
	if err := s.lockDisk(); err != nil {
		return err
	}
	defer func() { <-s.diskLock }()
	if err := s.reopenLocked(); err != nil {
		return err
	}
	return s.folder.probe()
}

// moveCorruptIdentity moves the identity file aside and returns its new path.
func (s *Store) moveCorruptIdentity(now time.Time) (string, error) {
	s.diskLock <- struct{}{}
	defer func() { <-s.diskLock }()
	return s.folder.moveAside(identityFile, "corrupt", now)
}

// setContent makes the result of encode the wanted content of a file.
func (s *Store) setContent(file string, encode func() ([]byte, error)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.files[file]
	s.files[file] = fileState{generation: k.generation + 1, encode: encode, stamp: k.stamp, since: time.Now()}
}

func (s *Store) setIdentity(id *Identity, encode func() ([]byte, error)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.files[identityFile]
	s.files[identityFile] = fileState{generation: k.generation + 1, identity: id, encode: encode, stamp: k.stamp, since: time.Now()}
}

func (s *Store) setFile(file string, k fileState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.files[file] = k
}

func (s *Store) file(file string) fileState {
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

// Run syncs until ctx is done: at each save and every few seconds.
func (s *Store) Run(ctx context.Context) error {
	for {
		_ = s.Sync() // logged
		select {
		case <-ctx.Done():
			return nil
		case <-s.wake:
		case <-time.After(syncInterval):
		}
	}
}
