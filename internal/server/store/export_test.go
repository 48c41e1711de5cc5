package store

import (
	"bytes"
	"os"
	"syscall"
	"testing"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/renewd/renewd/internal/server/keyset"
)

// PutDevice replaces the store's file behind its descriptor with a device, until back is
// called. On /dev/full each write fails as on a full disk, on /dev/null each sync.
func (s *Store) PutDevice(t testing.TB, path string) (back func()) {
	t.Helper()
	device, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer device.Close()
	fd := int(s.file.Fd())
	kept, err := unix.Dup(fd)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Dup2(int(device.Fd()), fd); err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		if err := unix.Dup2(kept, fd); err != nil {
			t.Fatal(err)
		}
		unix.Close(kept)
	}
}

// FailSync makes the last step of the next commit fail, the sync of the header. It calls
// then before it returns the error.
func (s *Store) FailSync(then func()) {
	s.update = func(fn func(*bbolt.Tx) error) error {
		s.update = s.db.Update
		if err := s.db.Update(fn); err != nil {
			return err
		}
		then()
		return syscall.EIO
	}
}

// Panic makes the next commit panic as on a damaged page.
func (s *Store) Panic() {
	s.update = func(fn func(*bbolt.Tx) error) error {
		s.update = s.db.Update
		return s.db.Update(func(tx *bbolt.Tx) error {
			panic("page 7: invalid page type")
		})
	}
}

// Commits returns the number of commits so far.
func (s *Store) Commits(t testing.TB) (n int) {
	t.Helper()
	if err := s.db.View(func(tx *bbolt.Tx) error { n = tx.ID(); return nil }); err != nil {
		t.Fatal(err)
	}
	return n
}

// HeaderSynced reports whether the last commit is known to be durable.
func (s *Store) HeaderSynced() bool { return !s.headerDirty }

// Create makes an empty store.
var Create = create

// Pack returns a value with its checksum.
var Pack = pack

// SealedDocument returns the keysets of a deployment, sealed as in the file.
func SealedDocument(t testing.TB, tx *bbolt.Tx, deployment string) keyset.Document {
	t.Helper()
	doc, err := decodeDocument(tx.Bucket(bucketDeployments).Bucket([]byte(deployment)))
	if err != nil {
		t.Fatal(err)
	}
	return doc
}

// PutSealedDocument writes keysets without sealing them.
func PutSealedDocument(t testing.TB, tx *bbolt.Tx, deployment string, doc keyset.Document) {
	t.Helper()
	o, err := put(keysets, keyDocument, doc)
	if err == nil {
		err = tx.Bucket(bucketDeployments).Bucket([]byte(deployment)).Bucket([]byte(keysets)).Put(o.key, o.value)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// KeepAudit sets how many later records a frequent record of the audit log has at most, a
// multiple of 200. Call it before the first write.
func (s *Store) KeepAudit(n uint64) { s.keepAudit = n }

// Path returns the path of the file.
func (s *Store) Path() string { return s.path }

// Used returns how many bytes at the beginning of the file are in use.
func (s *Store) Used(t testing.TB) (n int64) {
	t.Helper()
	if err := s.db.View(func(tx *bbolt.Tx) error { n = tx.Size(); return nil }); err != nil {
		t.Fatal(err)
	}
	return n
}

// FreelistPage returns the number of the page with the list of free pages.
func FreelistPage(data []byte) int {
	_, freelist, _, err := readMeta(bytes.NewReader(data), uint64(len(data)))
	if err != nil {
		panic(err)
	}
	return int(freelist)
}
