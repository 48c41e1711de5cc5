package server_test

import (
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"google.golang.org/grpc/codes"

	"github.com/renewd/renewd/internal/server"
)

func TestAttestWithJoinToken(t *testing.T) {
	t.Parallel()
	bubble(t, server.Config{}, func(t *testing.T, s *running) {
		token, err := s.CreateJoinToken(t.Context(), time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		key, csr := newKey(t)
		c := s.dial(t, nil)
		svid, err := c.attest(t.Context(), "join_token", token, csr)
		if err != nil {
			t.Fatal(err)
		}
		who := newIdentity(t, svid, key)
		if got, want := who.id.String(), "spiffe://example.org/spire/agent/join_token/"+token; got != want {
			t.Errorf("agent ID %s, want %s", got, want)
		}
		if _, err := s.dial(t, who).PostStatus(t.Context(), &agentv1.PostStatusRequest{AgentVersion: "1.0"}); err != nil {
			t.Errorf("PostStatus: %v", err)
		}
		_, err = c.attest(t.Context(), "join_token", token, csr)
		wantCode(t, err, codes.InvalidArgument)
	})
}
