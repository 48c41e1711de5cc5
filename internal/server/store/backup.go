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

// Backup writes a copy of the store, as it is at one moment, to w, in parts of at
// most 256 KiB, and returns its size in bytes. It carries the mark of a copy;
// see [Deployment.Restored]. Everybody else reads and writes meanwhile. Of several
// calls one is served at a time.
//
// The copy is made in the store's own folder first, in files that have no name
// and go with this call, and w gets it from there. As long as the store itself is
// read nothing that is given up in it can be used again: it would grow for as
// long as w takes, and once it has outgrown its mapping, every writer would wait
// for w. Like this that is the time that the disk takes to copy the file as it is. Where
// more than half of that is free it is compacted after that, and w may take its own time.
//
// The folder must have room for two copies of the file: one for this one, and one left
// for the server. ctx ends what is under way, except a call of w and the compaction.
func (s *Store) Backup(ctx context.Context, w io.Writer) (size int64, err error) {
	select {
	case s.copying <- struct{}{}:
		defer func() { <-s.copying }()
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	f, err := s.nameless()
	if err != nil {
		return 0, fmt.Errorf("copy store %s: %w", s.path, err)
	}
	defer f.Close()
	// Before the copy, so that all that was given out by then is in it.
	at := s.now()
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
	if _, err := io.CopyBuffer(patient{ctx, w}, struct{ io.Reader }{r}, make([]byte, chunk)); err != nil {
		return 0, fmt.Errorf("copy store %s: %w", s.path, err)
	}
	return size, nil
}

// nameless makes a file beside the store that ends with its descriptor.
func (s *Store) nameless() (*os.File, error) {
	f, err := os.CreateTemp(filepath.Dir(s.path), "."+filepath.Base(s.path)+".copy.*") // mode 0600
	if err != nil {
		return nil, fmt.Errorf("make a file beside it: %w", cause(err))
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(fmt.Errorf("make a file beside it: %w", cause(err)), f.Close())
	}
	return f, nil
}

func (s *Store) copyTo(ctx context.Context, f *os.File) error {
	return s.view(ctx, func(tx *bbolt.Tx) error {
		if err := room(f, 2*uint64(tx.Size())); err != nil {
			return fmt.Errorf("a copy of %d bytes needs twice its size: %w", tx.Size(), err)
		}
		_, err := tx.WriteTo(patient{ctx, f})
		return err
	})
}

// patient is a writer until ctx is done.
type patient struct {
	ctx context.Context
	w   io.Writer
}

func (p patient) Write(b []byte) (int, error) {
	if err := p.ctx.Err(); err != nil {
		return 0, err
	}
	return p.w.Write(b)
}

// compactCopy makes a compact copy of one that was taken at a time, marked as a copy, and
// returns how much of the file it is. Where little is free in it that is the other one. The files have no name, and nothing of them need outlive the process.
func (s *Store) compactCopy(from *os.File, at time.Time) (f *os.File, size int64, err error) {
	use, err := readUsage(from)
	if err != nil {
		return nil, 0, err
	}
	src, err := openNameless(from)
	if err != nil {
		return nil, 0, err
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	f, db := from, src
	if use.wasteful() {
		if f, err = s.nameless(); err != nil {
			return nil, 0, err
		}
		defer func() {
			if err != nil {
				_ = f.Close()
			}
		}()
		if db, err = openNameless(f); err != nil {
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

// openNameless opens a database in a file without a name. Closing it leaves the file
// open.
func openNameless(f *os.File) (db *bbolt.DB, err error) {
	o := options(false, func(string, int, fs.FileMode) (*os.File, error) {
		// Closing a database closes its file.
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		return os.NewFile(uintptr(fd), f.Name()), err
	})
	o.NoSync, o.NoGrowSync = true, true
	err = guard(func() error {
		db, err = bbolt.Open(f.Name(), 0, o)
		return err
	})
	if err == nil {
		db.AllocSize = chunk
	}
	return db, err
}

// Summary is what [Inspect] finds in a copy.
type Summary struct {
	Size        int64     // of the file, in bytes
	CopiedAt    time.Time // zero: it does not carry the mark of a copy
	Deployments []DeploymentSummary
}

// DeploymentSummary counts what a copy has of one deployment.
type DeploymentSummary struct {
	Name                     string
	Keysets, Entries, Agents int
}

// Inspect checks a file as [Open] does and says what is in it. It changes
// nothing. Where o has no Seal, signing keys and join tokens stay sealed: whether
// they can be opened is not looked at, all else is.
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
