// Package svidstore holds workload SVIDs over a restart of the agent, so that a
// restarted agent serves what it held even while the server is down.
//
// Private keys must never reach a disk, so a [Dir] is opened only on a memory
// file system. Each entry is one file with its SVID, replaced by rename; a
// write costs what changed and not what is held. What is loaded is only a
// start: whether it is due is decided anew from the bundle.
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
)

// checkInterval is how soon a write that failed is tried again, and how often the
// folder is looked for.
const checkInterval = 10 * time.Second

// Dir is an open runtime_dir.
type Dir struct {
	path string
	log  *slog.Logger
	info fs.FileInfo // of the folder when it was prepared; owned by Follow

	mu        sync.Mutex
	err       error                  // why an SVID is not kept
	recordErr error                  // why what a process uses is not
	files     map[string][]cache.Use // path of each SVID's file -> what may be in it

	turn    chan struct{} // to write records: see readers.go
	records map[cache.Process][]cache.Use
}

// Open makes the folder (0700) if need be and checks that it belongs to this
// process's user and is on a memory file system (tmpfs or ramfs, by statfs(2)).
func Open(path string, log *slog.Logger) (*Dir, error) {
	info, err := prepare(path)
	if err != nil {
		return nil, err
	}
	return &Dir{
		path: path, log: log, info: info, files: make(map[string][]cache.Use),
		turn: make(chan struct{}, 1), records: make(map[cache.Process][]cache.Use),
	}, nil
}

func prepare(path string) (fs.FileInfo, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("make runtime_dir: %w", err)
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("look at runtime_dir: %w", err)
	}
	// Whoever owns the folder can replace the keys in it.
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return nil, fmt.Errorf("runtime_dir %s belongs to user %d and this process runs as %d: chown it, or run as its owner", path, st.Uid, os.Geteuid())
	}
	if err := os.Chmod(path, 0o700); err != nil {
		return nil, fmt.Errorf("protect runtime_dir: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return nil, fmt.Errorf("statfs %s: %w", path, err)
	}
	if t := uint32(st.Type); t != unix.TMPFS_MAGIC && t != unix.RAMFS_MAGIC {
		return nil, fmt.Errorf("runtime_dir %s is on a file system of type %#x: workload keys are kept in memory only, use a folder on tmpfs such as /run/renewd/svids", path, t)
	}
	return info, nil
}

// Err is nil when all that should be kept for a restart is, as far as has been
// tried. It may be called at any time.
func (d *Dir) Err() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return errors.Join(d.err, d.recordErr)
}

// Holds reports whether an SVID that the authority signed may be kept and be valid at
// now: one that would be served again after a restart. It may be called at any time.
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

// note records what may be in a file.
func (d *Dir) note(path string, uses ...cache.Use) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(uses) == 0 {
		delete(d.files, path)
	} else {
		d.files[path] = uses
	}
}

func (d *Dir) noted(path string) []cache.Use {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.files[path]
}

