package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// chunk is the most that [Store.Backup] writes at a time, in bytes.
const chunk = 256 << 10

// Backup writes a consistent copy of the store to w, in parts of at most 256 KiB, and
// returns its size in bytes. The copy is marked as one; see [Deployment.Restored].
// Other reads and writes proceed meanwhile. Concurrent calls are served one at a time.
//
// Backup first copies the file to an unlinked file in the same folder, compacts that if
// more than half of it is free, and then writes it to w. Reading the store at the pace
// of w instead would keep freed pages from being reused: the file would grow, and once it
// has outgrown its mapping, every writer would wait for w.
//
// The folder must have room for two copies of the file: one for this copy, and one left
// for the server. When ctx is done Backup returns, after the compaction or write to w in
// progress.
func (s *Store) Backup(ctx context.Context, w io.Writer) (size int64, err error) {
	select {
	case s.copying <- struct{}{}:
		defer func() { <-s.copying }()
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	f, err := s.unlinkedFile()
	if err != nil {
		return 0, fmt.Errorf("copy store %s: %w", s.path, err)
	}
	defer f.Close()
	at := s.now() // before the copy, so that it has everything signed until then
	if err := s.copyTo(ctx, f); err != nil {
		return 0, err
	}
	if f, size, err = s.compactCopy(f, at); err != nil {
		return 0, fmt.Errorf("copy store %s: %w", s.path, err)
	}
	defer f.Close()
	if err := ctx.Err(); err != nil {
		return 0, fmt.Errorf("copy store %s: %w", s.path, err)
	}
	r := io.NewSectionReader(f, 0, size)
	if _, err := io.CopyBuffer(contextWriter{ctx, w}, struct{ io.Reader }{r}, make([]byte, chunk)); err != nil {
		return 0, fmt.Errorf("copy store %s: %w", s.path, err)
	}
	return size, nil
}

// unlinkedFile creates a file beside the store without a name. It is gone when it is
// closed.
func (s *Store) unlinkedFile() (*os.File, error) {
	f, err := os.CreateTemp(filepath.Dir(s.path), "."+filepath.Base(s.path)+".copy.*") // mode 0600
	if err != nil {
		return nil, fmt.Errorf("create a file beside it: %w", cause(err))
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(fmt.Errorf("create a file beside it: %w", cause(err)), f.Close())
	}
	return f, nil
}

func (s *Store) copyTo(ctx context.Context, f *os.File) error {
	return s.view(ctx, func(tx *bbolt.Tx) error {
		if err := checkSpace(f, 2*uint64(tx.Size())); err != nil {
			return fmt.Errorf("a copy of %d bytes needs twice its size: %w", tx.Size(), err)
		}
		_, err := tx.WriteTo(contextWriter{ctx, f})
		return err
	})
}

// contextWriter fails once ctx is done.
type contextWriter struct {
	ctx context.Context
	w   io.Writer
}

func (c contextWriter) Write(b []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.w.Write(b)
}

// compactCopy marks a copy with the time when it was taken. It returns a compacted file,
// or from itself if little of it is free, and how many bytes of the file are the copy.
func (s *Store) compactCopy(from *os.File, at time.Time) (f *os.File, size int64, err error) {
	use, err := readUsage(from)
	if err != nil {
		return nil, 0, err
	}
	src, err := openUnlinked(from)
	if err != nil {
		return nil, 0, err
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	f, db := from, src
	if use.wasteful() {
		if f, err = s.unlinkedFile(); err != nil {
			return nil, 0, err
		}
		defer func() {
			if err != nil {
				_ = f.Close()
			}
		}()
		if db, err = openUnlinked(f); err != nil {
			return nil, 0, err
		}
		defer func() { err = errors.Join(err, db.Close()) }()
		stop := s.progress("backup in progress")
		defer stop()
		if err := guard(func() error { return bbolt.Compact(db, src, compactCommit) }); err != nil {
			return nil, 0, fmt.Errorf("compact the copy: %w", err)
		}
	}
	err = guard(func() error {
		err := db.Update(func(tx *bbolt.Tx) error {
			return tx.Bucket(bucketAbout).Put(keyCopied, packTime(keyCopied, at))
		})
		if err != nil {
			return fmt.Errorf("mark the copy: %w", err)
		}
		return db.View(func(tx *bbolt.Tx) error { size = tx.Size(); return nil })
	})
	return f, size, err
}

// openUnlinked opens a database in a file without a name, which need not survive a
// crash. Closing the database leaves the file open.
func openUnlinked(f *os.File) (db *bbolt.DB, err error) {
	o := options(Options{temporary: true}, func(string, int, fs.FileMode) (*os.File, error) {
		// A duplicate, because closing a database closes its file.
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		return os.NewFile(uintptr(fd), f.Name()), err
	})
	err = guard(func() error {
		db, err = bbolt.Open(f.Name(), 0, o)
		return err
	})
	if err == nil {
		db.AllocSize = chunk
	}
	return db, err
}

// Summary describes a copy; see [Inspect].
type Summary struct {
	Size        int64     // of the file, in bytes
	CopiedAt    time.Time // zero if it is not marked as a copy
	Deployments []DeploymentSummary
}

// DeploymentSummary counts the objects of one deployment in a copy.
type DeploymentSummary struct {
	Name                     string
	Keysets, Entries, Agents int
}

// Inspect checks a file as [Open] does and summarizes its contents. It changes nothing.
// If o has no Seal, it checks everything except whether signing keys and join tokens can
// be decrypted.
func Inspect(ctx context.Context, path string, o Options) (Summary, error) {
	o.ReadOnly = true
	s, err := open(path, o)
	if err != nil {
		return Summary{}, fmt.Errorf("check %s: %w", path, err)
	}
	defer s.Close()
	sum := Summary{CopiedAt: s.copied}
	err = s.view(ctx, func(tx *bbolt.Tx) error {
		info, err := s.file.Stat()
		if err != nil {
			return err
		}
		sum.Size = info.Size()
		deployments := tx.Bucket(bucketDeployments)
		return deployments.ForEachBucket(func(name []byte) error {
			b := deployments.Bucket(name)
			doc, err := decodeDocument(b)
			count := func(bucket string) int { return b.Bucket([]byte(bucket)).Stats().KeyN }
			sum.Deployments = append(sum.Deployments, DeploymentSummary{string(name), len(doc.Records), count(entries), count(agents)})
			return err
		})
	})
	return sum, err
}
