package spireapi

import (
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/listen"
	"github.com/renewd/renewd/internal/server/keyset"
)

// access says which callers may call a method.
type access int

const (
	unimplemented access = iota
	anyone
	agentOnly // callers that present an active agent SVID
)

var methods = map[string]access{
	agentv1.Agent_AttestAgent_FullMethodName:           anyone,
	bundlev1.Bundle_GetBundle_FullMethodName:           anyone,
	agentv1.Agent_RenewAgent_FullMethodName:            agentOnly,
	agentv1.Agent_PostStatus_FullMethodName:            agentOnly,
	entryv1.Entry_GetAuthorizedEntries_FullMethodName:  agentOnly,
	entryv1.Entry_SyncAuthorizedEntries_FullMethodName: agentOnly,
	svidv1.SVID_BatchNewX509SVID_FullMethodName:        agentOnly,
	svidv1.SVID_NewJWTSVID_FullMethodName:              agentOnly,
	bundlev1.Bundle_GetFederatedBundle_FullMethodName:  agentOnly,
	api.Fleet_Report_FullMethodName:                    agentOnly,
}

// identity returns the SPIFFE ID of the agent that a connection is of, "" without
// an agent SVID: a caller with a workload's SVID counts as anonymous.
func identity(info credentials.AuthInfo) string {
	id, _, err := presentedSVID(info)
	if err != nil {
		return ""
	}
	return id.String()
}

// presentedSVID returns the agent SVID that a connection presents. The handshake
// has verified it.
func presentedSVID(info credentials.AuthInfo) (id spiffeid.ID, svid *x509.Certificate, err error) {
	t, ok := info.(credentials.TLSInfo)
	if !ok || len(t.State.PeerCertificates) == 0 {
		return id, nil, denied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, "caller presents no SVID")
	}
	svid = t.State.PeerCertificates[0]
	if id, err = x509svid.IDFromCert(svid); err != nil {
		return id, nil, denied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, "caller presents no SVID")
	}
	if !strings.HasPrefix(id.Path(), agentPath) {
		return id, nil, denied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, "%q is not an agent ID", id)
	}
	return id, svid, nil
}

// preauthorize refuses a call before its request is read, unless anyone may call
// the method or the caller presents an agent SVID. It must not block. Whether the
// SVID is the active one is checked by authorize, which may wait for storage.
func (s *Server) preauthorize(ctx context.Context, info *tap.Info) (context.Context, error) {
	switch methods[info.FullMethodName] {
	case anyone:
		return ctx, nil
	case agentOnly:
		id, _, err := s.identify(ctx)
		if err != nil {
			s.logRefused(ctx, info.FullMethodName, id, err)
			return nil, err
		}
		return ctx, nil
	}
	return nil, status.Errorf(codes.Unimplemented, "%s is not implemented", info.FullMethodName)
}

// logRefused logs a call that is not authorized.
func (s *Server) logRefused(ctx context.Context, method string, id spiffeid.ID, err error) {
	var from netip.Prefix
	if p, ok := peer.FromContext(ctx); ok {
		from = listen.Client(p.Addr)
	}
	about := id.String()
	if id.IsZero() {
		about = listen.Name(from)
	}
	s.lines.Note(slog.LevelWarn, "call refused", about, "method", method, "agent_id", id.String(), "address", listen.Name(from), "error", err)
}

type callerKey struct{}

// caller returns the ID of the agent that authorize found for this call.
func caller(ctx context.Context) (spiffeid.ID, error) {
	agent, err := callingAgent(ctx)
	if err != nil {
		return spiffeid.ID{}, err
	}
	return agent.ID, nil
}

// callingAgent returns the agent that authorize found for this call, as it was then.
func callingAgent(ctx context.Context) (*Agent, error) {
	agent, ok := ctx.Value(callerKey{}).(*Agent)
	if !ok {
		return nil, status.Error(codes.Internal, "call was not authorized")
	}
	return agent, nil
}

func (s *Server) authorizeUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	items := 1
	if batch, ok := req.(*svidv1.BatchNewX509SVIDRequest); ok {
		items = len(batch.GetParams())
	}
	ctx, err := s.enter(ctx, info.FullMethod, items)
	if err != nil {
		return nil, err
	}
	return handler(ctx, req)
}

func (s *Server) authorizeStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	ctx, err := s.enter(stream.Context(), info.FullMethod, 1)
	if err != nil {
		return err
	}
	return handler(srv, &authorizedStream{ServerStream: stream, ctx: ctx})
}

type authorizedStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *authorizedStream) Context() context.Context { return s.ctx }