// remove deletes a file; it is no error when there is none.
func (d *Dir) remove(path string) error {
	err := os.Remove(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	d.note(path)
	return nil
}

const (
	suffix    = ".json"
	temporary = ".tmp" // after suffix, while a file is being written
)

// Load returns the entries kept and their SVIDs, each with the SPIFFE ID that its
// certificate has, which need not be that of the entry. Files that are broken or
// whose SVID has expired at now are removed, with a log line for each broken
// one: they would be minted anew anyway.
func (d *Dir) Load(now time.Time) ([]*cache.Entry, []*cache.SVID, error) {
	names, err := os.ReadDir(d.path)
	if err != nil {
		return nil, nil, fmt.Errorf("read runtime_dir: %w", err)
	}
	var entries []*cache.Entry
	var svids []*cache.SVID
	for _, name := range names {
		if !strings.HasSuffix(name.Name(), suffix) {
			continue
		}
		path := filepath.Join(d.path, name.Name())
		e, s, err := read(path)
		if err != nil {
			d.log.Warn("kept SVID dropped, it will be minted anew", "file", path, "error", err)
		}
		if err != nil || !s.NotAfter.After(now) {
			if err := d.remove(path); err != nil {
				return nil, nil, fmt.Errorf("drop a kept SVID: %w", err)
			}
			continue
		}
		d.note(path, use(s))
		entries, svids = append(entries, e), append(svids, s)
	}
	return entries, svids, nil
}

// file names an entry's file. Entry IDs come from the server and may hold
// anything, so the name is a hash.
func (d *Dir) file(entryID string) string {
	sum := sha256.Sum256([]byte(entryID))
	return filepath.Join(d.path, hex.EncodeToString(sum[:16])+suffix)
}

// Follow keeps the folder equal to the cache until ctx is done, and then
// brings it up to date once more and returns nil. It starts with dropping
// what the cache does not have. What cannot be written is tried again until it
// is; a folder that was removed or replaced is filled again.
func (d *Dir) Follow(ctx context.Context, c *cache.Cache) error {
	follower := c.Follow()
	defer follower.Close()
	kept, failed := make(map[string]written), make(map[string]struct{})
	first := follower.Drain()
	d.dropOthers(first)
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

// follow brings the files of these entries up to date, and those of all when the
// folder was replaced. failed are the entries for which that is still to be done.
func (d *Dir) follow(c *cache.Cache, changed []string, kept map[string]written, failed map[string]struct{}) {
	missing, err := d.missing(kept)
	for _, id := range append(changed, missing...) {
		updateErr := err // no key is written to what may be a disk
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
		d.report(updateErr)
	}
	if err != nil || len(failed) == 0 {
		d.report(err)
	}
}

// missing prepares the folder again when it is not the one that was prepared,
// and returns the entries whose files are not in it.
func (d *Dir) missing(kept map[string]written) ([]string, error) {
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
		d.note(d.file(id))
	}
	d.turn <- struct{}{}
	defer func() { <-d.turn }()
	clear(d.records)
	return ids, nil
}

// report logs when something comes to fail and when nothing does any more.
func (d *Dir) report(err error) {
	d.mu.Lock()
	before := d.err
	d.err = err
	d.mu.Unlock()
	switch {
	case err != nil && before == nil:
		d.log.Error("SVID not kept for a restart, trying again", "error", err)
	case err == nil && before != nil:
		d.log.Info("keeping SVIDs for a restart recovered")
	}
}

// written is what a file says.
type written struct {
	entry *cache.Entry
	svid  *cache.SVID
}

// dropOthers removes every file that is not that of one of the entries, and
// what a crash has left of a file that was being written.
func (d *Dir) dropOthers(entryIDs []string) {
	own := make(map[string]bool, len(entryIDs))
	for _, id := range entryIDs {
		own[d.file(id)] = true
	}
	files, err := filepath.Glob(filepath.Join(d.path, "*"+suffix))
	half, halfErr := filepath.Glob(filepath.Join(d.path, "*"+suffix+temporary))
	if err := errors.Join(err, halfErr); err != nil {
		d.log.Error("runtime_dir not cleaned", "error", err)
	}
	for _, f := range append(files, half...) {
		if !own[f] {
			if err := d.remove(f); err != nil {
				d.log.Error("runtime_dir not cleaned", "error", err)
			}
		}
	}
}

// update brings the file of one entry up to date.
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
		// The older SVID may be of an authority that is about to be removed: none
		// is better.
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
	// Before anything can be found in the file, and after: what is held may have been
	// replaced meanwhile.
	d.note(path, append(slices.Clone(d.noted(path)), use(item.SVID))...)
	if err := replace(path, data); err != nil {
		return err
	}
	d.note(path, use(item.SVID))
	return nil
}

func use(s *cache.SVID) cache.Use { return cache.Use{Authority: s.Authority, NotAfter: s.NotAfter} }

// replace writes a file. No fsync: the file system is memory, and rename alone keeps
// a reader from half a file.
func replace(path string, data []byte) error {
	if err := os.WriteFile(path+temporary, data, 0o600); err != nil {
		// A full file system needs the room of what was written.
		if removeErr := os.Remove(path + temporary); removeErr != nil && !errors.Is(removeErr, fs.ErrNotExist) {
			err = errors.Join(err, removeErr)
		}
		return fmt.Errorf("write: %w", err)
	}
	return os.Rename(path+temporary, path)
}
