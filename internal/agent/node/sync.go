package node

import (
	"errors"
	"fmt"
	"slices"
	"time"
)

const (
	// syncInterval is how often what is on disk is compared with what should
	// be, and how soon a write that failed is tried again. Looking costs a few
	// calls of stat(2).
	syncInterval = 10 * time.Second
	// writeLimit is how long a write may take before what it writes counts as
	// not on disk: a file system on a network may hang without an error.
	writeLimit = 30 * time.Second
	// answerLimit is how long the renewal of the agent SVID waits for the disk. A
	// disk that is only slow takes less.
	answerLimit = 5 * time.Second
)

var (
	errClosed = errors.New("data_dir is closed")
	errHangs  = fmt.Errorf("the disk of data_dir does not answer within %v", answerLimit)
)

// Sync writes what is to be on disk and is not there, as it was last read or
// written. When the path of the folder leads to another folder by now, that one
// is locked and gets all of it. It does not write when nothing has changed.
func (s *Store) Sync() error {
	s.turn <- struct{}{}
	defer func() { <-s.turn }()
	if s.closed {
		return errClosed
	}
	s.setSyncing(time.Now())
	defer s.setSyncing(time.Time{})
	err := s.follow()
	if err == nil {
		err = s.folder.access()
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
			errs = append(errs, s.write(file))
		}
		err = errors.Join(errs...)
	}
	switch {
	case err != nil && s.failing.IsZero():
		s.failing = time.Now()
		s.log.Warn("state not written to data_dir, trying again", "path", s.dir, "error", err)
	case err == nil && !s.failing.IsZero():
		s.log.Info("writing to data_dir recovered", "path", s.dir, "after", time.Since(s.failing).Round(time.Millisecond).String())
		s.failing = time.Time{}
	}
	return err
}

func (s *Store) setSyncing(since time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.syncing = since
}

// follow opens the folder that the path leads to now, unless it is open
// already. It is for the holder of turn.
func (s *Store) follow() error {
	if s.closed {
		return errClosed
	}
	if s.folder.current() {
		return nil
	}
	f, err := openFolder(s.dir)
	if err != nil {
		return fmt.Errorf("open data_dir again: %w", err)
	}
	_ = s.folder.close() // nothing was written since its last sync
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

// write brings one file to what it should be. It is for the holder of turn.
func (s *Store) write(file string) error {
	err := s.follow()
	k := s.file(file)
	at := k.stamp
	if err == nil {
		if file == identityFile {
			s.noteStored(k.identity)
		}
		at, err = s.writeTo(s.folder, file, k)
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
	if now.generation == k.generation { // not saved again meanwhile
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

func (s *Store) writeTo(f *folder, file string, k kept) (stamp, error) {
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
		if err := s.moveAsideOther(f, b); err != nil {
			return stamp{}, err
		}
	}
	return f.write(file, b)
}

// moveAsideOther moves the identity file aside when somebody has put that of
// another node there: with it a key would be lost that nobody else has.
func (s *Store) moveAsideOther(f *folder, ours []byte) error {
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
		s.noteStored(other)
		return nil
	}
	to, err := f.setAside(identityFile, "other", time.Now())
	if err != nil {
		return err
	}
	s.log.Warn("identity.json is not the one of this agent, moved aside", "path", f.path, "moved_to", to)
	return nil
}

// Unsaved says which of [Files] are not on disk as they should be, and why. It
// does no I/O.
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
		case time.Since(k.since) > writeLimit:
			out[file] = fmt.Errorf("%s: the disk has not answered for %v", file, writeLimit)
		}
	}
	return out
}

// Err is nil when everything is on disk and the next change could be written,
// as of the last Sync. It does no I/O.
func (s *Store) Err() error {
	unsaved := s.Unsaved()
	s.mu.Lock()
	err, syncing := s.folderErr, s.syncing
	s.mu.Unlock()
	if err != nil {
		return err
	}
	if !syncing.IsZero() && time.Since(syncing) > writeLimit {
		return fmt.Errorf("the disk has not answered for %v", writeLimit)
	}
	var errs []error
	for _, file := range Files {
		errs = append(errs, unsaved[file])
	}
	return errors.Join(errs...)
}
