package store

import (
	"os"
	"syscall"
	"testing"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
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
