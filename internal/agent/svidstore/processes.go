package svidstore

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/renewd/renewd/cache"
)

// Each process has a file that lists the SVIDs it may use, without any key. From it a
// restarted agent knows which processes may still use an SVID, also those that do not
// reconnect. The file is written before the answer with the SVID is sent, so it is
// there even if the agent is killed then. It may list too much until [Dir.Follow]
// updates it.

const processSuffix = ".process"

// processRecord is the content of the file of a process.
type processRecord struct {
	PID     int         `json:"pid"`
	Started uint64      `json:"started"`
	Uses    []cache.Use `json:"uses"`
}

func (d *Dir) processFile(p cache.Process) string {
	return filepath.Join(d.path, fmt.Sprintf("%d-%d%s", p.PID, p.Started, processSuffix))
}

// Record adds SVIDs to those that a process may use. Failures are logged, and
// [Dir.Follow] retries them. Record is safe for concurrent use.
func (d *Dir) Record(p cache.Process, uses []cache.Use) {
	d.recordLock <- struct{}{}
	defer func() { <-d.recordLock }()
	all := slices.Clone(d.records[p])
	for _, u := range uses {
		all = cache.AddUse(all, u)
	}
	if err := d.recordLocked(p, all); err != nil {
		d.setRecordErr(err)
	}
}

// recordLocked sets the SVIDs that a process may use, and writes or removes its file.
func (d *Dir) recordLocked(p cache.Process, uses []cache.Use) error {
	if equalUses(uses, d.records[p]) {
		return nil
	}
	path := d.processFile(p)
	if len(uses) == 0 {
		delete(d.records, p)
		return d.remove(path)
	}
	data, err := json.Marshal(processRecord{p.PID, p.Started, uses})
	if err != nil {
		return fmt.Errorf("encode: %w", err)
	}
	if err := replace(path, data); err != nil {
		return fmt.Errorf("process %d: %w", p.PID, err)
	}
	d.records[p] = uses
	return nil
}

// equalUses compares uses in any order.
func equalUses(a, b []cache.Use) bool {
	for _, u := range a {
		if !containsUse(b, u) {
			return false
		}
	}
	return len(a) == len(b)
}

func containsUse(uses []cache.Use, u cache.Use) bool {
	for _, v := range uses {
		if v.Authority == u.Authority && v.NotAfter.Equal(u.NotAfter) {
			return true
		}
	}
	return false
}

// sweep updates the files to what the processes use now. It reads the cache with
// recordLock held: an SVID about to be sent is in the cache's uses already, or is
// recorded afterwards.
func (d *Dir) sweep(c *cache.Cache) {
	d.recordLock <- struct{}{}
	defer func() { <-d.recordLock }()
	uses := c.Uses()
	var errs []error
	for p := range d.records {
		if _, used := uses[p]; !used {
			errs = append(errs, d.recordLocked(p, nil))
		}
	}
	for p, u := range uses {
		errs = append(errs, d.recordLocked(p, u))
	}
	d.setRecordErr(errors.Join(errs...))
}

// setRecordErr sets recordErr, and logs it or that storing has recovered.
func (d *Dir) setRecordErr(err error) {
	d.mu.Lock()
	d.recordErr = err
	d.mu.Unlock()
	if err != nil {
		d.lines.Note(slog.LevelError, "process record not stored, retrying", "records", "error", err)
	} else {
		d.lines.Over("records", "storing process records recovered")
	}
}

// LoadProcesses returns the SVIDs that processes may use, without those that have
// expired at now and processes that have ended. It removes the files of the others, and
// invalid ones with a log line each.
func (d *Dir) LoadProcesses(now time.Time, life func(cache.Process) cache.Life) (map[cache.Process][]cache.Use, error) {
	names, err := os.ReadDir(d.path)
	if err != nil {
		return nil, fmt.Errorf("read runtime_dir: %w", err)
	}
	d.recordLock <- struct{}{}
	defer func() { <-d.recordLock }()
	out := make(map[cache.Process][]cache.Use)
	for _, name := range names {
		path := filepath.Join(d.path, name.Name())
		if strings.HasSuffix(path, processSuffix+tempSuffix) {
			if err := d.remove(path); err != nil {
				return nil, fmt.Errorf("remove a partial process record: %w", err)
			}
		}
		if !strings.HasSuffix(path, processSuffix) {
			continue
		}
		p, uses, err := readProcess(path)
		if err == nil && path != d.processFile(p) {
			err = errors.New("the record is of another process")
		}
		if err != nil {
			d.log.Warn("invalid process record removed", "path", path, "error", err)
		}
		var valid []cache.Use
		for _, u := range uses {
			if u.NotAfter.After(now) {
				valid = append(valid, u)
			}
		}
		if err != nil || len(valid) == 0 || life(p) == cache.Ended {
			if err := d.remove(path); err != nil {
				return nil, fmt.Errorf("remove a process record: %w", err)
			}
			continue
		}
		d.records[p], out[p] = uses, valid
	}
	return out, nil
}

func readProcess(path string) (cache.Process, []cache.Use, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return cache.Process{}, nil, err
	}
	var r processRecord
	if err := json.Unmarshal(data, &r); err != nil {
		return cache.Process{}, nil, fmt.Errorf("not a record of this agent: %w", err)
	}
	return cache.Process{PID: r.PID, Started: r.Started}, r.Uses, nil
}
