package spireapi

import (
	"cmp"
	"context"
	"crypto"
	"errors"
	"time"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/ledger"
)

// joinToken is the attestation type that every server supports; the others are those of
// Config.NodeVerifiers.
const joinToken = "join_token"

// agentPath is the prefix of the path of every agent ID.
const agentPath = "/spire/agent/"

type agentService struct {
	agentv1.UnimplementedAgentServer
	s *Server
}

func (a *agentService) AttestAgent(stream grpc.BidiStreamingServer[agentv1.AttestAgentRequest, agentv1.AttestAgentResponse]) error {
	s, ctx := a.s, stream.Context()
	req, err := stream.Recv()
	if err != nil {
		return status.Error(codes.InvalidArgument, "no attestation request")
	}
	data, csr := req.GetParams().GetData(), req.GetParams().GetParams().GetCsr()
	verifier := (*s.verifiers.Load())[data.GetType()]
	switch {
	case data.GetType() == "":
		return status.Error(codes.InvalidArgument, "missing attestation data type")
	case data.GetType() != joinToken && verifier == nil:
		err := status.Errorf(codes.FailedPrecondition, "attestation of type %.64q is not supported: this deployment accepts %s", data.GetType(), s.attestationTypes())
		s.logNotAttested(ctx, data.GetType(), err)
		return err
	case len(data.GetPayload()) == 0:
		return status.Error(codes.InvalidArgument, "missing attestation payload")
	case len(csr) == 0:
		return status.Error(codes.InvalidArgument, "missing CSR")
	}
	key, err := keyset.ParseCSR(csr)
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	var token, label string
	var node AttestedNode
	if verifier == nil {
		token = string(data.GetPayload())
		node.ID, label, err = s.agentForToken(ctx, token)
	} else {
		node, err = s.verifyNode(stream, verifier, data.GetPayload())
	}
	if err != nil {
		return err
	}
	svid, err := s.admitNode(ctx, token, Agent{ID: node.ID, Type: data.GetType(), Selectors: node.Selectors, Reattestable: verifier != nil, Label: label}, key)
	if err != nil {
		return err
	}
	s.log.Info("agent attested", "agent_id", node.ID.String(), "type", data.GetType(), "expires_at", svid.NotAfter)
	return stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Result_{
		Result: &agentv1.AttestAgentResponse_Result{Svid: protoX509(svid), Reattestable: verifier != nil},
	}})
}

// admitNode signs an agent SVID and records the attested agent, in the place of one with
// the same ID, whose SVIDs are no longer accepted then. token is spent, if it is not empty.
func (s *Server) admitNode(ctx context.Context, token string, agent Agent, key crypto.PublicKey) (keyset.X509SVID, error) {
	end := s.ledger.Begin()
	defer end()
	svid, err := s.keysets.SignX509(agent.ID, key, s.config.X509TTL)
	if err != nil {
		return keyset.X509SVID{}, s.internalError("sign SVID", err)
	}
	agent.Serial, agent.ExpiresAt = svid.Serial, svid.NotAfter
	var isNew bool
	err = s.recordAgentSVID(ctx, token, svid, func(old *Agent) (*Agent, error) {
		isNew = old == nil
		switch {
		case isNew:
			return &agent, nil
		case old.Banned:
			return nil, denied(types.PermissionDeniedDetails_AGENT_BANNED, "agent %q is banned", agent.ID)
		case old.Type != agent.Type:
			// A template of agent IDs could give a node the identity of another.
			return nil, status.Errorf(codes.PermissionDenied, "agent %q is attested by %s: evict it before it attests by %s", agent.ID, old.Type, agent.Type)
		}
		agent.Version, agent.Hostname = old.Version, old.Hostname
		agent.Label = cmp.Or(agent.Label, old.Label)
		return &agent, nil
	})
	if code := status.Code(err); code == codes.PermissionDenied || code == codes.InvalidArgument {
		s.logNotAttested(ctx, agent.Type, err)
	}
	if err != nil {
		return keyset.X509SVID{}, err
	}
	if isNew {
		s.addExpiry(expiry{at: svid.NotAfter.Add(retention), agent: agent.ID})
	}
	if token == "" {
		s.sweep(ctx)
	}
	return svid, nil
}

// refuseToken answers a join token that attests no agent. The token itself is neither in
// the answer nor in the log.
func refuseToken(format string, args ...any) error {
	return status.Errorf(codes.InvalidArgument, format+": create a new one for this node with \"server token create\"", args...)
}

// errTokenUsed is the answer if another call was first.
var errTokenUsed = refuseToken("join token was used by another node at the same time; each node needs a token of its own")

