package admin

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/listen"
	"github.com/renewd/renewd/internal/server/keyset"
)

// roles has the role that each method needs: Manager for a change. Other methods are
// rejected.
var roles = map[string]Role{
	api.Operator_ListDeployments_FullMethodName: Reader,
	api.Operator_ListKeysets_FullMethodName:     Reader,
	api.Operator_ListHolders_FullMethodName:     Reader,
	api.Operator_ReadAudit_FullMethodName:       Reader,
	api.Operator_ListAgents_FullMethodName:      Reader,
	api.Operator_ListEntries_FullMethodName:     Reader,
	api.Operator_GetBundle_FullMethodName:       Reader,
	api.Operator_GetClock_FullMethodName:        Reader,

	api.Operator_PrepareKeyset_FullMethodName:   Manager,
	api.Operator_ActivateKeyset_FullMethodName:  Manager,
	api.Operator_TaintKeyset_FullMethodName:     Manager,
	api.Operator_RemoveKeyset_FullMethodName:    Manager,
	api.Operator_CreateJoinToken_FullMethodName: Manager,
	api.Operator_BanAgent_FullMethodName:        Manager,
	api.Operator_EvictAgent_FullMethodName:      Manager,
	api.Operator_ApplyEntries_FullMethodName:    Manager,
	api.Operator_PutEntry_FullMethodName:        Manager,
	api.Operator_DeleteEntry_FullMethodName:     Manager,
	api.Operator_ConfirmClock_FullMethodName:    Manager,
	api.Operator_Backup_FullMethodName:          Manager,

	entryv1.Entry_CountEntries_FullMethodName:     Reader,
	entryv1.Entry_ListEntries_FullMethodName:      Reader,
	entryv1.Entry_GetEntry_FullMethodName:         Reader,
	entryv1.Entry_BatchCreateEntry_FullMethodName: Manager,
	entryv1.Entry_BatchUpdateEntry_FullMethodName: Manager,
	entryv1.Entry_BatchDeleteEntry_FullMethodName: Manager,
}

// admit rejects a call unless its caller has the role that the method needs, and adds the
// actor to the context. It runs before the request is read, so that other callers cannot
// make the server hold one. It must not block.
func (s *Service) admit(ctx context.Context, info *tap.Info) (context.Context, error) {
	actor, role, err := s.caller(ctx)
	if err != nil {
		s.logRejected(ctx, "", NoRole, info.FullMethodName, err)
		return nil, err
	}
	need, known := roles[info.FullMethodName]
	switch {
	case !known:
		err = status.Errorf(codes.PermissionDenied, "%s: there is no such method", info.FullMethodName)
	case role >= need && info.FullMethodName == api.Operator_Backup_FullMethodName:
		// Sending observes only this context.
		ctx, cancel := context.WithTimeout(ctx, mutationTimeout)
		context.AfterFunc(ctx, cancel) // gRPC cancels the outer context at the end
		return keyset.WithActor(ctx, actor), nil
	case role >= need:
		return keyset.WithActor(ctx, actor), nil
	case need == Reader:
		err = status.Errorf(codes.PermissionDenied, "%s is neither in operators.managers nor in operators.readers", actor)
	default:
		err = status.Errorf(codes.PermissionDenied, "%s is not in operators.managers", actor)
	}
	s.logRejected(ctx, actor, role, info.FullMethodName, err)
	return nil, err
}

// logRejected logs a rejected call, with a rate limit per caller.
func (s *Service) logRejected(ctx context.Context, actor string, role Role, method string, err error) {
	about := actor
	if p, ok := peer.FromContext(ctx); ok && about == "" {
		about = listen.Name(listen.Client(p.Addr))
	}
	s.lines.Note(slog.LevelWarn, "operator call rejected", about, "actor", actor, "role", role.String(), "method", method, "error", err)
}

// identity returns the actor of a connection, or "" if it has no role.
func (s *Service) identity(info credentials.AuthInfo) string {
	actor, role, err := s.callerOf(info)
	if err != nil || role == NoRole {
		return ""
	}
	return actor
}

// caller returns the actor of a call and its role.
func (s *Service) caller(ctx context.Context) (actor string, role Role, err error) {
	if p, ok := peer.FromContext(ctx); ok {
		return s.callerOf(p.AuthInfo)
	}
	return s.callerOf(nil)
}

func (s *Service) callerOf(info credentials.AuthInfo) (actor string, role Role, err error) {
	switch info := info.(type) {
	case processInfo:
		return info.process.actor(), s.rules.Load().processRole(info.process), nil
	case credentials.TLSInfo:
		if len(info.State.PeerCertificates) == 0 {
			return "", NoRole, status.Error(codes.Unauthenticated, "the caller presents no SVID")
		}
		leaf := info.State.PeerCertificates[0]
		id, err := x509svid.IDFromCert(leaf)
		if err != nil {
			return "", NoRole, status.Error(codes.Unauthenticated, "the caller presents no SVID")
		}
		// The SVID may have expired since the handshake.
		if s.now().After(leaf.NotAfter) {
			return "", NoRole, status.Errorf(codes.Unauthenticated, "the SVID of %s has expired", id)
		}
		return id.String(), s.rules.Load().idRole(id), nil
	}
	return "", NoRole, status.Error(codes.Unauthenticated, "the caller is not known")
}

// tlsConfig requires an X.509-SVID of the trust domain.
func (s *Service) tlsConfig() *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS13,
		Time:           s.now,
		GetCertificate: s.config.Certificate,
		ClientAuth:     tls.RequireAnyClientCert, // verified below as an X.509-SVID
		VerifyConnection: func(state tls.ConnectionState) error {
			authorities := x509bundle.FromX509Authorities(s.config.TrustDomain, s.config.Published().Certificates())
			if _, _, err := x509svid.Verify(state.PeerCertificates, authorities, x509svid.WithTime(s.now())); err != nil {
				return fmt.Errorf("client certificate: %w", err)
			}
			return nil
		},
		// A resumed session would not be verified against the current bundle.
		SessionTicketsDisabled: true,
	}
}
