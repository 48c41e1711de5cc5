package store

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/renewd/renewd/internal/config"
	"github.com/renewd/renewd/internal/server/seal"
)

// lockTimeout is how long Open waits for another process to release the file.
const lockTimeout = time.Second

// Open opens a store and checks everything in it. If there is no file, it atomically
// creates one with mode 0600. A copy that [Store.Backup] wrote becomes a store when it
// is opened for writing; see [Deployment.Restored].
func Open(path string, o Options) (*Store, error) {
	if o.TrustDomain.IsZero() || o.Seal == nil {
		return nil, fmt.Errorf("open store %s: it needs a trust domain and an encryption key", path)
	}
	s, err := open(path, o)
	if errors.Is(err, ErrDamaged) {
		err = fmt.Errorf("%w; %s", err, restore)
	}
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", path, err)
	}
	return s, nil
}

// OpenTemporary opens a new store in a temporary file, which has no name and ends with
// the store. Its encryption key is in memory only.
func OpenTemporary(o Options) (*Store, error) {
	o.Seal, o.temporary = seal.Ephemeral(), true
	f, err := os.CreateTemp("", "renewd-*.db")
	if err != nil {
		return nil, fmt.Errorf("open temporary store: %w", err)
	}
	defer os.Remove(f.Name())
	if err := errors.Join(f.Close(), initialize(f.Name(), o)); err != nil {
		return nil, fmt.Errorf("open temporary store: %w", err)
	}
	return Open(f.Name(), o)
}

// open opens a store. Without a Seal it does not decrypt what is sealed.
func open(path string, o Options) (*Store, error) {
	f, err := openFile(path, o)
	if err != nil {
		return nil, err
	}
	s := &Store{
		path: path, td: o.TrustDomain, seal: o.Seal, log: cmp.Or(o.Log, slog.New(slog.DiscardHandler)), now: o.Now, file: f,
		copying: make(chan struct{}, 1), reading: make(chan struct{}, maxReads),
		changes: make(chan *change), stop: make(chan struct{}), stopped: make(chan struct{}),
	}
	if s.now == nil {
		s.now = time.Now
	}
	// The file is locked now. Check it before bbolt maps it, because bbolt does not.
	stop := s.progress("store check in progress")
	defer func() { stop() }()
	use, err := checkStructure(f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	err = guard(func() (err error) {
		s.db, err = bbolt.Open(path, 0, options(o, func(string, int, fs.FileMode) (*os.File, error) { return f, nil }))
		return err
	})
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	s.db.AllocSize = allocSize
	var reseal []string
	err = guard(func() error {
		return s.db.View(func(tx *bbolt.Tx) (err error) {
			reseal, err = s.checkContents(tx)
			return err
		})
	})
	if err != nil {
		return nil, errors.Join(err, s.db.Close())
	}
	stop()
	stop = func() {}
	if !o.ReadOnly {
		err := s.compact(use)
		if err == nil {
			err = s.upgrade()
		}
		if err == nil {
			err = s.adoptCopy()
		}
		if err != nil {
			return nil, errors.Join(err, s.db.Close())
		}
	}
	s.update = s.db.Update
	go s.run()
	if o.ReadOnly {
		return s, nil
	}
	for _, name := range reseal {
		if err := s.Deployment(name).reseal(context.Background()); err != nil {
			return nil, errors.Join(fmt.Errorf("seal the keys of deployment %s with the new encryption key: %w", name, err), s.Close())
		}
		s.log.Info("signing keys sealed with the new encryption key", "deployment", name, "path", path)
	}
	return s, nil
}

// allocSize is the step in which the file grows, in bytes. Each step costs a sync.
const allocSize = 1 << 20

// mapSize is the address space reserved for the file, in bytes. As long as the file is
// smaller, a write never waits for readers.
const mapSize = 256 << 20

func options(o Options, openFile func(string, int, fs.FileMode) (*os.File, error)) *bbolt.Options {
	return &bbolt.Options{
		ReadOnly:   o.ReadOnly,
		NoSync:     o.temporary,
		NoGrowSync: o.temporary,
		OpenFile:   openFile,
		// Keep the list of free pages in the file. Without it bbolt scans for them at
		// each start and after each failed write, in a goroutine whose panic on a
		// damaged page cannot be recovered.
		NoFreelistSync:  false,
		FreelistType:    bbolt.FreelistMapType, // constant time however fragmented
		InitialMmapSize: mapSize,
		NoStatistics:    true,
	}
}

// openFile opens and locks the file. It creates a missing one.
func openFile(path string, o Options) (*os.File, error) {
	flag, lock := os.O_RDWR, unix.LOCK_EX
	if o.ReadOnly {
		flag, lock = os.O_RDONLY, unix.LOCK_SH
	}
	f, err := os.OpenFile(path, flag, 0)
	if errors.Is(err, fs.ErrNotExist) && !o.ReadOnly {
		if err := create(path, o); err != nil {
			return nil, err
		}
		f, err = os.OpenFile(path, flag, 0)
	}
	switch {
	case errors.Is(err, syscall.EROFS), errors.Is(err, fs.ErrPermission):
		return nil, config.FileError(fmt.Errorf("%w: the server must be able to read and write it", cause(err)))
	case err != nil:
		return nil, config.FileError(fmt.Errorf("%w: remove what is there, or choose another data_dir", cause(err)))
	}
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, errors.Join(config.Permanent(errors.New("it is not a regular file: remove it, or choose another data_dir")), err, f.Close())
	}
	for begin := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), lock|unix.LOCK_NB)
		if err == nil && isFileAt(f, path) {
			return f, nil
		}
		if err == nil {
			// The process that had the lock has replaced the file.
			if err := f.Close(); err != nil {
				return nil, cause(err)
			}
			return openFile(path, o)
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.Join(fmt.Errorf("lock: %w", err), f.Close())
		}
		if time.Since(begin) >= lockTimeout {
			return nil, errors.Join(fmt.Errorf("%w: stop that process first, such as a running server", ErrInUse), f.Close())
		}
	}
}

