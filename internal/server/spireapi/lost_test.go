package spireapi_test

import (
	"testing"
	"testing/synctest"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/test/memory"
)

// TestLostTimeEnds: an SVID that begins in the lost time and lives for longer than the
// server signs for is forged, with the key of a keyset that is still published. Otherwise
// it would let its holder take over the agent for as long as that keyset is in the bundle.
func TestLostTimeEnds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		keys, err := keyset.Open(t.Context(), keyset.Config{TrustDomain: td, Storage: new(memory.Keysets)})
		check(t, err)
		old := keys.Active()
		from := time.Now()
		// An agent of the copy, and SVIDs for it that are signed in the lost time.
		store := memory.NewServer()
		first := start(t, spireapi.Config{Storage: store, Keysets: keys})
		agent, _ := first.join(t)
		first.stop()
		time.Sleep(time.Hour)
		sign := func(ttl time.Duration) *identity {
			t.Helper()
			key, _ := newKey(t)
			svid, err := keys.SignX509(agent.id, key.Public(), ttl)
			check(t, err)
			return newIdentity(t, &types.X509SVID{CertChain: [][]byte{svid.DER}, Id: &types.SPIFFEID{Path: agent.id.Path()}}, key)
		}
		longest, forged := sign(keyset.MaxX509TTL), sign(80*24*time.Hour)
		time.Sleep(time.Hour)
		to := time.Now()

		for name, config := range map[string]spireapi.Config{
			"by the time of the restore": {}, "by a clock that was behind": {LostUntil: func() time.Time { return to }},
		} {
			config.Storage, config.Keysets = store, keys
			config.Lost = []spireapi.Lost{{From: from, To: to}}
			s := start(t, config)
			_, csr := newKey(t)
			_, err := s.dial(t, forged).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr}})
			if code := status.Code(err); code != codes.PermissionDenied {
				t.Errorf("%s: got %v, want code PermissionDenied", name, err)
			}
			s.stop()
		}
		s := start(t, spireapi.Config{Storage: store, Keysets: keys, Lost: []spireapi.Lost{{From: from, To: to}}})
		if err := s.dial(t, longest).ping(t.Context()); err != nil {
			t.Errorf("an SVID of the longest life: %v", err)
		}
		time.Sleep(30 * 24 * time.Hour)
		next, err := keys.Prepare(t.Context())
		check(t, err)
		check(t, keys.Activate(t.Context(), next.ID))
		check(t, keys.Taint(t.Context(), old.ID))
		wantCode(t, s.dial(t, forged).ping(t.Context()), codes.PermissionDenied, notActive)
	})
}
