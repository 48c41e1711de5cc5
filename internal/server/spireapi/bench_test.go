package spireapi_test

import (
	"fmt"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/spireapi"
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

// BenchmarkSync measures one agent's sync of its 100 entries, with more and more
// entries of other agents.
func BenchmarkSync(b *testing.B) {
	for _, agents := range []int{1, 1000} {
		b.Run(fmt.Sprintf("%d entries", 100*agents), func(b *testing.B) {
			s := start(b, spireapi.Config{})
			caller, c := s.join(b)
			entries := many(100 * agents)
			for i := range entries {
				entries[i].ParentID = caller.id
				if i >= 100 {
					entries[i].ParentID = spiffeid.RequireFromPathf(td, "/spire/agent/join_token/%d", i/100)
				}
			}
			s.apply(b, entries)
			for b.Loop() {
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
