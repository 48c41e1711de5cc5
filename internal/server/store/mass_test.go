package store_test

import (
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/store"
)

// BenchmarkMass fills a store with 100,000 or RENEWD_ROWS ledger rows and deletes 99 of
// 100. It measures the time of each step, the time of a commit after it, and the file's
// size.
//
//	RENEWD_ROWS=10000000 go test -run '^$' -bench Mass -benchtime 1x -timeout 1h ./internal/server/store
func BenchmarkMass(b *testing.B) {
	n := 100_000
	if rows, err := strconv.Atoi(os.Getenv("RENEWD_ROWS")); err == nil {
		n = rows
	}
	for b.Loop() {
		mass(b, n)
	}
}

func mass(b *testing.B, n int) {
	path := newPath(b)
	s := open(b, path)
	begin := time.Now()
	done := func(step string) {
		took := time.Since(begin)
		const commits = 100
		commit := time.Now()
		for i := range commits {
			if err := update(b.Context(), s.Deployment("default"), i, step); err != nil {
				b.Fatal(err)
			}
		}
		b.Logf("%-30s %8.2f s; then %6.2f ms a commit, file %6.1f MB, process at most %.0f MB",
			step, took.Seconds(), time.Since(commit).Seconds()*1000/commits, float64(sizeOf(b, path))/1e6, peak())
		begin = time.Now()
	}
	all := func(what func(rows []ledger.Row) ledger.Change, from int) {
		const batch = 50_000
		for ; from < n; from += batch {
			if err := s.Deployment("default").SaveLedger(b.Context(), what(rowsFrom(from, min(n, from+batch)))); err != nil {
				b.Fatal(err)
			}
		}
	}
	backup := func() {
		size, err := s.Backup(b.Context(), io.Discard)
		if err != nil {
			b.Fatal(err)
		}
		done(fmt.Sprintf("backup of %.1f MB", float64(size)/1e6))
	}
	reopen := func() *store.Store {
		closed(b, s)
		begin = time.Now()
		return open(b, path)
	}
	done("empty")
	all(func(rows []ledger.Row) ledger.Change { return ledger.Change{Put: rows} }, 0)
	done("rows put")
	backup()
	s = reopen()
	done("opened")
	before := heap()
	begin = time.Now()
	l, err := ledger.Open(b.Context(), ledger.Config{Storage: s.Deployment("default"), Clock: clock.New(func() time.Time { return start }, nil, time.Time{})})
	if err != nil {
		b.Fatal(err)
	}
	took := time.Since(begin)
	b.Logf("%-30s %8.2f s; %.0f MB of heap", "ledger opened", took.Seconds(), float64(heap()-before)/1e6)
	runtime.KeepAlive(l)
	runtime.GC()
	begin = time.Now()
	all(func(rows []ledger.Row) ledger.Change { return ledger.Change{Gone: rows} }, n/100)
	done("99 in 100 deleted")
	backup()
	s = reopen()
	done("opened, compacted")
	s = reopen()
	done("opened again")
	backup()
	closed(b, s)
}

// rowsFrom returns a range of rows; see rows.
func rowsFrom(from, to int) []ledger.Row {
	list := make([]ledger.Row, 0, to-from)
	for i := from; i < to; i++ {
		list = append(list, rowOf(i))
	}
	return list
}

// peak returns the peak memory of the process in MB, the mapped file included.
func peak() float64 {
	var kb float64
	status, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(status)) {
		_, _ = fmt.Sscanf(line, "VmHWM: %f", &kb)
	}
	return kb / 1000
}
