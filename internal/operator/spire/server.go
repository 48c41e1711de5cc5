package spire

import (
	"context"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	localv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/operator/runbook"
	"github.com/renewd/renewd/internal/refusal"
)

const (
	// readTimeout limits reading the state of a server, so that one that hangs is named
	// before a poll of the runbook ends.
	readTimeout = 10 * time.Second
	// mutationTimeout limits each mutating call. A key manager may be a remote one.
	mutationTimeout = 30 * time.Second
)

// serverPath is the path of a SPIRE server's SPIFFE ID (SPIFFE IDs of SPIRE's own
// components are below /spire).
const serverPath = "/spire/server"

// server is a connection to one SPIRE server.
type server struct {
	name    string // the path of its socket, or host:port
	conn    *grpc.ClientConn
	local   localv1.LocalAuthorityClient
	bundles bundlev1.BundleClient
	agents  agentv1.AgentClient
	domains trustdomainv1.TrustDomainClient
}

func newServer(name, target string, options ...grpc.DialOption) (*server, error) {
	options = append(options, grpc.WithDisableRetry(), grpc.WithDisableServiceConfig(),
		// A wait polls every few seconds, but gRPC's default backoff grows to two
		// minutes.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: 5 * time.Second,
		}))
	conn, err := grpc.NewClient(target, options...)
	if err != nil {
		return nil, fmt.Errorf("spire: server %s: %w", name, err)
	}
	return &server{
		name: name, conn: conn, local: localv1.NewLocalAuthorityClient(conn), bundles: bundlev1.NewBundleClient(conn),
		agents: agentv1.NewAgentClient(conn), domains: trustdomainv1.NewTrustDomainClient(conn),
	}, nil
}

// socketServer returns the server with an admin socket. The socket has no TLS; its file
// mode protects it.
func socketServer(path string) (*server, error) {
	// gRPC would parse a path in the target as a URL.
	dialer := func(ctx context.Context, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}
	return newServer(path, "passthrough:///spire-socket", grpc.WithContextDialer(dialer), grpc.WithTransportCredentials(insecure.NewCredentials()))
}

// remoteServer returns the server at host:port, which is verified as the SPIRE server of
// the trust domain of the source's SVID.
func remoteServer(address string, source *workloadapi.X509Source) (*server, error) {
	svid, err := source.GetX509SVID()
	if err != nil {
		return nil, fmt.Errorf("spire: server %s: get the SVID to present to it: %w", address, err)
	}
	id, err := spiffeid.FromPath(svid.ID.TrustDomain(), serverPath)
	if err != nil {
		return nil, fmt.Errorf("spire: server %s: %w", address, err)
	}
	creds := credentials.NewTLS(tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(id)))
	return newServer(address, address, grpc.WithTransportCredentials(creds))
}

// read reads the slots before the bundle: an authority that is prepared in between is
// then unknown, while the other order would make it look revoked.
func (v *server) read(ctx context.Context, trustDomain string) (serverState, error) {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	x, err := v.local.GetX509AuthorityState(ctx, &localv1.GetX509AuthorityStateRequest{})
	if status.Code(err) == codes.PermissionDenied {
		return serverState{}, &runbook.PermanentError{Err: fmt.Errorf("read X.509 authorities: %w: the SVID's SPIFFE ID must be in admin_ids of the server, or its entry must be an admin entry", err)}
	}
	if status.Code(err) == codes.Unimplemented { // it is no SPIRE server, or too old
		err = &runbook.PermanentError{Err: err}
	}
	if err != nil {
		return serverState{}, fmt.Errorf("read X.509 authorities: %w", err)
	}
	j, err := v.local.GetJWTAuthorityState(ctx, &localv1.GetJWTAuthorityStateRequest{})
	noJWT := status.Code(err) == codes.Unimplemented
	if err != nil && !noJWT {
		return serverState{}, fmt.Errorf("read JWT authorities: %w", err)
	}
	published, err := v.bundles.GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return serverState{}, fmt.Errorf("read the trust bundle: %w", err)
	}
	td, err := spiffeid.TrustDomainFromString(published.TrustDomain)
	if err != nil {
		return serverState{}, fmt.Errorf("read the trust bundle: %w", err)
	}
	if trustDomain != "" && td.Name() != spiffeid.RequireTrustDomainFromString(trustDomain).Name() {
		return serverState{}, &runbook.PermanentError{Err: fmt.Errorf("it serves the trust domain %q, not %q: give its trust domain, or the socket of another server", td.Name(), trustDomain)}
	}
	s := serverState{
		trustDomain: td.Name(), sequence: published.SequenceNumber, noJWT: noJWT,
		upstream: x.GetActive().GetUpstreamAuthoritySubjectKeyId(), jwt: jwtAuthorities(published.JwtAuthorities),
	}
	if s.x509, err = x509Authorities(published.X509Authorities); err != nil {
		return serverState{}, err
	}
	s.x509Slots = newSlots(x.GetActive(), x.GetPrepared(), x.GetOld(), s.x509, s.upstream != "")
	s.jwtSlots = newSlots(j.GetActive(), j.GetPrepared(), j.GetOld(), s.jwt, false)
	s.keys = pairSlots(s.x509Slots, s.jwtSlots)
	return s, nil
}

