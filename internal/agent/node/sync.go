package node

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"
)

const (
	// syncInterval is how often Run compares the disk with the wanted content and
	// retries failed writes. Comparing takes a few calls of stat(2).
	syncInterval = 10 * time.Second
	// writeTimeout is how long a write may take before its file counts as not
	// saved: a network file system may hang without an error.
	writeTimeout = 30 * time.Second
	// diskTimeout is how long the renewal of the agent SVID waits for the disk. A
	// slow disk takes less.
	diskTimeout = 5 * time.Second
)

var (
	errClosed      = errors.New("data_dir is closed")
	errDiskTimeout = fmt.Errorf("the disk of data_dir does not answer within %v", diskTimeout)
)

// Sync writes the files that differ from their wanted content. When the folder was
// replaced by another one, Sync locks that and writes all files. It writes nothing
// when nothing has changed.
func (s *Store) Sync() error {
	s.diskLock <- struct{}{}
	defer func() { <-s.diskLock }()
	if s.closed {
		return errClosed
	}
	s.setSyncing(time.Now())
	defer s.setSyncing(time.Time{})
	err := s.reopenLocked()
	if err == nil {
		err = s.folder.checkAccess()
	}
	s.mu.Lock()
	s.folderErr = err
	files := slices.DeleteFunc(slices.Clone(Files), func(file string) bool {
		_, ours := s.files[file]
		return !ours
	})
	s.mu.Unlock()
	if err == nil {
		var errs []error
		for _, file := range files {
			errs = append(errs, s.writeLocked(file))
		}
		err = errors.Join(errs...)
	}
	if err == nil {
		err = s.probeLocked()
	}
	if err != nil {
		s.lines.Note(slog.LevelWarn, "state not written to data_dir, trying again", "", "path", s.dir, "error", err)
	} else {
		s.lines.Over("", "writing to data_dir recovered", "path", s.dir)
	}
	return err
}

// probeLocked ends the failure of an identity that is not to be written later, when the
// disk takes one again: the next renewal would succeed.
func (s *Store) probeLocked() error {
	s.mu.Lock()
	failed := s.identityErr != nil
	s.mu.Unlock()
	if !failed {
		return nil
	}
	if err := s.folder.probe(); err != nil {
		return fmt.Errorf("%s: %w", identityFile, err)
	}
	s.setIdentityErr(nil)
	return nil
}

func (s *Store) setSyncing(since time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.syncing = since
}

// reopenLocked opens the folder that the path leads to now, unless it is open
// already.
func (s *Store) reopenLocked() error {
	if s.closed {
		return errClosed
	}
	if s.folder.isCurrent() {
		return nil
	}
	f, err := openFolder(s.dir)
	if err != nil {
		return fmt.Errorf("open data_dir again: %w", err)
	}
	_ = s.folder.close() // every write was synced
	s.folder = f
	s.log.Warn("data_dir replaced, writing the agent's state into it", "path", s.dir)
	s.mu.Lock()
	defer s.mu.Unlock()
	for file, k := range s.files {
		k.stamp = stamp{}
		s.files[file] = k
	}
	return nil
}

// writeLocked writes one file if it differs from its wanted content.
func (s *Store) writeLocked(file string) error {
	err := s.reopenLocked()
	k := s.file(file)
	at := k.stamp
	if err == nil {
		if file == identityFile {
			s.addStored(k.identity)
		}
		at, err = s.writeToLocked(s.folder, file, k)
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", file, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now, still := s.files[file]
	if !still {
		return err
	}
	if now.generation == k.generation { // its wanted content has not changed meanwhile
		now.err = err
		if err == nil {
			now.since = time.Time{}
		} else if now.since.IsZero() {
			now.since = time.Now()
		}
	}
	if err == nil {
		now.stamp = at
		if file == identityFile {
			s.stored = nil
			if k.identity != nil {
				s.stored = []*Identity{k.identity}
			}
			if !k.since.IsZero() {
				s.identityErr = nil
			}
		}
	}
	s.files[file] = now
	return err
}

func (s *Store) writeToLocked(f *folder, file string, k fileState) (stamp, error) {
	have, err := f.stamp(file)
	if err != nil {
		return stamp{}, err
	}
	if k.encode == nil {
		if have == (stamp{}) {
			return have, nil
		}
		return stamp{}, f.remove(file)
	}
	if k.since.IsZero() && have == k.stamp && have != (stamp{}) {
		return have, nil
	}
	b, err := k.encode()
	if err != nil {
		return stamp{}, fmt.Errorf("encode: %w", err)
	}
	if file == identityFile && have != k.stamp && have != (stamp{}) {
		if err := s.moveForeignIdentity(f, b); err != nil {
			return stamp{}, err
		}
	}
	return f.write(file, b)
}

// moveForeignIdentity moves the identity file aside when it has become that of another
// node, whose only copy of the key this may be.
func (s *Store) moveForeignIdentity(f *folder, ours []byte) error {
	found, _, err := f.read(identityFile)
	if err != nil {
		return err
	}
	mine, err := decodeIdentity(ours)
	if err != nil {
		return err
	}
	other, err := decodeIdentity(found)
	if err == nil && other.ID() == mine.ID() {
		s.addStored(other)
		return nil
	}
	to, err := f.moveAside(identityFile, "other", time.Now())
	if err != nil {
		return err
	}
	s.log.Warn("identity.json belongs to another agent, moved aside", "path", f.path, "moved_to", to)
	return nil
}

// Unsaved returns the [Files] whose wanted content is not on disk, with the reasons.
// It does no I/O.
func (s *Store) Unsaved() map[string]error {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make(map[string]error)
	if s.identityErr != nil {
		out[identityFile] = s.identityErr
	}
	for file, k := range s.files {
		switch {
		case k.since.IsZero():
		case s.folderErr != nil:
			out[file] = s.folderErr
		case k.err != nil:
			out[file] = k.err
		case time.Since(k.since) > writeTimeout:
			out[file] = fmt.Errorf("%s: the disk has not answered for %v", file, writeTimeout)
		}
	}
	return out
}

// Err returns nil when the last Sync found all files saved and the folder writable. It
// does no I/O.
func (s *Store) Err() error {
	unsaved := s.Unsaved()
	s.mu.Lock()
	err, syncing := s.folderErr, s.syncing
	s.mu.Unlock()
	if err != nil {
		return err
	}
	if !syncing.IsZero() && time.Since(syncing) > writeTimeout {
		return fmt.Errorf("the disk has not answered for %v", writeTimeout)
	}
	var errs []error
	for _, file := range Files {
		errs = append(errs, unsaved[file])
	}
	return errors.Join(errs...)
}
