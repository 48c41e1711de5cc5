package server_test

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"golang.org/x/sync/errgroup"

	"github.com/renewd/renewd/internal/server"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/seal"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/internal/server/store"
	"github.com/renewd/renewd/test/listentest"
)

// BenchmarkMint measures the X.509-SVIDs a second of a server over mTLS, with its store
// in the temporary folder, and the bare cost of a signature.
func BenchmarkMint(b *testing.B) {
	c := newConfig(b, "default")
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	check(b, err)
	c.Deployments[0].Listener = unlimited(lis)
	r := run(b, c)
	entries := make([]spireapi.Entry, 500)
	for i := range entries {
		entries[i] = entry(i, spiffeid.ID{})
	}
	_, err = r.Server("default").ApplyEntries(b.Context(), entries, false)
	check(b, err)
	a := r.join("default")
	key, csr := newKey(b)
	perSecond := func(b *testing.B, n int) { b.ReportMetric(float64(b.N*n)/b.Elapsed().Seconds(), "mints/s") }

	b.Run("bare signature", func(b *testing.B) {
		keys := r.Server("default").Keysets()
		for b.Loop() {
			if _, err := keys.SignX509(entries[0].SPIFFEID, key.Public(), 0); err != nil {
				b.Fatal(err)
			}
		}
		perSecond(b, 1)
	})
	call := func(ctx context.Context, first, n int) error {
		req := &svidv1.BatchNewX509SVIDRequest{}
		for i := range n {
			req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: entries[(first+i)%len(entries)].ID, Csr: csr})
		}
		resp, err := a.BatchNewX509SVID(ctx, req)
		if err == nil && resp.GetResults()[n-1].GetSvid() == nil {
			err = fmt.Errorf("no SVID: %v", resp)
		}
		return err
	}
	for _, callers := range []int{1, 16, 64} {
		b.Run(fmt.Sprintf("calls of 1 by %d", callers), func(b *testing.B) {
			var next atomic.Int64
			var group errgroup.Group
			b.ResetTimer()
			for range callers {
				group.Go(func() error {
					for {
						n := int(next.Add(1))
						if n > b.N {
							return nil
						}
						if err := call(b.Context(), n, 1); err != nil {
							return err
						}
					}
				})
			}
			check(b, group.Wait())
			perSecond(b, 1)
		})
	}
	b.Run("calls of 500 by 1", func(b *testing.B) {
		for b.Loop() {
			check(b, call(b.Context(), 0, 500))
		}
		perSecond(b, 500)
	})
}

// unlimited hides the callers' IP addresses. The limits for one address are below what
// the server can do.
func unlimited(l net.Listener) net.Listener { return listentest.From(l, &net.UnixAddr{}) }

// BenchmarkHeld measures the memory of a server of 1,000 agents with 100 entries each,
// all with a valid SVID, and the time to open its store.
func BenchmarkHeld(b *testing.B) {
	c := newConfig(b, "default")
	populate(b, c, 1000, 100)
	for b.Loop() {
		before := heap()
		begin := time.Now()
		d, err := server.Open(b.Context(), c)
		check(b, err)
		b.ReportMetric(time.Since(begin).Seconds(), "s-open")
		b.ReportMetric(float64(heap()-before)/1e6, "MB")
		check(b, d.Close())
	}
	r := run(b, c)
	list := r.keysets("default")
	if list.GetAgents() != 1000 || len(r.Server("default").Entries()) != 100_000 || list.GetKeysets()[0].GetLiveX509Svids() != 100_000 {
		b.Fatalf("not everything was loaded: %v", list)
	}
}

func heap() uint64 {
	runtime.GC()
	runtime.GC() // frees what finalizers and pools have released
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func entry(i int, parent spiffeid.ID) spireapi.Entry {
	return spireapi.Entry{
		ID: fmt.Sprintf("%08x-0000-4000-8000-%012x", i%100, i), SPIFFEID: spiffeid.RequireFromPathf(td, "/workload/%06d", i), ParentID: parent,
		Selectors: []spireapi.Selector{{Type: "unix", Value: "uid:1000"}, {Type: "unix", Value: fmt.Sprintf("path:/usr/bin/workload-%06d", i)}},
	}
}

// populate fills a store with agents that have so many entries each.
func populate(b *testing.B, c server.Config, agents, each int) {
	b.Helper()
	d, err := server.Open(b.Context(), c) // makes the first keyset
	check(b, err)
	authority := d.Server("default").Keysets().Active().X509AuthorityID
	check(b, d.Close())
	key, err := seal.File(c.KeyFile)
	check(b, err)
	s, err := store.Open(filepath.Join(c.DataDir, server.FileName), store.Options{TrustDomain: td, Seal: key})
	check(b, err)
	kept := s.Deployment("default")
	end := time.Now().Add(keyset.DefaultX509TTL)
	var group errgroup.Group
	group.SetLimit(64) // concurrent writers share commits
	for n := range agents {
		id := spiffeid.RequireFromPathf(td, "/spire/agent/join_token/%026d", n)
		group.Go(func() error {
			_, err := kept.UpdateAgent(b.Context(), id, func(*spireapi.Agent) (*spireapi.Agent, error) {
				return &spireapi.Agent{ID: id, Type: "join_token", Serial: fmt.Sprintf("%039d", n), ExpiresAt: end, Version: "1.2.3"}, nil
			})
			return err
		})
		var change ledger.Change
		var entries []spireapi.StoredEntry
		for i := range each {
			e := entry(n*each+i, id)
			entries = append(entries, spireapi.StoredEntry{Entry: e, Revision: 1, CreatedAt: end.Add(-keyset.DefaultX509TTL)})
			change.Put = append(change.Put, ledger.Row{Authority: authority, Agent: id.String(), Entry: e.ID, NotAfter: end.Add(time.Duration(i) * time.Second)})
		}
		group.Go(func() error { return kept.SaveLedger(b.Context(), change) })
		group.Go(func() error { return kept.PutEntries(b.Context(), entries, nil) })
	}
	check(b, group.Wait())
	check(b, s.Close())
}
