package operator

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/keyset"
)

// roles are what each method takes. One that is not here is for nobody.
var roles = map[string]Role{
	api.Operator_ListDeployments_FullMethodName: Reader,
	api.Operator_ListKeysets_FullMethodName:     Reader,
	api.Operator_ListHolders_FullMethodName:     Reader,
	api.Operator_ReadAudit_FullMethodName:       Reader,
	api.Operator_ListAgents_FullMethodName:      Reader,
	api.Operator_ListEntries_FullMethodName:     Reader,
	api.Operator_GetBundle_FullMethodName:       Reader,

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
}

// authorize lets a call through whose caller has the method's role, and notes
// who that is for the audit log.
func (s *Service) authorize(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	actor, role, err := s.caller(ctx)
	if err != nil {
		return nil, err
	}
	need, known := roles[info.FullMethod]
	if !known || role < need || role == Nobody {
		s.log.Warn("operator refused", "actor", actor, "role", role.String(), "method", info.FullMethod)
		return nil, status.Errorf(codes.PermissionDenied, "%s may not do this: it takes the role %s, which operators.managers and operators.readers give", actor, need)
	}
	return handler(keyset.WithActor(ctx, actor), req)
}

// caller says who calls, and what they may.
func (s *Service) caller(ctx context.Context) (actor string, role Role, err error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return "", Nobody, status.Error(codes.Unauthenticated, "the caller is not known")
	}
	switch info := p.AuthInfo.(type) {
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

// processCredentials finds out which process has connected. There is no TLS on
// the admin socket: the kernel vouches for the caller.
type processCredentials struct{}

// ServerHandshake reads the credentials that the process had when it connected
// (SO_PEERCRED, unix(7)).
func (processCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, nil, fmt.Errorf("%T is no connection of a Unix socket", conn)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, nil, fmt.Errorf("identify the caller: %w", err)
	}
	var cred *unix.Ucred
	var failed error
	err = raw.Control(func(fd uintptr) { cred, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(err, failed); err != nil {
		return nil, nil, fmt.Errorf("identify the caller: %w", err)
	}
	return conn, processInfo{process: process{uid: cred.Uid, gid: cred.Gid}}, nil
}

// ClientHandshake is for clients and never called.
func (processCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("not a client")
}

// Info describes the protocol.
func (processCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix"}
}

// Clone returns c, which has no state.
func (c processCredentials) Clone() credentials.TransportCredentials { return c }

// OverrideServerName is for clients.
func (processCredentials) OverrideServerName(string) error { return nil }

type processInfo struct {
	credentials.CommonAuthInfo
	process process
}

// AuthType names the way of authentication.
func (processInfo) AuthType() string { return "unix" }

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
