package spireapi

import (
	"context"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// NodeVerifier verifies one type of node attestation. It must be safe for concurrent
// use.
type NodeVerifier interface {
	// Type is the type that an agent names, such as "x509pop".
	Type() string
	// Verify checks an agent's payload. Each call of challenge sends one challenge and
	// returns the agent's answer; its error is returned as it is. A payload that
	// proves nothing is refused with a gRPC status (InvalidArgument, PermissionDenied),
	// whose message the agent sees; Unavailable if the verifier could not find out.
	Verify(ctx context.Context, payload []byte, challenge func([]byte) ([]byte, error)) (AttestedNode, error)
}

// AttestedNode is what a [NodeVerifier] has found out. Such a node can always prove
// itself again, so its agent attests again instead of renewing.
type AttestedNode struct {
	// ID is the agent's, below /spire/agent/TYPE/.
	ID spiffeid.ID
	// Selectors describe the node, in any order.
	Selectors []Selector
}
