package store_test

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"sync/atomic"
	"testing"

	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// rows returns n rows of agents with 100 entries each.
func rows(n int) []ledger.Row {
	list := make([]ledger.Row, n)
	for i := range list {
		list[i] = rowOf(i)
	}
	return list
}

func rowOf(i int) ledger.Row {
	return ledger.Row{
		Authority: "0123456789abcdef0123456789abcdef01234567", Agent: fmt.Sprintf("spiffe://example.org/spire/agent/join_token/%08d", i/100),
		Entry: fmt.Sprintf("entry-of-a-workload-%08d", i), NotAfter: start,
	}
}

func BenchmarkCommitAlone(b *testing.B) {
	d := opened(b, newPath(b)).Deployment("default")
	n := 0
	for b.Loop() {
		if n++; update(b.Context(), d, n%1000, fmt.Sprint(n)) != nil {
			b.Fatal("not stored")
		}
	}
}

func BenchmarkCommit64Writers(b *testing.B) {
	s := opened(b, newPath(b))
	d := s.Deployment("default")
	var n atomic.Int64
	before := s.Commits(b)
	b.SetParallelism((64 + runtime.GOMAXPROCS(0) - 1) / runtime.GOMAXPROCS(0))
	b.RunParallel(func(p *testing.PB) {
		for p.Next() {
			i := int(n.Add(1))
			if err := update(b.Context(), d, i%1000, fmt.Sprint(i)); err != nil {
				b.Error(err)
			}
		}
	})
	b.ReportMetric(float64(b.N)/float64(s.Commits(b)-before), "writes/commit")
}

// BenchmarkLedger500 stores a full batch of SVIDs: 500 rows in one call.
func BenchmarkLedger500(b *testing.B) {
	d := opened(b, newPath(b)).Deployment("default")
	all := rows(100_000)
	n := 0
	for b.Loop() {
		at := n * 500 % len(all)
		n++
		if err := d.SaveLedger(b.Context(), ledger.Change{Put: all[at : at+500]}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkStart100k opens a store with 100,000 rows and as many entries, and
// reads them.
func BenchmarkStart100k(b *testing.B) {
	path := newPath(b)
	s := open(b, path)
	d := s.Deployment("default")
	all := rows(100_000)
	for len(all) > 0 {
		if err := d.SaveLedger(b.Context(), ledger.Change{Put: all[:1000]}); err != nil {
			b.Fatal(err)
		}
		var batch []spireapi.StoredEntry
		for _, r := range all[:1000] {
			batch = append(batch, spireapi.StoredEntry{Entry: spireapi.Entry{ID: r.Entry, SPIFFEID: agentID(1), ParentID: agentID(2), Selectors: []spireapi.Selector{{Type: "unix", Value: "uid:1000"}}}})
		}
		if err := d.PutEntries(b.Context(), batch, nil); err != nil {
			b.Fatal(err)
		}
		all = all[1000:]
	}
	closed(b, s)
	b.Run("open", func(b *testing.B) {
		b.ReportMetric(float64(len(readFile(b, path)))/1e6, "MB-file")
		for b.Loop() {
			closed(b, open(b, path))
		}
	})
	s = opened(b, path)
	d = s.Deployment("default")
	b.Run("ledger", func(b *testing.B) {
		b.ReportAllocs()
		n := 0
		for b.Loop() {
			n = 0
			if _, err := d.LoadLedger(b.Context(), func(ledger.Row) { n++ }); err != nil || n != 100_000 {
				b.Fatal(n, err)
			}
		}
	})
	b.Run("held", func(b *testing.B) {
		for b.Loop() {
			before := heap()
			held := make([]ledger.Row, 0, 100_000)
			if _, err := d.LoadLedger(b.Context(), func(r ledger.Row) { held = append(held, r) }); err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(heap()-before)/1e6, "MB-heap")
			runtime.KeepAlive(held)
		}
	})
	b.Run("entries", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if got, err := d.Entries(b.Context()); err != nil || len(got) != 100_000 {
				b.Fatal(len(got), err)
			}
		}
	})
}

// BenchmarkCompaction starts on a store with 100,000 rows, or RENEWD_ROWS, deletes all but a
// hundredth of them, and starts again, which compacts the file. Each commit is of one row.
func BenchmarkCompaction(b *testing.B) {
	n := 100_000
	if text := os.Getenv("RENEWD_ROWS"); text != "" {
		var err error
		if n, err = strconv.Atoi(text); err != nil || n < 100 {
			b.Fatalf("RENEWD_ROWS is %q, want 100 or more", text)
		}
	}
	path := newPath(b)
	s := open(b, path)
	d := s.Deployment("default")
	save := func(from, to int, change func([]ledger.Row) ledger.Change) {
		const batch = 4096
		for ; from < to; from += batch {
			var list []ledger.Row
			for i := from; i < min(from+batch, to); i++ {
				list = append(list, rowOf(i))
			}
			if err := d.SaveLedger(b.Context(), change(list)); err != nil {
				b.Fatal(err)
			}
		}
	}
	put := func(rows []ledger.Row) ledger.Change { return ledger.Change{Put: rows} }
	size := func(b *testing.B, path string) {
		info, err := os.Stat(path)
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(info.Size())/1e6, "MB-file")
	}
	commit := func(when string) {
		b.Run("commit/"+when, func(b *testing.B) {
			for b.Loop() {
				save(0, 1, put)
			}
			size(b, path)
		})
	}
	save(0, n, put)
	commit("full")
	closed(b, s)
	b.Run("start/full", func(b *testing.B) {
		for b.Loop() {
			s = open(b, path)
			closed(b, s)
		}
		size(b, path)
	})
	s = open(b, path)
	d = s.Deployment("default")
	save(n/100, n, func(rows []ledger.Row) ledger.Change { return ledger.Change{Gone: rows} })
	commit("deleted")
	b.Run("backup", func(b *testing.B) {
		for b.Loop() {
			if _, err := s.Backup(b.Context(), io.Discard); err != nil {
				b.Fatal(err)
			}
		}
	})
	closed(b, s)
	b.Run("start/deleted", func(b *testing.B) {
		var copied string
		for b.Loop() {
			b.StopTimer()
			copied = newPath(b)
			if out, err := exec.Command("cp", path, copied).CombinedOutput(); err != nil {
				b.Fatalf("%v: %s", err, out)
			}
			b.StartTimer()
			s = open(b, copied)
			b.StopTimer()
			closed(b, s)
			b.StartTimer()
		}
		size(b, copied)
	})
	s = opened(b, path)
	d = s.Deployment("default")
	commit("compacted")
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
