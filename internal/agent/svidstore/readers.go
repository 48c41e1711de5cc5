package svidstore

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/renewd/renewd/cache"
)

// What each process may use is kept in a file of its own, without any key: a restarted
// agent then knows which processes may still use an SVID, also those that do not come
// back soon. A file is written before the answer that makes it necessary, whatever
// happens to the agent afterwards. It says too much until [Dir.Follow] has seen that
// less is used.

const processSuffix = ".process"

// processRecord is the content of a process's file.
type processRecord struct {
	PID     int         `json:"pid"`
	Started uint64      `json:"started"`
	Uses    []cache.Use `json:"uses"`
}

func (d *Dir) processFile(p cache.Process) string {
	return filepath.Join(d.path, fmt.Sprintf("%d-%d%s", p.PID, p.Started, processSuffix))
}

// Record keeps what a process can use from now on, together with what it could before.
// A failure is logged and tried again by [Dir.Follow]. Concurrent calls wait for each
// other: a write to memory takes microseconds.
func (d *Dir) Record(p cache.Process, uses []cache.Use) {
	d.turn <- struct{}{}
	defer func() { <-d.turn }()
	all := slices.Clone(d.records[p])
	for _, u := range uses {
		all = cache.AddUse(all, u)
	}
	if err := d.record(p, all); err != nil {
		d.reportRecord(err)
	}
}

// record has the file of a process say what it uses. It is for the holder of turn.
func (d *Dir) record(p cache.Process, uses []cache.Use) error {
	if equal(uses, d.records[p]) {
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

// equal compares uses in any order.
func equal(a, b []cache.Use) bool {
	for _, u := range a {
		if !has(b, u) {
			return false
		}
	}
	return len(a) == len(b)
}

func has(uses []cache.Use, u cache.Use) bool {
	for _, v := range uses {
		if v.Authority == u.Authority && v.NotAfter.Equal(u.NotAfter) {
			return true
		}
	}
	return false
}

// sweep makes the files say what the processes use now. The cache is asked while
// nobody can record: what a stream is about to send counts there already, or is
// recorded afterwards.
func (d *Dir) sweep(c *cache.Cache) {
	d.turn <- struct{}{}
	defer func() { <-d.turn }()
	uses := c.Uses()
	var errs []error
	for p := range d.records {
		if _, used := uses[p]; !used {
			errs = append(errs, d.record(p, nil))
		}
	}
	for p, u := range uses {
		errs = append(errs, d.record(p, u))
	}
	d.reportRecord(errors.Join(errs...))
}

// reportRecord logs when something comes to fail and when nothing does any more.
func (d *Dir) reportRecord(err error) {
	d.mu.Lock()
	before := d.recordErr
	d.recordErr = err
	d.mu.Unlock()
	switch {
	case err != nil && before == nil:
		d.log.Error("what a process uses not kept for a restart, trying again", "error", err)
	case err == nil && before != nil:
		d.log.Info("keeping what processes use recovered")
	}
}

// LoadProcesses returns what processes could use when the agent ended, as far as
// they run still and it has not expired at now. Other files, and broken ones, are removed.
func (d *Dir) LoadProcesses(now time.Time, life func(cache.Process) cache.Life) (map[cache.Process][]cache.Use, error) {
	names, err := os.ReadDir(d.path)
	if err != nil {
		return nil, fmt.Errorf("read runtime_dir: %w", err)
	}
	d.turn <- struct{}{}
	defer func() { <-d.turn }()
	out := make(map[cache.Process][]cache.Use)
	for _, name := range names {
		path := filepath.Join(d.path, name.Name())
		if strings.HasSuffix(path, processSuffix+temporary) {
			if err := d.remove(path); err != nil {
				return nil, fmt.Errorf("drop half a record: %w", err)
			}
		}
		if !strings.HasSuffix(path, processSuffix) {
			continue
		}
		p, uses, err := readProcess(path)
		if err == nil && path != d.processFile(p) {
			err = errors.New("it is that of another process")
		}
		if err != nil {
			d.log.Warn("kept record of a process dropped", "file", path, "error", err)
		}
		var valid []cache.Use
		for _, u := range uses {
			if u.NotAfter.After(now) {
				valid = append(valid, u)
			}
		}
		if err != nil || len(valid) == 0 || life(p) == cache.Ended {
			if err := d.remove(path); err != nil {
				return nil, fmt.Errorf("drop the record of a process: %w", err)
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
		return cache.Process{}, nil, fmt.Errorf("not a record of this program: %w", err)
	}
	return cache.Process{PID: r.PID, Started: r.Started}, r.Uses, nil
}
