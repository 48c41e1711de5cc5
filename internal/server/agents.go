package server

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

	"github.com/renewd/renewd/internal/keyset"
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
	// Before the token is spent: a CSR that cannot be signed need not cost it.
	key, err := keyset.ParseCSR(csr)
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	id, err := s.redeem(ctx, string(data.GetPayload()))
	if err != nil {
		return err
	}
	end := s.ledger.Begin()
	defer end()
	svid, err := s.keysets.SignX509(id, key, s.config.X509TTL)
	if err != nil {
		return s.internal("sign SVID", err)
	}
	_, err = s.storage.UpdateAgent(ctx, id, func(old *Agent) (*Agent, error) {
		if old != nil && old.Banned {
			return nil, denied(types.PermissionDeniedDetails_AGENT_BANNED, "agent %q is banned", id)
		}
		return &Agent{ID: id, Type: joinToken, Serial: svid.Serial, ExpiresAt: svid.NotAfter}, nil
	})
	switch {
	case status.Code(err) == codes.PermissionDenied:
		return err
	case err != nil:
		return s.internal("store agent", err)
	}
	s.remember(expiry{at: svid.NotAfter.Add(forgetAfter), agent: id})
	// Recorded last: a row of an agent that is not let in would be counted as
	// held by one that never reports.
	if err := s.ledger.GiveX509(ctx, row(svid, id, "")); err != nil {
		return s.unrecorded(ctx, err)
	}
	s.log.Info("agent attested", "agent", id.String(), "type", joinToken, "expires_at", svid.NotAfter)
	return stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Result_{
		Result: &agentv1.AttestAgentResponse_Result{Svid: protoX509(svid)},
	}})
}

// redeem spends a join token and returns the ID of the agent that brought it.
// The token is gone before anything is signed, so it never lets two in.
func (s *Server) redeem(ctx context.Context, value string) (spiffeid.ID, error) {
	t, err := s.storage.TakeToken(ctx, value)
	switch {
	case errors.Is(err, ErrNotFound):
		return spiffeid.ID{}, status.Error(codes.InvalidArgument, "join token does not exist or has already been used")
	case err != nil:
		return spiffeid.ID{}, s.internal("redeem join token", err)
	case s.now().After(t.ExpiresAt):
		return spiffeid.ID{}, status.Error(codes.InvalidArgument, "join token has expired")
	}
	id, err := spiffeid.FromSegments(s.td, "spire", "agent", joinToken, t.Value)
	if err != nil {
		return spiffeid.ID{}, s.internal("name agent", err)
	}
	return id, nil
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
	err = s.updateAgent(ctx, id, func(a *Agent) { a.NextSerial, a.NextExpiresAt = svid.Serial, svid.NotAfter })
	if err != nil {
		return nil, err
	}
	if err := s.ledger.GiveX509(ctx, row(svid, id, "")); err != nil {
		return nil, s.unrecorded(ctx, err)
	}
	s.log.Info("agent renewed", "agent", id.String(), "expires_at", svid.NotAfter)
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
	if sequence := req.GetCurrentBundleSerial(); sequence > 0 {
		a.s.ledger.Applied(id.String(), sequence)
	}
	// Agents post every minute, and every write costs a commit.
	agent, err := a.s.storage.Agent(ctx, id)
	if err != nil {
		return nil, a.s.internal("look up agent", err)
	}
	if version != "" && agent != nil && agent.Version != version {
		if err := a.s.updateAgent(ctx, id, func(a *Agent) { a.Version = version }); err != nil {
			return nil, err
		}
	}
	return &agentv1.PostStatusResponse{}, nil
}

// updateAgent changes an agent that was admitted to this call, unless it was
// evicted or banned meanwhile.
func (s *Server) updateAgent(ctx context.Context, id spiffeid.ID, change func(*Agent)) error {
	_, err := s.storage.UpdateAgent(ctx, id, func(a *Agent) (*Agent, error) {
		switch {
		case a == nil:
			return nil, denied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, "agent %q is not attested", id)
		case a.Banned:
			return nil, denied(types.PermissionDeniedDetails_AGENT_BANNED, "agent %q is banned", id)
		}
		change(a)
		return a, nil
	})
	if err != nil && status.Code(err) != codes.PermissionDenied {
		return s.internal("update agent", err)
	}
	return err
}

func protoX509(v keyset.X509SVID) *types.X509SVID {
	return &types.X509SVID{CertChain: [][]byte{v.DER}, Id: protoID(v.ID), ExpiresAt: v.NotAfter.Unix()}
}

func protoID(id spiffeid.ID) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}
}
