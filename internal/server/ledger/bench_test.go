package ledger_test

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/server/ledger"
)

// ids returns entry IDs as a server holds them.
func ids() []string {
	out := make([]string, 100_000)
	for i := range out {
		out[i] = fmt.Sprintf("%08x-0000-4000-8000-%012x", i%100, i)
	}
	return out
}

// fill records 100 rows for each of 1,000 agents.
func fill(b *testing.B, l *ledger.Ledger, entries []string) {
	end := time.Now().Add(day)
	rows := make([]ledger.Row, 100)
	for a := range 1000 {
		agent := fmt.Sprintf("spiffe://example.org/spire/agent/join_token/%026d", a)
		for i := range rows {
			rows[i] = row("d5a9c2f4e1b07a8d6c3f9e2b4a7c1d0e8f6b5a43", agent, entries[a*100+i],
				end.Add(time.Duration(a*100+i)*time.Second/2))
		}
		check(b, l.RecordX509(b.Context(), rows...))
	}
}

// The bytes of 100,000 rows in memory, without the entry IDs, which a server holds
// anyway.
func BenchmarkMemory(b *testing.B) {
	entries := ids()
	for b.Loop() {
		l := open(b, nil, nil)
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		fill(b, l, entries)
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/100_000, "B/row")
		runtime.KeepAlive(l)
		runtime.KeepAlive(entries)
	}
}

func BenchmarkRecordX509(b *testing.B) {
	for _, n := range []int{1, 100} {
		b.Run(fmt.Sprint("rows=", n), func(b *testing.B) {
			l := open(b, newMemory(), nil)
			fill(b, l, ids())
			rows := make([]ledger.Row, n)
			for i := range rows {
				rows[i] = row("another", "spiffe://example.org/agent", fmt.Sprint(i), time.Now().Add(day))
			}
			b.ReportAllocs()
			for b.Loop() {
				end := l.Begin()
				check(b, l.RecordX509(b.Context(), rows...))
				end()
			}
		})
	}
}

func BenchmarkX509(b *testing.B) {
	l := open(b, nil, nil)
	fill(b, l, ids())
	b.ReportAllocs()
	for b.Loop() {
		if h := l.X509("d5a9c2f4e1b07a8d6c3f9e2b4a7c1d0e8f6b5a43", true); h.SVIDs != 100_000 {
			b.Fatal(h)
		}
	}
}

func BenchmarkHolders(b *testing.B) {
	l := open(b, nil, nil)
	fill(b, l, ids())
	b.ReportAllocs()
	for b.Loop() {
		if h := l.Holders("d5a9c2f4e1b07a8d6c3f9e2b4a7c1d0e8f6b5a43"); len(h) != 1000 {
			b.Fatal(len(h))
		}
	}
}
