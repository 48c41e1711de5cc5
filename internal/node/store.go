package node

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
)

// The files of a [Store].
const (
	identityFile  = "identity.json" // key and own SVID together, so that they always match
	bundleFile    = "bundle.json"
	federatedFile = "federated.json"
	adoptedFile   = "adopted" // digest of the operator's authorities that bundleFile began with
	seedFile      = "seed"
	lockFile      = "lock"
)

// maxFile bounds what is read of any one file.
const maxFile = 32 << 20

// CorruptError says that a file of the store cannot be read as what it should
// be. Nothing was changed.
type CorruptError struct {
	Path   string
	Remedy string
	Err    error
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("%s is damaged (%v): %s", e.Path, e.Err, e.Remedy)
}

// Unwrap returns what is wrong with the file.
func (e *CorruptError) Unwrap() error { return e.Err }

// Store keeps what a node must not lose over a restart: its identity, the last
// trust bundles, and a seed. The folder has mode 0700 and its files 0600; they
// are replaced atomically and are on disk when a Save returns. One process at
// a time can have it open.
//
// Methods may be called concurrently, except that two Saves of the same kind
// must not overlap.
type Store struct {
	dir  string
	root *os.Root
	lock *os.File
}

// OpenStore opens the folder dir and makes it when it is missing. Permissions
// that let others in are tightened. It fails when the folder belongs to
// another user or is open in another process.
func OpenStore(dir string) (_ *Store, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the folder: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	s := &Store{dir: dir, root: root}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	info, err := root.Stat(".")
	if err != nil {
		return nil, err
	}
	// Whoever owns the folder can replace the key in it.
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return nil, fmt.Errorf("%s belongs to user %d and this process runs as %d: chown it, or run as its owner", dir, st.Uid, os.Geteuid())
	}
	if info.Mode().Perm()&0o077 != 0 {
		if err := root.Chmod(".", 0o700); err != nil {
			return nil, fmt.Errorf("%s can be read by others (mode %v): chmod it to 0700: %w", dir, info.Mode().Perm(), err)
		}
	}
	s.lock, err = root.OpenFile(lockFile, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the lock file: %w", err)
	}
	if err := syscall.Flock(int(s.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s is in use by another agent: stop that one, or give this one a folder of its own", dir)
		}
		return nil, fmt.Errorf("lock %s: %w", s.path(lockFile), err)
	}
	return s, nil
}

// Close gives the folder free. The Store is of no use afterwards.
func (s *Store) Close() error {
	var errs []error
	if s.lock != nil {
		// Closing alone would leave the lock with a child process that has
		// been forked and not yet executed, which shares the open file.
		errs = append(errs, syscall.Flock(int(s.lock.Fd()), syscall.LOCK_UN), s.lock.Close())
	}
	return errors.Join(append(errs, s.root.Close())...)
}

// LoadIdentity returns the identity kept, nil when there is none. A file that
// cannot be read as an identity is a [CorruptError].
func (s *Store) LoadIdentity() (*Identity, error) {
	b, err := s.read(identityFile)
	if b == nil || err != nil {
		return nil, err
	}
	id, err := decodeIdentity(b)
	if err != nil {
		return nil, &CorruptError{s.path(identityFile), "move it away and prove the node anew, with a new join token for instance", err}
	}
	return id, nil
}

// SaveIdentity keeps id in place of the identity kept before.
func (s *Store) SaveIdentity(id *Identity) error {
	b, err := encodeIdentity(id)
	if err != nil {
		return fmt.Errorf("encode the identity: %w", err)
	}
	return s.write(identityFile, b)
}

