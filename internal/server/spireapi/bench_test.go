package spireapi_test

import (
	"fmt"
	"runtime"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/test/memory"
)

// BenchmarkMint compares the server's X.509-SVIDs a second, over mTLS and with a
// ledger in memory, with the bare cost of a signature, with and without checking
// the CSR.
func BenchmarkMint(b *testing.B) {
	s := start(b, spireapi.Config{Ledger: openLedger(b)})
	_, c := s.join(b)
	s.apply(b, many(500))
	key, csr := newKey(b)
	id := spiffeid.RequireFromPath(td, "/workload/e00000")
	perSecond := func(b *testing.B, n int) { b.ReportMetric(float64(b.N*n)/b.Elapsed().Seconds(), "mints/s") }

	b.Run("bare signature", func(b *testing.B) {
		for b.Loop() {
			if _, err := s.Keysets().SignX509(id, key.Public(), 0); err != nil {
				b.Fatal(err)
			}
		}
		perSecond(b, 1)
	})
	b.Run("bare request and signature", func(b *testing.B) {
		for b.Loop() {
			public, err := keyset.ParseCSR(csr)
			if err == nil {
				_, err = s.Keysets().SignX509(id, public, 0)
			}
			if err != nil {
				b.Fatal(err)
			}
		}
		perSecond(b, 1)
	})
	for _, n := range []int{1, 500} {
		b.Run(fmt.Sprintf("call of %d", n), func(b *testing.B) {
			req := &svidv1.BatchNewX509SVIDRequest{}
			for i := range n {
				req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: fmt.Sprintf("e%05d", i), Csr: csr})
			}
			for b.Loop() {
				resp, err := c.BatchNewX509SVID(b.Context(), req)
				if err != nil || resp.GetResults()[n-1].GetSvid() == nil {
					b.Fatal(resp, err)
				}
			}
			perSecond(b, n)
		})
	}
}

// BenchmarkSync measures one agent's sync of its 100 entries, with more and more entries of
// other agents: when nothing has changed, after a change of one entry (which is not
// measured), and with half of the entries below an alias of each node.
func BenchmarkSync(b *testing.B) {
	for _, agents := range []int{1, 1000} {
		for _, kind := range []string{"unchanged", "after a change", "alias"} {
			b.Run(fmt.Sprintf("%s/entries=%d", kind, 100*agents), func(b *testing.B) {
				storage := memory.NewServer()
				s := start(b, spireapi.Config{Storage: storage})
				caller, c := s.join(b)
				entries := many(100 * agents)
				for i := range entries {
					entries[i].ParentID = parentOf(i/100, caller)
				}
				if kind == "alias" {
					for i := range entries {
						if i%2 == 0 {
							entries[i].ParentID = path(fmt.Sprintf("/node/%d", i/100))
						}
					}
					for n := range agents {
						entries = append(entries, alias(fmt.Sprintf("alias%d", n), fmt.Sprintf("/node/%d", n), inCluster, nodeUID(n)))
					}
					_, err := storage.UpdateAgent(b.Context(), caller.id, func(a *spireapi.Agent) (*spireapi.Agent, error) {
						a.Selectors = []spireapi.Selector{inCluster, nodeUID(0)}
						for n := range 20 {
							a.Selectors = append(a.Selectors, spireapi.Selector{Type: "k8s_psat", Value: fmt.Sprintf("agent_node_label:%d:x", n)})
						}
						return a, nil
					})
					check(b, err)
				}
				s.apply(b, entries)
				for n := 0; b.Loop(); n++ {
					if kind == "after a change" {
						b.StopTimer()
						e := entries[0]
						e.Hint = fmt.Sprint(n)
						_, err := s.UpsertEntry(b.Context(), e)
						check(b, err)
						b.StartTimer()
					}
					stream, err := c.SyncAuthorizedEntries(b.Context())
					if err == nil {
						err = stream.Send(&entryv1.SyncAuthorizedEntriesRequest{})
					}
					if err != nil {
						b.Fatal(err)
					}
					if resp, err := stream.Recv(); err != nil || len(resp.GetEntries()) != 100 {
						b.Fatal(resp, err)
					}
				}
			})
		}
	}
}

// parentOf returns the caller's ID for 0, another agent's otherwise.
func parentOf(n int, caller *identity) spiffeid.ID {
	if n == 0 {
		return caller.id
	}
	return path(fmt.Sprintf("/spire/agent/k8s_psat/one/%d", n))
}

func nodeUID(n int) spireapi.Selector {
	return spireapi.Selector{Type: "k8s_psat", Value: fmt.Sprintf("agent_node_uid:%d", n)}
}

// BenchmarkEntryChange measures a change of one entry, stored in memory, with more and more
// other entries: of one agent in a hundred entries, or of every agent.
func BenchmarkEntryChange(b *testing.B) {
	for _, parent := range []string{"agents", "everyone"} {
		for _, n := range []int{1000, 100_000} {
			b.Run(fmt.Sprintf("%s/entries=%d", parent, n), func(b *testing.B) {
				s := newServer(b, spireapi.Config{})
				entries := many(n)
				if parent == "agents" {
					for i := range entries {
						entries[i].ParentID = parentOf(1+i/100, nil)
					}
				}
				_, err := s.ApplyEntries(b.Context(), entries, false)
				check(b, err)
				for i := 0; b.Loop(); i++ {
					e := entries[i%n]
					e.Hint = fmt.Sprint(i)
					_, err := s.UpsertEntry(b.Context(), e)
					check(b, err)
				}
			})
		}
	}
}

// BenchmarkEntriesInMemory measures what 100,000 entries of 1,000 agents take in the server,
// those in the storage, which is in memory here, included.
func BenchmarkEntriesInMemory(b *testing.B) {
	entries := many(100_000)
	for i := range entries {
		entries[i].ParentID = parentOf(1+i/100, nil)
	}
	for b.Loop() {
		before := heap()
		s := newServer(b, spireapi.Config{})
		_, err := s.ApplyEntries(b.Context(), entries, false)
		check(b, err)
		b.ReportMetric(float64(heap()-before)/float64(len(entries)), "B/entry")
		runtime.KeepAlive(s)
	}
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