// agentForToken returns the agent ID that a join token stands for, and its label. The token
// is spent later, by recordAgentSVID, so that a failure does not cost it. Refusals are
// logged: a token that someone else has used may have been stolen.
func (s *Server) agentForToken(ctx context.Context, value string) (id spiffeid.ID, label string, err error) {
	t, err := s.storage.Token(ctx, value)
	switch {
	case errors.Is(err, ErrNotFound):
		err = refuseToken("join token is not known to this deployment: it may be of another one, dropped by a restore, or have ended more than %d days ago", tokenRetention/(24*time.Hour))
	case err != nil:
		return id, "", s.internalError("look up join token", err)
	case !t.SpentAt.IsZero():
		err = refuseToken("join token was already used, at %s; it attests one agent, once", t.SpentAt.UTC().Format(time.RFC3339))
	case s.now().After(t.ExpiresAt):
		err = refuseToken("join token expired at %s", t.ExpiresAt.UTC().Format(time.RFC3339))
	}
	if err != nil {
		s.logNotAttested(ctx, joinToken, err)
		return id, "", err
	}
	id, err = spiffeid.FromSegments(s.td, "spire", "agent", joinToken, t.Value)
	if err != nil {
		return id, "", s.internalError("name agent", err)
	}
	return id, t.Label, nil
}

// recordAgentSVID makes durable, in one step, that an agent may hold an SVID: it
// spends the token, if there is one, changes the agent and adds the row to the
// ledger. With an error the SVID must not be sent. The token is still good then,
// unless storage cannot say whether the step has happened.
func (s *Server) recordAgentSVID(ctx context.Context, token string, svid keyset.X509SVID, change func(*Agent) (*Agent, error)) error {
	err := s.ledger.RecordWith(ctx, ledgerRow(svid, svid.ID, ""), func(ctx context.Context, add func() ledger.Row) error {
		return s.storage.Admit(ctx, Admission{Token: token, SpentAt: s.now().UTC(), ID: svid.ID, Change: change, Row: add})
	})
	switch {
	case errors.Is(err, ErrNotFound):
		return errTokenUsed
	case err != nil && status.Code(err) != codes.PermissionDenied:
		return s.recordError(ctx, err)
	}
	return err
}

func (a *agentService) RenewAgent(ctx context.Context, req *agentv1.RenewAgentRequest) (*agentv1.RenewAgentResponse, error) {
	s := a.s
	agent, err := callingAgent(ctx)
	if err != nil {
		return nil, err
	}
	id := agent.ID
	if agent.Reattestable {
		return nil, denied(types.PermissionDeniedDetails_AGENT_MUST_REATTEST, "agent %q has to attest again instead of renewing", id)
	}
	csr := req.GetParams().GetCsr()
	if len(csr) == 0 {
		return nil, status.Error(codes.InvalidArgument, "missing CSR")
	}
	key, err := keyset.ParseCSR(csr)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	end := s.ledger.Begin()
	defer end()
	svid, err := s.keysets.SignX509(id, key, s.config.X509TTL)
	if err != nil {
		return nil, s.internalError("sign SVID", err)
	}
	err = s.recordAgentSVID(ctx, "", svid, ifAttested(id, func(a *Agent) { a.NextSerial, a.NextExpiresAt = svid.Serial, svid.NotAfter }))
	if err != nil {
		return nil, err
	}
	s.log.Info("agent renewed", "agent_id", id.String(), "expires_at", svid.NotAfter)
	return &agentv1.RenewAgentResponse{Svid: protoX509(svid)}, nil
}

func (a *agentService) PostStatus(ctx context.Context, req *agentv1.PostStatusRequest) (*agentv1.PostStatusResponse, error) {
	id, err := caller(ctx)
	if err != nil {
		return nil, err
	}
	version := req.GetAgentVersion()
	if utf8.RuneCountInString(version) > maxVersion {
		return nil, status.Errorf(codes.InvalidArgument, "agent version is longer than %d characters", maxVersion)
	}
	a.s.ledger.Applied(id.String(), req.GetCurrentBundleSerial())
	// Agents post every minute, and every write costs a commit.
	agent, err := a.s.storage.Agent(ctx, id)
	if err != nil {
		return nil, a.s.internalError("look up agent", err)
	}
	if version != "" && agent != nil && agent.Version != version {
		_, err := a.s.storage.UpdateAgent(ctx, id, ifAttested(id, func(a *Agent) { a.Version = version }))
		if status.Code(err) == codes.PermissionDenied {
			return nil, err
		}
		if err != nil {
			return nil, a.s.internalError("update agent", err)
		}
	}
	return &agentv1.PostStatusResponse{}, nil
}

// ifAttested returns a change for [Storage] that fails if the agent was evicted or
// banned after its call was authorized.
func ifAttested(id spiffeid.ID, change func(*Agent)) func(*Agent) (*Agent, error) {
	return func(a *Agent) (*Agent, error) {
		switch {
		case a == nil:
			return nil, denied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, "agent %q is not attested", id)
		case a.Banned:
			return nil, denied(types.PermissionDeniedDetails_AGENT_BANNED, "agent %q is banned", id)
		}
		change(a)
		return a, nil
	}
}

func protoX509(v keyset.X509SVID) *types.X509SVID {
	return &types.X509SVID{CertChain: [][]byte{v.DER}, Id: protoID(v.ID), ExpiresAt: v.NotAfter.Unix()}
}

func protoID(id spiffeid.ID) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}
}