// isFileAt reports whether f is the file at path.
func isFileAt(f *os.File, path string) bool {
	mine, err := f.Stat()
	if err != nil {
		return false
	}
	there, err := os.Stat(path)
	return err == nil && os.SameFile(mine, there)
}

// cause drops the path from an error, for a caller that adds the path.
func cause(err error) error {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		return e.Err
	}
	return err
}

// create makes an empty store beside path and links it to path when it is complete and
// durable. It never replaces an existing file.
func create(path string, o Options) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return config.FileError(fmt.Errorf("create it: %w: its folder must exist, and the server must be able to write to it", cause(err)))
	}
	temp := f.Name()
	defer os.Remove(temp)
	if err := f.Close(); err != nil {
		return fmt.Errorf("create it: %w", err)
	}
	if err := initialize(temp, o); err != nil {
		return fmt.Errorf("create it: %w", err)
	}
	if err := os.Link(temp, path); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("create it: %w", err)
	}
	if err := syncFolder(path); err != nil {
		return fmt.Errorf("make it durable: %w", err)
	}
	return nil
}

// upgrade sets the format version of an older store to the current one, so that an older
// program rejects it instead of taking new values for damage.
func (s *Store) upgrade() error {
	if s.format == formatVersion {
		return nil
	}
	err := guard(func() error {
		return s.db.Update(func(tx *bbolt.Tx) error {
			about := tx.Bucket(bucketAbout)
			return errors.Join(putAbout(about, s.td), putRestored(about, s.restored))
		})
	})
	if err != nil {
		return fmt.Errorf("upgrade it from format %d to %d: %w", s.format, formatVersion, err)
	}
	s.log.Info("store upgraded", "path", s.path, "from_format", s.format, "format", formatVersion)
	s.format = formatVersion
	return nil
}

func putAbout(b *bbolt.Bucket, td spiffeid.TrustDomain) error {
	value, err := packJSON(keyStore, about{version: version{formatVersion}, TrustDomain: td.Name()})
	if err != nil {
		return err
	}
	return b.Put(keyStore, value)
}

