package spireapi_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/test/memory"
)

const mustReattest = types.PermissionDeniedDetails_AGENT_MUST_REATTEST

// fakeVerifier is a NodeVerifier of type fake.
type fakeVerifier func(ctx context.Context, payload string, challenge func([]byte) ([]byte, error)) (spireapi.AttestedNode, error)

func (fakeVerifier) Type() string { return "fake" }

func (f fakeVerifier) Verify(ctx context.Context, payload []byte, challenge func([]byte) ([]byte, error)) (spireapi.AttestedNode, error) {
	return f(ctx, string(payload), challenge)
}

// askName is a verifier that asks for the node's name and believes it. Its selectors are
// the words of the payload.
func askName(_ context.Context, payload string, challenge func([]byte) ([]byte, error)) (spireapi.AttestedNode, error) {
	name, err := challenge([]byte("name?"))
	if err != nil {
		return spireapi.AttestedNode{}, err
	}
	node := spireapi.AttestedNode{ID: spiffeid.RequireFromSegments(td, "spire", "agent", "fake", string(name))}
	for _, value := range strings.Fields(payload) {
		node.Selectors = append(node.Selectors, spireapi.Selector{Type: "fake", Value: value})
	}
	return node, nil
}

// attestNode attests with type fake, answers each challenge with a name, and returns the
// answer and the node's identity.
func (c *client) attestNode(t *testing.T, payload, name string) (*agentv1.AttestAgentResponse_Result, *identity, error) {
	t.Helper()
	key, csr := newKey(t)
	stream, err := c.AttestAgent(t.Context())
	check(t, err)
	check(t, stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data: &types.AttestationData{Type: "fake", Payload: []byte(payload)}, Params: &agentv1.AgentX509SVIDParams{Csr: csr},
	}}}))
	for {
		resp, err := stream.Recv()
		if err != nil {
			return nil, nil, err
		}
		if result := resp.GetResult(); result != nil {
			return result, newIdentity(t, result.GetSvid(), key), nil
		}
		_ = stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: []byte(name)}})
	}
}

func (r *running) renew(t *testing.T, caller *identity) error {
	t.Helper()
	_, csr := newKey(t)
	_, err := r.dial(t, caller).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr}})
	return err
}

// TestAttestNode: a node attests by what it is, again and again, and never renews.
func TestAttestNode(t *testing.T) {
	t.Parallel()
	log := new(records)
	bubble(t, spireapi.Config{NodeVerifiers: []spireapi.NodeVerifier{fakeVerifier(askName)}, Log: log.logger()}, func(t *testing.T, s *running) {
		c := s.dial(t, nil)
		stored := func() spireapi.Agent {
			t.Helper()
			agents, err := s.Agents(t.Context())
			check(t, err)
			if len(agents) != 1 {
				t.Fatalf("agents %v", agents)
			}
			return agents[0]
		}
		result, first, err := c.attestNode(t, "z b z a", "n1")
		check(t, err)
		if !result.GetReattestable() || first.id.String() != "spiffe://example.org/spire/agent/fake/n1" {
			t.Errorf("result %v", result)
		}
		want := []spireapi.Selector{{Type: "fake", Value: "a"}, {Type: "fake", Value: "b"}, {Type: "fake", Value: "z"}}
		if a := stored(); a.Type != "fake" || !a.Reattestable || !slices.Equal(a.Selectors, want) {
			t.Errorf("stored %+v", a)
		}
		firstConn := s.dial(t, first)
		check(t, firstConn.ping(t.Context()))
		wantCode(t, s.renew(t, first), codes.PermissionDenied, mustReattest)
		check(t, firstConn.ping(t.Context()))

		time.Sleep(time.Hour)
		_, second, err := c.attestNode(t, "c", "n1")
		check(t, err)
		wantCode(t, s.dial(t, first).ping(t.Context()), codes.PermissionDenied, notActive)
		check(t, s.dial(t, second).ping(t.Context()))
		if a := stored(); !slices.Equal(a.Selectors, []spireapi.Selector{{Type: "fake", Value: "c"}}) || a.Version != "1.0" {
			t.Errorf("after another attestation: %+v", a)
		}

		check(t, s.BanAgent(t.Context(), second.id))
		_, _, err = c.attestNode(t, "c", "n1")
		wantCode(t, err, codes.PermissionDenied, banned)
		if lines := log.take(t, "node not attested"); len(lines) != 1 || lines[0]["type"] != "fake" {
			t.Errorf("log of a banned agent's attestation: %v", lines)
		}
		time.Sleep(30 * 24 * time.Hour) // longer than expired agents are kept
		_ = s.token(t)                  // deletes them
		_, _, err = c.attestNode(t, "c", "n1")
		wantCode(t, err, codes.PermissionDenied, banned)
		check(t, s.EvictAgent(t.Context(), second.id, false))
		_, _, err = c.attestNode(t, "c", "n1")
		check(t, err)
	})
}

