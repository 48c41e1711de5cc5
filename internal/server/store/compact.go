package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// usage is how the pages of a file are used.
type usage struct{ free, count, pageSize uint64 }

// live is how many bytes are in use.
func (u usage) live() uint64 { return (u.count - u.free) * u.pageSize }

// wasteful reports whether more than half of the file is free. bbolt never makes a file
// smaller, and writes the list of all its free pages with each commit. A small file is
// not worth the copy.
func (u usage) wasteful() bool { return u.free > u.count/2 && u.free*u.pageSize >= allocSize }

// Compaction writes in transactions of this many bytes.
const compactCommit = 8 << 20

// compact copies what is in use to a new file, which takes the place of the store's when
// it is complete, checked and durable. Until then the store's is as it was, so that a
// crash leaves one or the other. What is in the way of it, such as a lack of room, is
// logged, and the store goes on as it is; an error means that it cannot go on.
//
// The file is locked, so nobody else makes such a copy, and one that is there already
// is left of a process that was killed.
func (s *Store) compact(use usage) error {
	path, err := filepath.EvalSymlinks(s.path)
	if err != nil {
		return err
	}
	temp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".compact")
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove what is left of a compaction: %w", err)
	}
	if !use.wasteful() {
		return nil
	}
	begin := time.Now()
	db, f, err := s.compacted(temp, use)
	if err == nil {
		if err = os.Rename(temp, path); err != nil {
			err = errors.Join(fmt.Errorf("put it in its place: %w", err), db.Close(), os.Remove(temp))
		}
	}
	if err != nil {
		s.log.Warn("store not compacted, each commit is slower than it could be", "file", s.path, "free_bytes", use.free*use.pageSize, "used_bytes", use.live(), "error", err)
		return nil
	}
	// The lock of the old file, which has no name any more, goes with it.
	err = s.db.Close()
	s.db, s.file = db, f
	if err := errors.Join(err, syncFolder(path)); err != nil {
		return fmt.Errorf("make its compaction durable: %w", err)
	}
	s.log.Info("store compacted", "file", s.path, "bytes_before", use.count*use.pageSize, "bytes", s.size(), "took", time.Since(begin))
	return nil
}

// compacted makes a file, locked, of what is in use. It is whole and durable.
func (s *Store) compacted(temp string, use usage) (db *bbolt.DB, f *os.File, err error) {
	f, err = os.OpenFile(temp, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err == nil {
			return
		}
		if db != nil {
			err = errors.Join(err, db.Close())
		} else {
			err = errors.Join(err, f.Close())
		}
		err = errors.Join(err, os.Remove(temp))
	}()
	if err := room(f, use.live()+use.live()/8+2*allocSize); err != nil {
		return nil, f, err
	}
	if err := s.sameOwner(f); err != nil {
		return nil, f, fmt.Errorf("give it mode and owner: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, f, fmt.Errorf("lock: %w", err)
	}
	o := options(false, func(string, int, fs.FileMode) (*os.File, error) { return f, nil })
	o.NoSync, o.NoGrowSync = true, true // once, at the end
	err = guard(func() (err error) {
		db, err = bbolt.Open(temp, 0, o)
		return err
	})
	if err != nil {
		return nil, f, err
	}
	db.AllocSize = allocSize
	stop := s.progress("store compaction in progress", "used_bytes", use.live())
	defer stop()
	err = guard(func() error {
		if err := bbolt.Compact(db, s.db, compactCommit); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
		// It is about to be all there is.
		if _, err := checkStructure(f); err != nil {
			return err
		}
		return db.View(func(tx *bbolt.Tx) error { _, err := s.checkContents(tx); return err })
	})
	db.NoSync, db.NoGrowSync = false, false
	return db, f, err
}

// sameOwner gives a file the mode and the owner of the store's.
func (s *Store) sameOwner(f *os.File) error {
	info, err := s.file.Stat()
	if err != nil {
		return err
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		if err := f.Chown(int(stat.Uid), int(stat.Gid)); err != nil {
			return err
		}
	}
	return f.Chmod(info.Mode().Perm())
}

// room checks that a file system has so many bytes left.
func room(f *os.File, need uint64) error {
	var disk unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &disk); err != nil {
		return fmt.Errorf("ask for the free space: %w", err)
	}
	if have := disk.Bavail * uint64(disk.Bsize); have < need {
		return fmt.Errorf("its file system has %d bytes left, and %d are needed: make room for it", have, need)
	}
	return nil
}

// syncFolder makes durable which file has a name.
func syncFolder(path string) error {
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// size is how many bytes of the file are in use, free pages among them.
func (s *Store) size() (n int64) {
	_ = s.view(context.Background(), func(tx *bbolt.Tx) error { n = tx.Size(); return nil })
	return n
}

// progress logs what is under way, after a second and then every ten, until stop is
// called, so that a long start does not look like one that hangs.
func (s *Store) progress(msg string, attrs ...any) (stop func()) {
	begin, end, ended := time.Now(), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for wait := time.Second; ; wait = 10 * time.Second {
			select {
			case <-end:
				return
			case <-time.After(wait):
				s.log.Info(msg, append([]any{"file", s.path, "elapsed", time.Since(begin).Round(time.Second)}, attrs...)...)
			}
		}
	}()
	return func() { close(end); <-ended }
}