// mutation is a call that changes one authority of a server.
type mutation struct {
	kind      string
	authority authority
	make      func(ctx context.Context, authorityID string) error
}

// The kinds of authorities, as errors name them.
const (
	x509Kind = "X.509"
	jwtKind  = "JWT"
)

// apply makes the calls for the authorities that need them, in order, and stops at the
// first error.
func apply(ctx context.Context, step, id string, needed func(authority) bool, mutations ...mutation) error {
	var done string
	for _, c := range mutations {
		if !c.authority.exists() || !needed(c.authority) {
			continue
		}
		ctx, cancel := context.WithTimeout(ctx, mutationTimeout)
		err := c.make(ctx, c.authority.id)
		cancel()
		if err != nil {
			return callError(step, id, c.kind, done, err)
		}
		done = c.kind
	}
	return nil
}

// callError returns the error of a step for the error of a call. done is the kind of
// authority that the step has already changed, or empty.
func callError(step, id, kind, done string, err error) error {
	// Only some codes are sure to mean that the call changed nothing.
	unknown := false
	switch status.Code(err) {
	case codes.InvalidArgument:
		// The state has changed since it was read.
		if done == "" {
			return refusal.ErrBusy
		}
	case codes.FailedPrecondition, codes.NotFound, codes.PermissionDenied, codes.Unauthenticated, codes.Unimplemented:
	default:
		unknown = true
	}
	what := fmt.Sprintf("%s the %s authority", step, kind)
	if done != "" {
		again := strings.TrimSpace(step + " " + id)
		what = fmt.Sprintf("the step is complete for the %s authority, but perhaps not for the %s authority; run keysetctl %s again: %s", done, kind, again, what)
	}
	if unknown {
		return fmt.Errorf("%s: %w: %w", what, runbook.ErrOutcomeUnknown, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// prepare prepares the authorities that p lacks, and confirms that the server has them.
func (v *server) prepare(ctx context.Context, trustDomain string, p pair, noJWT bool) error {
	var done string
	if !p.x509.exists() {
		ctx, cancel := context.WithTimeout(ctx, mutationTimeout)
		res, err := v.local.PrepareX509Authority(ctx, &localv1.PrepareX509AuthorityRequest{})
		cancel()
		if err != nil {
			return callError("prepare", "", x509Kind, "", err)
		}
		p.x509.id = res.GetPreparedAuthority().GetAuthorityId()
		done = x509Kind
	}
	if !p.jwt.exists() && !noJWT {
		ctx, cancel := context.WithTimeout(ctx, mutationTimeout)
		res, err := v.local.PrepareJWTAuthority(ctx, &localv1.PrepareJWTAuthorityRequest{})
		cancel()
		if err != nil {
			return callError("prepare", "", jwtKind, done, err)
		}
		p.jwt.id = res.GetPreparedAuthority().GetAuthorityId()
	}
	after, err := v.read(ctx, trustDomain)
	if err != nil {
		return fmt.Errorf("confirm that keyset %s is prepared: %w: %w", p.id(), runbook.ErrOutcomeUnknown, err)
	}
	for _, now := range after.keys {
		if now.x509.id == p.x509.id && now.jwt.id == p.jwt.id && now.any(inSlot(prepared)) {
			return nil
		}
	}
	return refusal.ErrBusy
}

// activate activates the X.509 authority, then the JWT authority.
func (v *server) activate(ctx context.Context, id string, p pair) error {
	return apply(ctx, "activate", id, inSlot(prepared), mutation{x509Kind, p.x509, func(ctx context.Context, id string) error {
		_, err := v.local.ActivateX509Authority(ctx, &localv1.ActivateX509AuthorityRequest{AuthorityId: id})
		return err
	}}, mutation{jwtKind, p.jwt, func(ctx context.Context, id string) error {
		_, err := v.local.ActivateJWTAuthority(ctx, &localv1.ActivateJWTAuthorityRequest{AuthorityId: id})
		return err
	}})
}

// taint taints the X.509 authority, then the JWT authority.
func (v *server) taint(ctx context.Context, id string, p pair) error {
	return apply(ctx, "taint", id, untainted, mutation{x509Kind, p.x509, func(ctx context.Context, id string) error {
		_, err := v.local.TaintX509Authority(ctx, &localv1.TaintX509AuthorityRequest{AuthorityId: id})
		return err
	}}, mutation{jwtKind, p.jwt, func(ctx context.Context, id string) error {
		_, err := v.local.TaintJWTAuthority(ctx, &localv1.TaintJWTAuthorityRequest{AuthorityId: id})
		return err
	}})
}

// revoke revokes the JWT authority, then the X.509 authority, so that the keyset keeps its
// ID until the end.
func (v *server) revoke(ctx context.Context, id string, p pair) error {
	return apply(ctx, "remove", id, authority.exists, mutation{jwtKind, p.jwt, func(ctx context.Context, id string) error {
		_, err := v.local.RevokeJWTAuthority(ctx, &localv1.RevokeJWTAuthorityRequest{AuthorityId: id})
		return err
	}}, mutation{x509Kind, p.x509, func(ctx context.Context, id string) error {
		_, err := v.local.RevokeX509Authority(ctx, &localv1.RevokeX509AuthorityRequest{AuthorityId: id})
		return err
	}})
}