func initialize(path string, o Options) error {
	db, err := bbolt.Open(path, 0o600, options(o, nil))
	if err != nil {
		return cause(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucket(bucketAbout)
		if err != nil {
			return err
		}
		if err := putAbout(b, o.TrustDomain); err != nil {
			return err
		}
		_, err = tx.CreateBucket(bucketDeployments)
		return err
	})
	return errors.Join(err, db.Close())
}

// checkContents checks the keys and values of the file. It returns the deployments
// with secrets that are sealed with an older encryption key.
func (s *Store) checkContents(tx *bbolt.Tx) (reseal []string, err error) {
	b := tx.Bucket(bucketAbout)
	if b == nil || b.Get(keyStore) == nil {
		return nil, fmt.Errorf("%w, or it is not a store of this program", ErrDamaged)
	}
	// First the format alone: a newer format may differ in everything else.
	v, err := decode[version](keyStore, b.Get(keyStore))
	switch {
	case err != nil:
		return nil, err
	case v.Format > formatVersion:
		return nil, config.Permanent(fmt.Errorf("it has format %d, this program supports up to %d: a newer version of the program has used it, run that", v.Format, formatVersion))
	case v.Format < 1:
		return nil, fmt.Errorf("%w: format %d", ErrDamaged, v.Format)
	}
	s.format = v.Format
	a, err := decode[about](keyStore, b.Get(keyStore))
	switch {
	case err != nil:
		return nil, err
	case a.TrustDomain != s.td.Name():
		return nil, config.Permanent(fmt.Errorf("it belongs to trust domain %s, the configuration has %s: correct trust_domain or data_dir", a.TrustDomain, s.td))
	}
	if err := s.checkAbout(b); err != nil {
		return nil, err
	}
	top := [][]byte{bucketAbout, bucketDeployments}
	if f := tx.Bucket(bucketFederation); f != nil {
		top = append(top, bucketFederation)
		if err := checkFederation(f); err != nil {
			return nil, fmt.Errorf("federation: %w", err)
		}
	}
	if err := checkKeys(tx.Cursor(), top...); err != nil {
		return nil, err
	}
	deployments := tx.Bucket(bucketDeployments)
	err = deployments.ForEach(func(name, value []byte) error {
		if value != nil {
			return fmt.Errorf("%w: a value %q among the deployments", ErrDamaged, name)
		}
		old, err := s.checkDeployment(deployments.Bucket(name), string(name))
		if err != nil {
			return fmt.Errorf("deployment %q: %w", name, err)
		}
		if old {
			reseal = append(reseal, string(name))
		}
		return nil
	})
	return reseal, err
}

// checkKeys checks that these keys, in this order, are all that there are.
func checkKeys(c *bbolt.Cursor, keys ...[]byte) error {
	k, _ := c.First()
	for _, want := range keys {
		if !bytes.Equal(k, want) {
			return fmt.Errorf("%w: %q is missing", ErrDamaged, want)
		}
		k, _ = c.Next()
	}
	if k != nil {
		return fmt.Errorf("%w: %q does not belong there", ErrDamaged, k)
	}
	return nil
}

func (s *Store) checkDeployment(b *bbolt.Bucket, name string) (reseal bool, err error) {
	stored, err := unpack(keyName, b.Get(keyName))
	if err != nil {
		return false, err
	}
	if string(stored) != name {
		return false, fmt.Errorf("%w: it was made as %q", ErrDamaged, stored)
	}
	// The buckets and "name", in alphabetical order.
	if err := checkKeys(b.Cursor(), []byte(agents), []byte(audit), []byte(entries), []byte(jwt), []byte(keysets), []byte(rows), keyName, []byte(tokens)); err != nil {
		return false, err
	}
	for _, inner := range buckets {
		values := b.Bucket([]byte(inner))
		if values == nil {
			return false, fmt.Errorf("%w: %q is not a bucket", ErrDamaged, inner)
		}
		if err := values.ForEach(func(k, v []byte) error { _, err := unpack(k, v); return err }); err != nil {
			return false, fmt.Errorf("%s: %w", inner, err)
		}
	}
	return s.Deployment(name).checkSealed(b)
}
