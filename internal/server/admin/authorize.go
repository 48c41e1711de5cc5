package admin

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/listen"
	"github.com/renewd/renewd/internal/server/keyset"
)

// roles are what each method takes: Manager wherever something is changed. A
// method that is not here is for nobody.
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
}

// admit lets a call in whose caller has the role that its method takes, and
// notes who that is. It is asked before anything of the request is read, so
// nobody else can make the server hold one, and for every call whatever its
// kind. It must not block.
func (s *Service) admit(ctx context.Context, info *tap.Info) (context.Context, error) {
	actor, role, err := s.caller(ctx)
	if err != nil {
		s.refused(ctx, "", Nobody, info.FullMethodName, err)
		return nil, err
	}
	need, known := roles[info.FullMethodName]
	switch {
	case !known:
		err = status.Errorf(codes.PermissionDenied, "%s: there is no such method", info.FullMethodName)
	case role >= need && info.FullMethodName == api.Operator_Backup_FullMethodName:
		// Here, because sending waits for this context and for no other.
		ctx, cancel := context.WithTimeout(ctx, mutationTime)
		context.AfterFunc(ctx, cancel) // gRPC cancels the outer one at the end
		return keyset.WithActor(ctx, actor), nil
	case role >= need:
		return keyset.WithActor(ctx, actor), nil
	case need == Reader:
		err = status.Errorf(codes.PermissionDenied, "%s is neither in operators.managers nor in operators.readers", actor)
	default:
		err = status.Errorf(codes.PermissionDenied, "%s is not in operators.managers", actor)
	}
	s.refused(ctx, actor, role, info.FullMethodName, err)
	return nil, err
}

// refused notes a call that is not let in.
func (s *Service) refused(ctx context.Context, actor string, role Role, method string, err error) {
	about := actor
	if p, ok := peer.FromContext(ctx); ok && about == "" {
		about = listen.Name(listen.Client(p.Addr))
	}
	s.lines.Note(slog.LevelWarn, "operator refused", about, "actor", actor, "role", role.String(), "method", method, "error", err)
}

// identity says whose connection it is, "" for who has no role.
func (s *Service) identity(info credentials.AuthInfo) string {
	actor, role, err := s.callerOf(info)
	if err != nil || role == Nobody {
		return ""
	}
	return actor
}

// caller says who calls, and what they may.
func (s *Service) caller(ctx context.Context) (actor string, role Role, err error) {
	if p, ok := peer.FromContext(ctx); ok {
		return s.callerOf(p.AuthInfo)
	}
	return s.callerOf(nil)
}

func (s *Service) callerOf(info credentials.AuthInfo) (actor string, role Role, err error) {
	switch info := info.(type) {
	case processInfo:
		return info.process.actor(), s.rules.ofProcess(info.process), nil
	case credentials.TLSInfo:
		if len(info.State.PeerCertificates) == 0 {
			return "", Nobody, status.Error(codes.Unauthenticated, "the caller presents no SVID")
		}
		leaf := info.State.PeerCertificates[0]
		id, err := x509svid.IDFromCert(leaf)
		if err != nil {
			return "", Nobody, status.Error(codes.Unauthenticated, "the caller presents no SVID")
		}
		// The connection was verified when it was made; it may be older than that.
		if s.now().After(leaf.NotAfter) {
			return "", Nobody, status.Errorf(codes.Unauthenticated, "the SVID of %s has expired", id)
		}
		return id.String(), s.rules.ofID(id), nil
	}
	return "", Nobody, status.Error(codes.Unauthenticated, "the caller is not known")
}

// tlsConfig takes callers that present an X.509-SVID of the trust domain.
func (s *Service) tlsConfig() *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS13,
		Time:           s.now,
		GetCertificate: s.config.Certificate,
		ClientAuth:     tls.RequireAnyClientCert, // verified below, as a SPIFFE ID
		VerifyConnection: func(state tls.ConnectionState) error {
			authorities := x509bundle.FromX509Authorities(s.config.TrustDomain, s.config.Published().Certificates())
			if _, _, err := x509svid.Verify(state.PeerCertificates, authorities, x509svid.WithTime(s.now())); err != nil {
				return fmt.Errorf("client certificate: %w", err)
			}
			return nil
		},
		// Every connection is verified against the bundle of its own time.
		SessionTicketsDisabled: true,
	}
}
