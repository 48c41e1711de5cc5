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
)

// lockWait is how long Open waits for a process that is about to end.
const lockWait = time.Second

// Open opens a store and looks at everything in it. Where there is no file it
// makes one, of mode 0600, complete or not at all. A copy that [Store.Backup] has
// made becomes a store when it is opened for writing; see [Deployment.Restored].
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

// open opens a store, with what is sealed left unopened where there is no Seal.
func open(path string, o Options) (*Store, error) {
	f, err := openFile(path, o)
	if err != nil {
		return nil, err
	}
	s := &Store{
		path: path, td: o.TrustDomain, seal: o.Seal, log: cmp.Or(o.Log, slog.New(slog.DiscardHandler)), now: o.Now, file: f,
		copying: make(chan struct{}, 1), reading: make(chan struct{}, maxReading),
		changes: make(chan *change), stop: make(chan struct{}), stopped: make(chan struct{}),
	}
	if s.now == nil {
		s.now = time.Now
	}
	// Under the file's lock, and before bbolt, which trusts what it maps.
	stop := s.progress("store check in progress")
	defer func() { stop() }()
	use, err := checkStructure(f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	err = guard(func() (err error) {
		s.db, err = bbolt.Open(path, 0, options(o.ReadOnly, func(string, int, fs.FileMode) (*os.File, error) { return f, nil }))
		return err
	})
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	s.db.AllocSize = allocSize
	var stale []string
	err = guard(func() error {
		return s.db.View(func(tx *bbolt.Tx) (err error) {
			stale, err = s.checkContents(tx)
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
			err = s.takeOver()
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
	for _, name := range stale {
		if err := s.Deployment(name).sealAnew(context.Background()); err != nil {
			return nil, errors.Join(fmt.Errorf("seal the keys of deployment %s with the new encryption key: %w", name, err), s.Close())
		}
		s.log.Info("signing keys were sealed with the new encryption key", "deployment", name, "file", path)
	}
	return s, nil
}

// allocSize is by how much the file grows, in bytes. Each time costs a sync.
const allocSize = 1 << 20

// mapSize is how much address space is reserved for the file, in bytes. As long
// as the file is smaller, writing never waits for those who read.
const mapSize = 256 << 20

func options(readOnly bool, openFile func(string, int, fs.FileMode) (*os.File, error)) *bbolt.Options {
	return &bbolt.Options{
		ReadOnly: readOnly,
		OpenFile: openFile,
		// The list of free pages stays in the file. Without it bbolt finds
		// them with a scan at each start and after each failed write, in a
		// goroutine whose panic on a damaged page nobody could catch.
		NoFreelistSync:  false,
		FreelistType:    bbolt.FreelistMapType, // constant time however fragmented
		InitialMmapSize: mapSize,
		NoStatistics:    true, // nobody reads them
	}
}

// openFile opens and locks the file, after making it if need be.
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
		return nil, fmt.Errorf("%w: the server must be able to read and write it", cause(err))
	case err != nil:
		return nil, cause(err)
	}
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, errors.Join(errors.New("it is not a regular file"), err, f.Close())
	}
	for begin := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), lock|unix.LOCK_NB)
		if err == nil && named(f, path) {
			return f, nil
		}
		if err == nil {
			// Who had it has put another file in its place.
			if err := f.Close(); err != nil {
				return nil, cause(err)
			}
			return openFile(path, o)
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.Join(fmt.Errorf("lock: %w", err), f.Close())
		}
		if time.Since(begin) >= lockWait {
			return nil, errors.Join(fmt.Errorf("%w: end that process first, such as a server that runs already", ErrInUse), f.Close())
		}
	}
}

// named reports whether a file is the one that has the name.
func named(f *os.File, path string) bool {
	mine, err := f.Stat()
	if err != nil {
		return false
	}
	there, err := os.Stat(path)
	return err == nil && os.SameFile(mine, there)
}

// cause drops the path from an error that will be wrapped with it.
func cause(err error) error {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		return e.Err
	}
	return err
}

// create makes an empty store beside path and links it into place when it is
// complete and durable. It leaves alone what is there already.
func create(path string, o Options) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return fmt.Errorf("make it: %w: its folder must exist and the server be able to write in it", cause(err))
	}
	temp := f.Name()
	defer os.Remove(temp)
	if err := f.Close(); err != nil {
		return fmt.Errorf("make it: %w", err)
	}
	if err := initialize(temp, o); err != nil {
		return fmt.Errorf("make it: %w", err)
	}
	if err := os.Link(temp, path); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make it: %w", err)
	}
	if err := syncFolder(path); err != nil {
		return fmt.Errorf("make it durable: %w", err)
	}
	return nil
}

// upgrade notes that a store of an older format is written by this program from
// now on, which an older one would take for damage.
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
	s.log.Info("store upgraded", "file", s.path, "from_format", s.format, "format", formatVersion)
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
	db, err := bbolt.Open(path, 0o600, options(false, nil))
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

// checkContents looks at what bbolt knows nothing of, and returns the
// deployments that have keys to be sealed anew.
func (s *Store) checkContents(tx *bbolt.Tx) (stale []string, err error) {
	b := tx.Bucket(bucketAbout)
	if b == nil || b.Get(keyStore) == nil {
		return nil, fmt.Errorf("%w, or it is not a store of this program", ErrDamaged)
	}
	// First the format alone: all else may be another in a newer one.
	v, err := decode[version](keyStore, b.Get(keyStore))
	switch {
	case err != nil:
		return nil, err
	case v.Format > formatVersion:
		return nil, fmt.Errorf("it has format %d, this program knows up to %d: a newer version of the program has used it, run that", v.Format, formatVersion)
	case v.Format < 1:
		return nil, fmt.Errorf("%w: format %d", ErrDamaged, v.Format)
	}
	s.format = v.Format
	a, err := decode[about](keyStore, b.Get(keyStore))
	switch {
	case err != nil:
		return nil, err
	case a.TrustDomain != s.td.Name():
		return nil, fmt.Errorf("it belongs to trust domain %s, the configuration has %s: correct the trust domain or the path", a.TrustDomain, s.td)
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
	if err := exactly(tx.Cursor(), top...); err != nil {
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
			stale = append(stale, string(name))
		}
		return nil
	})
	return stale, err
}

// exactly checks which keys there are.
func exactly(c *bbolt.Cursor, keys ...[]byte) error {
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

func (s *Store) checkDeployment(b *bbolt.Bucket, name string) (stale bool, err error) {
	stored, err := unpack(keyName, b.Get(keyName))
	if err != nil {
		return false, err
	}
	if string(stored) != name {
		return false, fmt.Errorf("%w: it was made as %q", ErrDamaged, stored)
	}
	// "name" is among the buckets, in order of the alphabet.
	if err := exactly(b.Cursor(), []byte(agents), []byte(audit), []byte(entries), []byte(jwt), []byte(keysets), []byte(rows), keyName, []byte(tokens)); err != nil {
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