// TestAttestedNodesAreDeleted: agents of nodes that no longer exist are deleted, without
// a join token being made.
func TestAttestedNodesAreDeleted(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{NodeVerifiers: []spireapi.NodeVerifier{fakeVerifier(askName)}}, func(t *testing.T, s *running) {
		c := s.dial(t, nil)
		for i := range 12 {
			_, _, err := c.attestNode(t, "a", fmt.Sprint("n", i))
			check(t, err)
			time.Sleep(time.Minute)
		}
		for range 40 { // one node stays
			time.Sleep(6 * time.Hour)
			_, _, err := c.attestNode(t, "a", "n0")
			check(t, err)
		}
		agents, err := s.Agents(t.Context())
		check(t, err)
		if len(agents) != 1 {
			t.Errorf("%d agents are left, want the one that attests", len(agents))
		}
	})
}

// TestAttestNodeRefuses: what an agent learns of each failure, and what the log has.
func TestAttestNodeRefuses(t *testing.T) {
	t.Parallel()
	verify := func(ctx context.Context, payload string, challenge func([]byte) ([]byte, error)) (spireapi.AttestedNode, error) {
		id := spiffeid.RequireFromPath(td, "/spire/agent/fake/n1")
		switch payload {
		case "refused":
			return spireapi.AttestedNode{}, status.Error(codes.PermissionDenied, "no such node")
		case "failed":
			return spireapi.AttestedNode{}, errors.New("connection refused by 10.0.0.7")
		case "hangs":
			<-ctx.Done()
			return spireapi.AttestedNode{}, fmt.Errorf("ask: %w", ctx.Err())
		case "endless":
			for {
				if _, err := challenge([]byte("again")); err != nil {
					return spireapi.AttestedNode{}, err
				}
			}
		case "workload":
			id = spiffeid.RequireFromPath(td, "/workload")
		case "foreign":
			id = spiffeid.RequireFromString("spiffe://other.example/spire/agent/fake/n1")
		case "long":
			id = spiffeid.RequireFromPath(td, "/spire/agent/fake/"+strings.Repeat("n", 2048))
		case "stolen":
			id = spiffeid.RequireFromPath(td, "/spire/agent/join_token/taken")
		}
		return spireapi.AttestedNode{ID: id}, nil
	}
	log, store := new(records), memory.NewServer()
	c := spireapi.Config{NodeVerifiers: []spireapi.NodeVerifier{fakeVerifier(verify)}, Storage: store, Log: log.logger()}
	bubble(t, c, func(t *testing.T, s *running) {
		taken := spiffeid.RequireFromPath(td, "/spire/agent/join_token/taken")
		_, err := store.UpdateAgent(t.Context(), taken, func(*spireapi.Agent) (*spireapi.Agent, error) {
			return &spireapi.Agent{ID: taken, Type: "join_token", Serial: "1", ExpiresAt: time.Now().Add(time.Hour)}, nil
		})
		check(t, err)
		at := s.from(t, "10.0.0.1")
		for _, tt := range []struct {
			payload string
			code    codes.Code
			says    string // to the agent
			logs    string
		}{
			{"refused", codes.PermissionDenied, "no such node", "no such node"},
			{"failed", codes.Unavailable, "the server's log says why", "connection refused by 10.0.0.7"},
			{"hangs", codes.Unavailable, "not verified in time", "deadline exceeded"},
			{"endless", codes.ResourceExhausted, "more than 8 challenges", "challenges"},
			{"workload", codes.Unavailable, "the server's log says why", "is not the ID of an agent"},
			{"foreign", codes.Unavailable, "the server's log says why", "is not the ID of an agent"},
			{"long", codes.InvalidArgument, "more than 2048", "2048"},
			{"stolen", codes.PermissionDenied, "is attested by join_token", "evict it"},
		} {
			begin := time.Now()
			_, _, err := at.dial(t, nil).attestNode(t, tt.payload, "x")
			wantCode(t, err, tt.code)
			if !strings.Contains(err.Error(), tt.says) || strings.Contains(err.Error(), "10.0.0.7") {
				t.Errorf("%s: the agent gets %v", tt.payload, err)
			}
			if d := time.Since(begin); d > 8*time.Second {
				t.Errorf("%s: takes %v", tt.payload, d)
			}
			lines := log.take(t, "node not attested")
			if len(lines) != 1 || !strings.Contains(fmt.Sprint(lines[0]["error"]), tt.logs) || lines[0]["address"] != "10.0.0.1/32" || lines[0]["type"] != "fake" {
				t.Errorf("%s: the log has %v", tt.payload, lines)
			}
			time.Sleep(2 * time.Minute)
			_ = log.take(t, "node not attested")
		}
		if agents, err := s.Agents(t.Context()); err != nil || len(agents) != 1 || agents[0].Type != "join_token" {
			t.Errorf("agents %v, %v", agents, err)
		}
		_, csr := newKey(t)
		_, err = at.dial(t, nil).attest(t.Context(), "tpm", "x", csr)
		wantCode(t, err, codes.FailedPrecondition)
		if !strings.Contains(err.Error(), "accepts join_token, fake") {
			t.Errorf("unknown type: %v", err)
		}
	})
}

