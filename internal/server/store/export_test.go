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

// PutDevice puts a device in the place of the store's file, behind its
// descriptor, until the function that it returns is called: of /dev/full each
// write fails as on a full disk, of /dev/null each sync.
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

// FailSync lets the last step of the next commit fail, the sync of the header.
// Before it answers, it calls then.
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

// Panic lets the next commit meet a damaged page.
func (s *Store) Panic() {
	s.update = func(fn func(*bbolt.Tx) error) error {
		s.update = s.db.Update
		return s.db.Update(func(tx *bbolt.Tx) error {
			panic("page 7: invalid page type")
		})
	}
}

// Commits is the number of commits so far.
func (s *Store) Commits(t testing.TB) (n int) {
	t.Helper()
	if err := s.db.View(func(tx *bbolt.Tx) error { n = tx.ID(); return nil }); err != nil {
		t.Fatal(err)
	}
	return n
}

// Settled reports whether the last commit is known to be durable.
func (s *Store) Settled() bool { return !s.unsettled }

// Create makes an empty store.
var Create = create

// Pack makes a value with its checksum.
var Pack = pack

// SealedDocument reads keysets as they are in the file.
func SealedDocument(t testing.TB, tx *bbolt.Tx, deployment string) keyset.Document {
	t.Helper()
	doc, err := decodeDocument(tx.Bucket(bucketDeployments).Bucket([]byte(deployment)))
	if err != nil {
		t.Fatal(err)
	}
	return doc
}

// PutSealedDocument writes keysets as they are to be in the file.
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

// Path is the file's.
func (s *Store) Path() string { return s.path }

// Used is how many bytes at the beginning of the file are in use.
func (s *Store) Used(t testing.TB) (n int64) {
	t.Helper()
	if err := s.db.View(func(tx *bbolt.Tx) error { n = tx.Size(); return nil }); err != nil {
		t.Fatal(err)
	}
	return n
}

// FreelistPage is where a file has its list of free pages.
func FreelistPage(data []byte) int {
	_, freelist, _, err := readMeta(bytes.NewReader(data), uint64(len(data)))
	if err != nil {
		panic(err)
	}
	return int(freelist)
}