// WipeIdentity removes the identity kept, if any.
func (s *Store) WipeIdentity() error {
	if err := s.root.Remove(identityFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return s.syncDir()
}

// LoadBundle returns the trust bundle kept, with its taint marks and their
// times, nil when there is none.
func (s *Store) LoadBundle() (*bundle.Bundle, error) {
	b, err := s.read(bundleFile)
	if b == nil || err != nil {
		return nil, err
	}
	out, err := decodeBundle(b)
	if err != nil {
		return nil, &CorruptError{s.path(bundleFile), "move it away; the agent then starts from the trust bundle that it is configured with", err}
	}
	return out, nil
}

// SaveBundle keeps b in place of the trust bundle kept before.
func (s *Store) SaveBundle(b *bundle.Bundle) error {
	enc, err := encodeBundle(b)
	if err != nil {
		return fmt.Errorf("encode the trust bundle: %w", err)
	}
	return s.write(bundleFile, enc)
}

// LoadFederated returns the federated bundles kept, nil when there are none.
func (s *Store) LoadFederated() (map[spiffeid.TrustDomain]*bundle.Bundle, error) {
	b, err := s.read(federatedFile)
	if b == nil || err != nil {
		return nil, err
	}
	out, err := decodeBundles(b)
	if err != nil {
		return nil, &CorruptError{s.path(federatedFile), "remove it; the agent asks the server for them", err}
	}
	return out, nil
}

// SaveFederated keeps the federated bundles in place of those kept before.
func (s *Store) SaveFederated(bundles map[spiffeid.TrustDomain]*bundle.Bundle) error {
	enc, err := encodeBundles(bundles)
	if err != nil {
		return fmt.Errorf("encode the federated bundles: %w", err)
	}
	return s.write(federatedFile, enc)
}

// LoadAdopted returns the digest of the authorities that the operator had given
// and that the bundle kept began with; empty when it is not known.
func (s *Store) LoadAdopted() (string, error) {
	b, err := s.read(adoptedFile)
	return string(b), err
}

// SaveAdopted keeps digest in place of the one kept before.
func (s *Store) SaveAdopted(digest string) error { return s.write(adoptedFile, []byte(digest)) }

// Seed returns random bytes that are this node's own: made at the first call
// in the life of the folder, the same ever after.
func (s *Store) Seed() ([32]byte, error) {
	var seed [32]byte
	b, err := s.read(seedFile)
	if err != nil {
		return seed, err
	}
	if b == nil {
		rand.Read(seed[:]) // never fails
		return seed, s.write(seedFile, seed[:])
	}
	if len(b) != len(seed) {
		return seed, &CorruptError{s.path(seedFile), "remove it; a new one is made", fmt.Errorf("it has %d bytes instead of %d", len(b), len(seed))}
	}
	return [32]byte(b), nil
}

// writable checks that an identity could be saved now, by doing all of it but
// the last step.
func (s *Store) writable() error {
	const probe = identityFile + ".probe"
	if err := s.writeTemp(probe, make([]byte, 16<<10)); err != nil {
		return err
	}
	return s.root.Remove(probe)
}

// setAside renames the identity file, so that it is out of the way and nothing
// is lost, and returns where it is now.
func (s *Store) setAside(now time.Time) (string, error) {
	to := identityFile + ".damaged-" + now.UTC().Format("20060102T150405.000000000Z")
	if err := s.root.Rename(identityFile, to); err != nil {
		return "", err
	}
	return s.path(to), s.syncDir()
}

func (s *Store) path(name string) string { return filepath.Join(s.dir, name) }

// read returns the content of a file, nil when it does not exist.
func (s *Store) read(name string) ([]byte, error) {
	f, err := s.root.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Mode().Perm()&0o077 != 0 {
		if err := f.Chmod(0o600); err != nil {
			return nil, fmt.Errorf("%s can be read by others (mode %v): chmod it to 0600: %w", s.path(name), info.Mode().Perm(), err)
		}
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", s.path(name), err)
	}
	if len(b) > maxFile {
		return nil, fmt.Errorf("%s is larger than %d bytes: it is not a file that the agent wrote", s.path(name), maxFile)
	}
	if b == nil {
		b = []byte{}
	}
	return b, nil
}

// write replaces a file: after a crash at any moment it holds either the old
// content or the new.
func (s *Store) write(name string, b []byte) error {
	temp := name + ".tmp"
	if err := s.writeTemp(temp, b); err != nil {
		return err
	}
	if err := s.root.Rename(temp, name); err != nil {
		return err
	}
	return s.syncDir()
}

// writeTemp writes a new file and has it on disk when it returns. What a crash
// left under that name is removed, because its permissions are unknown.
func (s *Store) writeTemp(name string, b []byte) (err error) {
	if err := s.root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := s.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, f.Close())
		if err != nil {
			err = errors.Join(fmt.Errorf("write %s: %w", s.path(name), err), s.root.Remove(name))
		}
	}()
	if _, err := f.Write(b); err != nil {
		return err
	}
	return f.Sync()
}

// syncDir makes a rename last (fsync(2): syncing a file does not sync the
// folder that names it).
func (s *Store) syncDir() error {
	d, err := s.root.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