// TestVerifiersAreOfDifferentTypes: which of two would verify is not left to chance.
func TestVerifiersAreOfDifferentTypes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, spireapi.Config{})
		_, err := spireapi.New(spireapi.Config{
			TrustDomain: td, Keysets: s.Keysets(), Storage: memory.NewServer(), Ledger: newFakeLedger(),
			NodeVerifiers: []spireapi.NodeVerifier{fakeVerifier(askName), fakeVerifier(askName)},
		})
		if err == nil {
			t.Error("accepted two of one type")
		}
	})
}

// TestSilentNodesGiveWay: nodes that do not answer their challenge take all places of an
// address. A node of that address still attests after ten seconds.
func TestSilentNodesGiveWay(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{NodeVerifiers: []spireapi.NodeVerifier{fakeVerifier(askName)}}, func(t *testing.T, s *running) {
		at := s.from(t, "10.0.0.1")
		stranger, node := at.dial(t, nil), at.dial(t, nil)
		_, csr := newKey(t)
		for range 4 {
			stream, err := stranger.AttestAgent(t.Context())
			check(t, err)
			check(t, stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
				Data: &types.AttestationData{Type: "fake", Payload: []byte("x")}, Params: &agentv1.AgentX509SVIDParams{Csr: csr},
			}}}))
			resp, err := stream.Recv()
			check(t, err)
			if resp.GetChallenge() == nil {
				t.Fatalf("got %v", resp)
			}
		}
		_, err := node.GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
		wantCode(t, err, codes.ResourceExhausted)
		time.Sleep(10 * time.Second)
		_, _, err = node.attestNode(t, "a", "n1")
		check(t, err)
	})
}
