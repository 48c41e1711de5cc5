package spireapi_test

import (
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/test/memory"
)

func openLedger(t testing.TB) *ledger.Ledger {
	t.Helper()
	l, err := ledger.Open(t.Context(), ledger.Config{Storage: memory.Ledger{}})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// TestRotationWithALedger takes two agents through a rotation: one reports that it
// has replaced everything, and the node of the other is confirmed gone.
func TestRotationWithALedger(t *testing.T) {
	t.Parallel()
	l := openLedger(t)
	bubble(t, spireapi.Config{Ledger: l}, func(t *testing.T, s *running) {
		s.apply(t, many(3))
		_, good := s.join(t)
		silent, c := s.join(t)
		old := s.Keysets().Active()
		mint := func(c *client) {
			t.Helper()
			_, csr := newKey(t)
			req := &svidv1.BatchNewX509SVIDRequest{}
			for _, e := range many(3) {
				req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: e.ID, Csr: csr})
			}
			if _, err := c.BatchNewX509SVID(t.Context(), req); err != nil {
				t.Fatal(err)
			}
			if _, err := c.NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: "e00000", Audience: []string{"x"}}); err != nil {
				t.Fatal(err)
			}
		}
		holds := func(svids, agents int, clear bool) {
			t.Helper()
			if h := l.X509(old.X509AuthorityID, true); h.SVIDs != svids || h.Agents != agents || h.Clear != clear {
				t.Errorf("held are %+v, want %d SVIDs, %d agents, clear %v", h, svids, agents, clear)
			}
		}
		mint(good)
		mint(c)
		next, err := s.Keysets().Prepare(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Keysets().Activate(t.Context(), next.ID); err != nil {
			t.Fatal(err)
		}
		if err := s.Keysets().Taint(t.Context(), old.ID); err != nil {
			t.Fatal(err)
		}
		holds(8, 2, false)
		mint(good)
		holds(8, 2, false) // the replacements may not have arrived

		_, err = good.PostStatus(t.Context(), &agentv1.PostStatusRequest{CurrentBundleSerial: s.Keysets().Bundle().Sequence})
		if err != nil {
			t.Fatal(err)
		}
		err = good.report(t.Context(), &api.ReportRequest{
			BundleSequence: s.Keysets().Bundle().Sequence, TaintRate: 20,
			Authorities: []*api.AuthorityReport{{AuthorityId: old.X509AuthorityID, Tainted: true, Settled: true}},
		})
		if err != nil {
			t.Fatal(err)
		}
		holds(4, 1, false)
		if err := s.EvictAgent(t.Context(), silent.id, false); err != nil {
			t.Fatal(err)
		}
		holds(4, 1, false)
		if err := s.EvictAgent(t.Context(), silent.id, true); err != nil {
			t.Fatal(err)
		}
		holds(0, 0, true)
		if until, clear := l.JWT(old.JWTKeyID, true); clear || until.Before(time.Now().Add(23*time.Hour)) {
			t.Errorf("the old key's JWT-SVIDs end %v, clear %v", until, clear)
		}
	})
}
