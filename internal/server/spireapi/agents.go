package spireapi

import (
	"context"
	"errors"
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

// joinToken names the one way of attestation that the server knows.
const joinToken = "join_token"

// agentPath is what the path of every agent's SPIFFE ID begins with.
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
	switch {
	case data.GetType() == "":
		return status.Error(codes.InvalidArgument, "missing attestation data type")
	case data.GetType() != joinToken:
		return status.Errorf(codes.FailedPrecondition, "attestation of type %q is not supported", data.GetType())
	case len(data.GetPayload()) == 0:
		return status.Error(codes.InvalidArgument, "missing attestation payload")
	case len(csr) == 0:
		return status.Error(codes.InvalidArgument, "missing CSR")
	}
	key, err := keyset.ParseCSR(csr)
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	token := string(data.GetPayload())
	id, err := s.invited(ctx, token)
	if err != nil {
		return err
	}
	end := s.ledger.Begin()
	defer end()
	svid, err := s.keysets.SignX509(id, key, s.config.X509TTL)
	if err != nil {
		return s.internal("sign SVID", err)
	}
	err = s.admitWith(ctx, token, svid, func(old *Agent) (*Agent, error) {
		if old != nil && old.Banned {
			return nil, denied(types.PermissionDeniedDetails_AGENT_BANNED, "agent %q is banned", id)
		}
		return &Agent{ID: id, Type: joinToken, Serial: svid.Serial, ExpiresAt: svid.NotAfter}, nil
	})
	if err != nil {
		return err
	}
	s.remember(expiry{at: svid.NotAfter.Add(forgetAfter), agent: id})
	s.log.Info("agent attested", "agent_id", id.String(), "type", joinToken, "expires_at", svid.NotAfter)
	return stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Result_{
		Result: &agentv1.AttestAgentResponse_Result{Svid: protoX509(svid)},
	}})
}

// errNoToken is what whoever brings a token that is not there is told.
var errNoToken = status.Error(codes.InvalidArgument, "join token does not exist or has already been used")

// invited returns the ID of the agent that brings a join token. The token is spent
// when the agent is admitted, so that a failure costs none.
func (s *Server) invited(ctx context.Context, value string) (spiffeid.ID, error) {
	t, err := s.storage.Token(ctx, value)
	switch {
	case errors.Is(err, ErrNotFound):
		return spiffeid.ID{}, errNoToken
	case err != nil:
		return spiffeid.ID{}, s.internal("look up join token", err)
	case s.now().After(t.ExpiresAt):
		return spiffeid.ID{}, status.Error(codes.InvalidArgument, "join token has expired")
	}
	id, err := spiffeid.FromSegments(s.td, "spire", "agent", joinToken, t.Value)
	if err != nil {
		return spiffeid.ID{}, s.internal("name agent", err)
	}
	return id, nil
}

// admitWith returns when it is durable, in one step, that an agent may hold an SVID:
// the token, if one is given, is spent, the agent is changed, and the ledger has the
// row. With an error the SVID must not be handed out, and the token is still good
// unless the step may have happened.
func (s *Server) admitWith(ctx context.Context, token string, svid keyset.X509SVID, change func(*Agent) (*Agent, error)) error {
	err := s.ledger.GiveWith(ctx, row(svid, svid.ID, ""), func(ctx context.Context, give func() ledger.Row) error {
		return s.storage.Admit(ctx, Admission{Token: token, ID: svid.ID, Change: change, Row: give})
	})
	switch {
	case errors.Is(err, ErrNotFound):
		return errNoToken // another call was first
	case err != nil && status.Code(err) != codes.PermissionDenied:
		return s.unrecorded(ctx, err)
	}
	return err
}

func (a *agentService) RenewAgent(ctx context.Context, req *agentv1.RenewAgentRequest) (*agentv1.RenewAgentResponse, error) {
	s := a.s
	id, err := caller(ctx)
	if err != nil {
		return nil, err
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
		return nil, s.internal("sign SVID", err)
	}
	err = s.admitWith(ctx, "", svid, attested(id, func(a *Agent) { a.NextSerial, a.NextExpiresAt = svid.Serial, svid.NotAfter }))
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
		return nil, a.s.internal("look up agent", err)
	}
	if version != "" && agent != nil && agent.Version != version {
		_, err := a.s.storage.UpdateAgent(ctx, id, attested(id, func(a *Agent) { a.Version = version }))
		if status.Code(err) == codes.PermissionDenied {
			return nil, err
		}
		if err != nil {
			return nil, a.s.internal("update agent", err)
		}
	}
	return &agentv1.PostStatusResponse{}, nil
}

// attested makes a change of an agent that was admitted to this call, unless it
// was evicted or banned meanwhile.
func attested(id spiffeid.ID, change func(*Agent)) func(*Agent) (*Agent, error) {
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
