package cache_test

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/cache"
)

// Bytes held for each SVID, with the content (DER, key, strings), the entry and the
// indexes, at the sizes of a P-256 SVID.
func BenchmarkHeldSVID(b *testing.B) {
	for _, n := range []int{10_000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			for b.Loop() {
				before := heap()
				c := cache.New(cache.Config{Limit: n})
				c.SetBundle(snapshot(b))
				for i := range n {
					e := &cache.Entry{
						ID:        fmt.Sprintf("5e1a2f0c-77d4-4a3b-9d59-%012d", i),
						SPIFFEID:  spiffeid.RequireFromPathf(td, "/ns/production/sa/service-%06d", i),
						Selectors: []cache.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", i)}, {Type: "unix", Value: "path:/usr/bin/service"}},
					}
					c.Update([]*cache.Entry{e}, nil)
					chain := make([]byte, 560)
					s := &cache.SVID{ID: e.SPIFFEID, EntryID: e.ID, Leaf: chain, Key: make([]byte, 138), Authority: "A",
						NotBefore: time.Now(), RenewAt: time.Now(), NotAfter: time.Now().Add(time.Hour)}
					if err := c.Put(s); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(heap()-before)/float64(n), "B/SVID")
				runtime.KeepAlive(c)
			}
		})
	}
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// The cost of Put and of each stream's View for one new SVID, which must not depend on the
// number of other SVIDs.
func BenchmarkPutAndView(b *testing.B) {
	for _, n := range []int{1_000, 100_000} {
		b.Run(fmt.Sprintf("held=%d", n), func(b *testing.B) {
			c := cache.New(cache.Config{Limit: n})
			c.SetBundle(snapshot(b))
			var first *cache.Entry
			for i := range n {
				e := entry(fmt.Sprint(i), fmt.Sprint(i))
				c.Update([]*cache.Entry{e}, nil)
				if err := c.Put(svid(e, "A")); err != nil {
					b.Fatal(err)
				}
				if i == 0 {
					first = e
				}
			}
			sub := c.Subscribe(cache.Process{}, sel("0"))
			defer sub.Close()
			s := svid(first, "A")
			b.ReportAllocs()
			for b.Loop() {
				if err := c.Put(s); err != nil {
					b.Fatal(err)
				}
				sub.View()
				sub.Sending()
				sub.Read()
			}
		})
	}
}
