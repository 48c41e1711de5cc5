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

// usage counts the pages of a file.
type usage struct{ free, count, pageSize uint64 }

// live returns how many bytes are in use.
func (u usage) live() uint64 { return (u.count - u.free) * u.pageSize }

// wasteful reports whether compaction pays off: more than half of the file is free, and
// at least allocSize. bbolt never shrinks a file, and writes the list of all its free
// pages with each commit.
func (u usage) wasteful() bool { return u.free > u.count/2 && u.free*u.pageSize >= allocSize }

// compactCommit is the size of the transactions of a compaction, in bytes.
const compactCommit = 8 << 20

// compact copies the pages in use to a new file, which replaces the store's file when it is
// complete, checked and durable. A crash leaves the old file or the new one. If the file
// cannot be compacted, for example because the disk is full, compact logs that and the
// store stays as it is. An error means that the store cannot be used.
//
// The file is locked, so no other process compacts it. A temporary file that exists is
// left over from a process that was killed.
func (s *Store) compact(use usage) error {
	path, err := filepath.EvalSymlinks(s.path)
	if err != nil {
		return err
	}
	temp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".compact")
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the file of an interrupted compaction: %w", err)
	}
	if !use.wasteful() {
		return nil
	}
	begin := time.Now()
	db, f, err := s.compactTo(temp, use)
	if err == nil {
		if err = os.Rename(temp, path); err != nil {
			err = errors.Join(fmt.Errorf("put it in its place: %w", err), db.Close(), os.Remove(temp))
		}
	}
	if err != nil {
		s.log.Warn("store not compacted, each commit is slower than it could be", "path", s.path, "free_bytes", use.free*use.pageSize, "used_bytes", use.live(), "error", err)
		return nil
	}
	err = s.db.Close() // and unlocks the old file, which no longer has a name
	s.db, s.file = db, f
	if err := errors.Join(err, syncFolder(path)); err != nil {
		return fmt.Errorf("make its compaction durable: %w", err)
	}
	s.log.Info("store compacted", "path", s.path, "bytes_before", use.count*use.pageSize, "bytes", s.size(), "duration", time.Since(begin))
	return nil
}

// compactTo copies the pages in use to a new file. The file is locked, checked and
// durable.
func (s *Store) compactTo(temp string, use usage) (db *bbolt.DB, f *os.File, err error) {
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
	if err := checkSpace(f, use.live()+use.live()/8+2*allocSize); err != nil {
		return nil, f, err
	}
	if err := s.copyOwner(f); err != nil {
		return nil, f, fmt.Errorf("set its mode and owner: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, f, fmt.Errorf("lock: %w", err)
	}
	o := options(Options{temporary: true}, func(string, int, fs.FileMode) (*os.File, error) { return f, nil })
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
		// It replaces the only other copy.
		if _, err := checkStructure(f); err != nil {
			return err
		}
		return db.View(func(tx *bbolt.Tx) error { _, err := s.checkContents(tx); return err })
	})
	db.NoSync, db.NoGrowSync = false, false
	return db, f, err
}

// copyOwner gives a file the mode and the owner of the store's file.
func (s *Store) copyOwner(f *os.File) error {
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

// checkSpace checks that the file system of f has so many bytes left.
func checkSpace(f *os.File, need uint64) error {
	var disk unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &disk); err != nil {
		return fmt.Errorf("ask for the free space: %w", err)
	}
	if have := disk.Bavail * uint64(disk.Bsize); have < need {
		return fmt.Errorf("its file system has %d bytes left, and %d are needed: make room for it", have, need)
	}
	return nil
}

// syncFolder makes the folder entry of path durable.
func syncFolder(path string) error {
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// size returns the length of the file's pages in bytes, free pages included.
func (s *Store) size() (n int64) {
	_ = s.view(context.Background(), func(tx *bbolt.Tx) error { n = tx.Size(); return nil })
	return n
}

// progress logs msg after one second and then every ten, until stop is called, so that a
// long start does not look like a hang.
func (s *Store) progress(msg string, attrs ...any) (stop func()) {
	begin, end, ended := time.Now(), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for wait := time.Second; ; wait = 10 * time.Second {
			select {
			case <-end:
				return
			case <-time.After(wait):
				s.log.Info(msg, append([]any{"path", s.path, "duration", time.Since(begin).Round(time.Second)}, attrs...)...)
			}
		}
	}()
	return func() { close(end); <-ended }
}
