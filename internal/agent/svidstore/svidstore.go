// Package svidstore stores workload SVIDs over a restart of the agent, so that a
// restarted agent can serve them while the server is down.
//
// Private keys must never reach a disk, so a [Dir] must be on a memory file system.
// Each entry has one file with its SVID, which is replaced by rename. Whether a loaded
// SVID is due for renewal follows from the bundle, as for any other.
package svidstore

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/config"
	"github.com/renewd/renewd/internal/loglimit"
)

// checkInterval is how often failed writes are retried and the folder is checked.
const checkInterval = 10 * time.Second

// Dir is an open runtime_dir.
type Dir struct {
	path  string
	log   *slog.Logger
	lines *loglimit.Log // of failed writes
	info  fs.FileInfo   // of the folder as prepared; owned by Follow

	mu        sync.Mutex
	err       error                  // why an SVID is not stored
	recordErr error                  // why a process record is not
	files     map[string][]cache.Use // by path: what the SVID's file may contain

	recordLock chan struct{} // a value in it holds the lock of records and their files
	records    map[cache.Process][]cache.Use
}

// Open opens the folder and creates it (0700) if it is missing. It fails unless the
// folder belongs to this process's user and is on a memory file system (tmpfs or
// ramfs, by statfs(2)).
func Open(path string, log *slog.Logger) (*Dir, error) {
	info, err := prepare(path)
	if err != nil {
		return nil, err
	}
	return &Dir{
		path: path, log: log, lines: loglimit.New(log, loglimit.Interval, 2), info: info, files: make(map[string][]cache.Use),
		recordLock: make(chan struct{}, 1), records: make(map[cache.Process][]cache.Use),
	}, nil
}

// prepare makes the folder private. Its errors passed [config.FileError].
func prepare(path string) (fs.FileInfo, error) {
	info, err := prepareFolder(path)
	return info, config.FileError(err)
}

func prepareFolder(path string) (fs.FileInfo, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("create runtime_dir: %w", err)
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("stat runtime_dir: %w", err)
	}
	// The owner of the folder can replace the keys in it.
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return nil, fmt.Errorf("runtime_dir %s belongs to user %d and this process runs as %d: chown it, or run as its owner", path, st.Uid, os.Geteuid())
	}
	if err := os.Chmod(path, 0o700); err != nil {
		return nil, fmt.Errorf("chmod runtime_dir: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return nil, fmt.Errorf("statfs %s: %w", path, err)
	}
	if t := uint32(st.Type); t != unix.TMPFS_MAGIC && t != unix.RAMFS_MAGIC {
		return nil, fmt.Errorf("runtime_dir %s is on a file system of type %#x, but workload keys must stay in memory: use a folder on tmpfs such as /run/renewd/svids", path, t)
	}
	return info, nil
}

// Err returns nil unless the last attempt to store an SVID or a process record failed.
// It is safe for concurrent use.
func (d *Dir) Err() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return errors.Join(d.err, d.recordErr)
}

// Holds reports whether the folder may have an SVID that the authority signed and that
// is valid at now, so that a restarted agent would serve it. It is safe for concurrent
// use.
func (d *Dir) Holds(authority string, now time.Time) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, uses := range d.files {
		for _, u := range uses {
			if u.Authority == authority && u.NotAfter.After(now) {
				return true
			}
		}
	}
	return false
}

// noteFile sets what a file may contain.
func (d *Dir) noteFile(path string, uses ...cache.Use) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(uses) == 0 {
		delete(d.files, path)
	} else {
		d.files[path] = uses
	}
}

func (d *Dir) usesIn(path string) []cache.Use {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.files[path]
}

