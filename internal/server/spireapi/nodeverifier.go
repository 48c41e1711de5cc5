package spireapi

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/listen"
)

const (
	// verifyTime is how long a verifier may take. It is less than the ten seconds
	// after which the call gives way to others of the same address.
	verifyTime = 8 * time.Second
	// maxChallenges is how many challenges a verifier may send in one attestation.
	maxChallenges = 8
	// maxAgentID is the most bytes in a SPIFFE ID (SPIFFE-ID, section 2.3).
	maxAgentID = 2048
)

// NodeVerifier verifies one type of node attestation. It must be safe for concurrent
// use.
type NodeVerifier interface {
	// Type is the type that an agent names, such as "x509pop".
	Type() string
	// Verify checks an agent's payload, which comes from anybody. Each call of
	// challenge sends one challenge and returns the agent's answer; its error is
	// returned as it is. A payload that attests no node is refused with a gRPC status
	// (InvalidArgument, PermissionDenied): the agent gets it, and it is logged. Any
	// other error means that the verifier could not find out: it is logged, and the
	// agent gets Unavailable without it.
	//
	// ctx ends after eight seconds and has the caller as a gRPC peer.
	Verify(ctx context.Context, payload []byte, challenge func([]byte) ([]byte, error)) (AttestedNode, error)
}

// AttestedNode is what a [NodeVerifier] has found out. Such a node can attest at any
// time, so its agent attests again instead of renewing.
type AttestedNode struct {
	// ID is the agent's, below /spire/agent/.
	ID spiffeid.ID
	// Selectors describe the node, in any order.
	Selectors []Selector
}

// verifiersByType returns the verifiers by the type that an agent names.
func verifiersByType(all []NodeVerifier) (map[string]NodeVerifier, error) {
	out := make(map[string]NodeVerifier, len(all))
	for _, v := range all {
		if _, taken := out[v.Type()]; taken || v.Type() == joinToken || v.Type() == "" {
			return nil, fmt.Errorf("node verifiers: there are two of type %q", v.Type())
		}
		out[v.Type()] = v
	}
	return out, nil
}

// attestationTypes lists the types of attestation that the server accepts.
func (s *Server) attestationTypes() string {
	return strings.Join(append([]string{joinToken}, slices.Sorted(maps.Keys(*s.verifiers.Load()))...), ", ")
}

// verifyNode attests an agent with a verifier. Refusals are logged: whoever sets a node up
// looks for them on the server, too.
func (s *Server) verifyNode(stream grpc.BidiStreamingServer[agentv1.AttestAgentRequest, agentv1.AttestAgentResponse], v NodeVerifier, payload []byte) (AttestedNode, error) {
	ctx, cancel := context.WithTimeout(stream.Context(), verifyTime)
	defer cancel()
	challenges := 0
	node, err := v.Verify(ctx, payload, func(challenge []byte) ([]byte, error) {
		if challenges++; challenges > maxChallenges {
			return nil, status.Errorf(codes.ResourceExhausted, "attestation takes more than %d challenges", maxChallenges)
		}
		return exchange(stream, challenge)
	})
	if err == nil {
		err = s.checkNode(node)
	}
	if err == nil {
		slices.SortFunc(node.Selectors, func(a, b Selector) int {
			return cmp.Or(cmp.Compare(a.Type, b.Type), cmp.Compare(a.Value, b.Value))
		})
		node.Selectors = slices.Compact(node.Selectors)
		return node, nil
	}
	s.logNotAttested(ctx, v.Type(), err)
	switch _, refused := status.FromError(err); {
	case refused:
		return AttestedNode{}, err
	case errors.Is(err, context.DeadlineExceeded):
		return AttestedNode{}, status.Errorf(codes.Unavailable, "%s attestation not verified in time: try again later", v.Type())
	}
	return AttestedNode{}, status.Errorf(codes.Unavailable, "failed to verify the %s attestation: the server's log says why", v.Type())
}

// exchange sends a challenge and returns the answer.
func exchange(stream grpc.BidiStreamingServer[agentv1.AttestAgentRequest, agentv1.AttestAgentResponse], challenge []byte) ([]byte, error) {
	err := stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Challenge{Challenge: challenge}})
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, "challenge not sent")
	}
	req, err := stream.Recv()
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, "no answer to the challenge")
	}
	answer, ok := req.GetStep().(*agentv1.AttestAgentRequest_ChallengeResponse)
	if !ok {
		return nil, status.Error(codes.InvalidArgument, "expected an answer to the challenge")
	}
	return answer.ChallengeResponse, nil
}

// checkNode checks what a verifier returned.
func (s *Server) checkNode(n AttestedNode) error {
	switch id := n.ID.String(); {
	case !n.ID.MemberOf(s.td) || !strings.HasPrefix(n.ID.Path(), agentPath):
		return fmt.Errorf("%q is not the ID of an agent of %s", id, s.td)
	case len(id) > maxAgentID:
		return status.Errorf(codes.InvalidArgument, "the agent's ID would have %d bytes, more than %d", len(id), maxAgentID)
	}
	return nil
}

// logNotAttested logs why a node was not attested. An unknown kind may be of any length.
func (s *Server) logNotAttested(ctx context.Context, kind string, err error) {
	var from netip.Prefix
	if p, ok := peer.FromContext(ctx); ok {
		from = listen.Client(p.Addr)
	}
	s.lines.Note(slog.LevelWarn, "node not attested", listen.Name(from), "type", kind[:min(len(kind), 64)], "address", listen.Name(from), "error", err)
}