// enter returns when a call may be served: authorized, and within the rate limits.
// Authorization comes first, so that unauthorized clients do not use up the limits
// of agents at the same address. A call that waits here holds no lock, has begun
// nothing in the ledger and spent no token.
func (s *Server) enter(ctx context.Context, method string, items int) (context.Context, error) {
	allowed, err := s.authorize(ctx, method)
	if err != nil {
		return nil, err
	}
	waited, err := s.limits.wait(ctx, method, items)
	switch {
	case err != nil:
		return nil, err
	case waited: // the agent may have been banned meanwhile
		return s.authorize(ctx, method)
	}
	return allowed, nil
}

// authorize accepts an agent-only call if its SVID is the agent's active one, or
// becomes that with this call; see becomesActive.
func (s *Server) authorize(ctx context.Context, method string) (context.Context, error) {
	if methods[method] != agentOnly {
		return ctx, nil
	}
	id, svid, err := s.identify(ctx)
	var agent *Agent
	if err == nil {
		agent, err = s.admit(ctx, id, svid)
	}
	if err != nil {
		s.logRefused(ctx, method, id, err)
		return nil, err
	}
	return context.WithValue(ctx, callerKey{}, agent), nil
}

func (s *Server) identify(ctx context.Context) (id spiffeid.ID, svid *x509.Certificate, err error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return id, nil, status.Error(codes.Internal, "call has no peer")
	}
	id, svid, err = presentedSVID(p.AuthInfo)
	if err != nil {
		return id, nil, err
	}
	// The SVID was verified in the handshake and may have expired since.
	if s.now().After(svid.NotAfter) {
		return id, nil, denied(types.PermissionDeniedDetails_AGENT_EXPIRED, "SVID of agent %q has expired", id)
	}
	return id, svid, nil
}

func (s *Server) admit(ctx context.Context, id spiffeid.ID, svid *x509.Certificate) (*Agent, error) {
	serial := svid.SerialNumber.String()
	agent, err := s.storage.Agent(ctx, id)
	if err != nil {
		return nil, s.internalError("look up agent", err)
	}
	if s.becomesActive(agent, serial, svid) {
		agent, err = s.storage.UpdateAgent(ctx, id, func(a *Agent) (*Agent, error) {
			// Checked again: another call may have been first.
			if s.becomesActive(a, serial, svid) {
				a.Serial, a.ExpiresAt, a.NextSerial = serial, svid.NotAfter, ""
			}
			return a, nil
		})
		if err != nil {
			return nil, s.internalError("activate SVID of agent", err)
		}
	}
	switch {
	case agent == nil:
		return nil, denied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, "agent %q is not attested", id)
	case agent.Banned:
		return nil, denied(types.PermissionDeniedDetails_AGENT_BANNED, "agent %q is banned", id)
	case agent.Serial != serial:
		return nil, denied(types.PermissionDeniedDetails_AGENT_NOT_ACTIVE, "SVID %s is not the active one of agent %q", serial, id)
	}
	return agent, nil
}

// becomesActive reports whether an SVID that is not the agent's active one becomes
// that with this call: RenewAgent issued it last, or it was issued in a lost period
// and expires later than those in storage. Without the second rule a restored
// server would refuse every agent that has renewed since the copy, and each would
// need a new join token. The rule ends with the SVIDs that the server can have signed
// in that period: one with a longer lifetime is forged.
func (s *Server) becomesActive(a *Agent, serial string, svid *x509.Certificate) bool {
	if a == nil || a.Banned || a.Serial == serial {
		return false
	}
	if a.NextSerial == serial {
		return true
	}
	// NotBefore is a little before the time of signing.
	begin := svid.NotBefore.Add(time.Minute)
	if svid.NotAfter.Sub(begin) > keyset.MaxX509TTL {
		return false
	}
	lost := slices.ContainsFunc(s.config.Lost, func(l Lost) bool { return begin.After(l.From) && svid.NotBefore.Before(l.To) })
	if n := len(s.config.Lost); n > 0 && s.config.LostUntil != nil {
		lost = lost || begin.After(s.config.Lost[n-1].From) && svid.NotBefore.Before(s.config.LostUntil())
	}
	return lost && svid.NotAfter.After(a.ExpiresAt) && svid.NotAfter.After(a.NextExpiresAt)
}

// denied makes a PermissionDenied error. Agents act on its reason.
func denied(reason types.PermissionDeniedDetails_Reason, format string, args ...any) error {
	st := status.New(codes.PermissionDenied, fmt.Sprintf(format, args...))
	if detailed, err := st.WithDetails(&types.PermissionDeniedDetails{Reason: reason}); err == nil {
		st = detailed
	}
	return st.Err()
}

// internalError logs an error whose details a caller must not see, and returns an
// error without them.
func (s *Server) internalError(operation string, err error) error {
	s.log.Error("storage or signing failed", "operation", operation, "error", err)
	return status.Errorf(codes.Internal, "failed to %s", operation)
}