// remove deletes a file, if there is one.
func (d *Dir) remove(path string) error {
	err := os.Remove(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	d.noteFile(path)
	return nil
}

const (
	svidSuffix = ".json"
	tempSuffix = ".tmp" // appended to the name during a write
)

// Load returns the stored entries and their SVIDs. An SVID has the SPIFFE ID of its
// certificate, which may differ from the entry's. Load removes the files that are
// invalid, with a log line each, and those whose SVID has expired at now.
func (d *Dir) Load(now time.Time) ([]*cache.Entry, []*cache.SVID, error) {
	names, err := os.ReadDir(d.path)
	if err != nil {
		return nil, nil, fmt.Errorf("read runtime_dir: %w", err)
	}
	var entries []*cache.Entry
	var svids []*cache.SVID
	for _, name := range names {
		if !strings.HasSuffix(name.Name(), svidSuffix) {
			continue
		}
		path := filepath.Join(d.path, name.Name())
		e, s, err := read(path)
		if err != nil {
			d.log.Warn("invalid stored SVID removed", "path", path, "error", err)
		}
		if err != nil || !s.NotAfter.After(now) {
			if err := d.remove(path); err != nil {
				return nil, nil, fmt.Errorf("remove a stored SVID: %w", err)
			}
			continue
		}
		d.noteFile(path, use(s))
		entries, svids = append(entries, e), append(svids, s)
	}
	return entries, svids, nil
}

// file returns the path of an entry's file. Its name is a hash, because entry IDs come
// from the server and may contain any character.
func (d *Dir) file(entryID string) string {
	sum := sha256.Sum256([]byte(entryID))
	return filepath.Join(d.path, hex.EncodeToString(sum[:16])+svidSuffix)
}

// Follow keeps the folder equal to the cache until ctx is done, updates it once more
// and returns nil. First it removes the files of entries that the cache does not have.
// It retries failed writes, and writes all files again after the folder was removed or
// replaced.
func (d *Dir) Follow(ctx context.Context, c *cache.Cache) error {
	follower := c.Follow()
	defer follower.Close()
	kept, failed := make(map[string]written), make(map[string]struct{})
	first := follower.Drain()
	d.removeOthers(first)
	d.follow(c, first, kept, failed)
	d.sweep(c)
	check := time.NewTicker(checkInterval)
	defer check.Stop()
	for {
		select {
		case <-ctx.Done():
			d.follow(c, slices.AppendSeq(follower.Drain(), maps.Keys(failed)), kept, failed)
			d.sweep(c)
			return nil
		case <-follower.C():
			d.follow(c, follower.Drain(), kept, failed)
		case <-check.C:
			d.follow(c, slices.Collect(maps.Keys(failed)), kept, failed)
			d.sweep(c)
		}
	}
}

// follow updates the files of these entries, or of all when the folder was replaced.
// failed has the entries whose last update failed.
func (d *Dir) follow(c *cache.Cache, changed []string, kept map[string]written, failed map[string]struct{}) {
	missing, err := d.reopen(kept)
	for _, id := range append(changed, missing...) {
		updateErr := err // the folder may be on a disk: no key is written
		if err == nil {
			if updateErr = d.update(c, id, kept); updateErr != nil {
				updateErr = fmt.Errorf("entry %s: %w", id, updateErr)
			}
		}
		if updateErr == nil {
			delete(failed, id)
			continue
		}
		failed[id] = struct{}{}
		d.setErr(updateErr)
	}
	if err != nil || len(failed) == 0 {
		d.setErr(err)
	}
}

// reopen prepares the folder if it was replaced, and returns the entries whose files
// it lacks.
func (d *Dir) reopen(kept map[string]written) ([]string, error) {
	info, err := os.Stat(d.path)
	if err == nil && os.SameFile(info, d.info) {
		return nil, nil
	}
	if info, err = prepare(d.path); err != nil {
		return nil, err
	}
	d.info = info
	d.log.Warn("runtime_dir replaced, writing the SVIDs into it", "path", d.path)
	ids := slices.Collect(maps.Keys(kept))
	clear(kept)
	for _, id := range ids {
		d.noteFile(d.file(id))
	}
	d.recordLock <- struct{}{}
	defer func() { <-d.recordLock }()
	clear(d.records)
	return ids, nil
}

// setErr sets err, and logs it or that storing has recovered.
func (d *Dir) setErr(err error) {
	d.mu.Lock()
	d.err = err
	d.mu.Unlock()
	if err != nil {
		d.lines.Note(slog.LevelError, "SVID not stored, retrying", "svids", "error", err)
	} else {
		d.lines.Over("svids", "storing SVIDs recovered")
	}
}

// written is the content of a file.
type written struct {
	entry *cache.Entry
	svid  *cache.SVID
}

// removeOthers removes the files of other entries than these, and partial files that a
// crash has left.
func (d *Dir) removeOthers(entryIDs []string) {
	wanted := make(map[string]bool, len(entryIDs))
	for _, id := range entryIDs {
		wanted[d.file(id)] = true
	}
	files, err := filepath.Glob(filepath.Join(d.path, "*"+svidSuffix))
	partial, partialErr := filepath.Glob(filepath.Join(d.path, "*"+svidSuffix+tempSuffix))
	if err := errors.Join(err, partialErr); err != nil {
		d.log.Error("runtime_dir not cleaned", "error", err)
	}
	for _, f := range append(files, partial...) {
		if !wanted[f] {
			if err := d.remove(f); err != nil {
				d.log.Error("runtime_dir not cleaned", "error", err)
			}
		}
	}
}

// update writes or removes the file of one entry.
func (d *Dir) update(c *cache.Cache, id string, kept map[string]written) error {
	item, held := c.Item(id)
	switch {
	case !held || item.SVID == nil:
		delete(kept, id)
		return d.remove(d.file(id))
	case kept[id] == written{item.Entry, item.SVID}:
		return nil
	}
	if err := d.write(item); err != nil {
		delete(kept, id)
		// Remove the older SVID: its authority may be about to be removed.
		return errors.Join(err, d.remove(d.file(id)))
	}
	kept[id] = written{item.Entry, item.SVID}
	return nil
}

func (d *Dir) write(item cache.Item) error {
	data, err := encode(item.Entry, item.SVID)
	if err != nil {
		return fmt.Errorf("encode: %w", err)
	}
	path := d.file(item.Entry.ID)
	// The file may have the SVID before as well as this one until replace returns.
	d.noteFile(path, append(slices.Clone(d.usesIn(path)), use(item.SVID))...)
	if err := replace(path, data); err != nil {
		return err
	}
	d.noteFile(path, use(item.SVID))
	return nil
}

func use(s *cache.SVID) cache.Use { return cache.Use{Authority: s.Authority, NotAfter: s.NotAfter} }

// replace writes a file atomically. It does not sync: the file system is memory.
func replace(path string, data []byte) error {
	if err := os.WriteFile(path+tempSuffix, data, 0o600); err != nil {
		// Free the space: the file system may be full.
		if removeErr := os.Remove(path + tempSuffix); removeErr != nil && !errors.Is(removeErr, fs.ErrNotExist) {
			err = errors.Join(err, removeErr)
		}
		return fmt.Errorf("write: %w", err)
	}
	return os.Rename(path+tempSuffix, path)
}
