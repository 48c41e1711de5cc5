// Package spireapi is the embedded signing server: the services of the SPIRE
// Server API that an agent needs, over the keysets of one deployment.
//
// Agents join with a one-time token or by what their node is (AttestAgent,
// RenewAgent, PostStatus; see [NodeVerifier]), fetch the entries that they
// serve (SyncAuthorizedEntries, GetAuthorizedEntries) and the trust bundles (GetBundle, GetFederatedBundle), and have SVIDs signed
// (BatchNewX509SVID, NewJWTSVID). Every SVID is recorded in the [Ledger]
// before it is sent, and agents may report their progress in a rotation
// (renewd's own Fleet service). Every other RPC answers Unimplemented. Operators
// use [Server]'s methods and [Server.Keysets].
//
// The server authenticates as spiffe://<trust domain>/spire/server, with a
// certificate from the active keyset. A client certificate is optional. If there
// is one, it is verified as an X.509-SVID against the bundle.
//
// The rate limits for each client address are those of a SPIRE server: one
// attestation a second, 500 X.509-SVIDs (agent SVIDs included), 500 JWT-SVIDs,
// 10 statuses and 10 reports. Each item of a batch of X.509-SVIDs counts. Calls
// above the limit wait for up to 30 seconds. A call that would have to wait longer
// fails with ResourceExhausted. A caller without an agent SVID is refused before
// its request is read, except for AttestAgent and GetBundle, of which few may be
// in flight.
package spireapi

import (
	"cmp"
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/listen"
	"github.com/renewd/renewd/internal/loglimit"
	"github.com/renewd/renewd/internal/server/detach"
	"github.com/renewd/renewd/internal/server/detach/rpc"
	"github.com/renewd/renewd/internal/server/keyset"
)

const (
	// pageSize is the most entries in one message of SyncAuthorizedEntries, and
	// pageBytes the most bytes of a message with two or more: a gRPC client accepts
	// 4 MiB by default, as a stock spire-agent does.
	pageSize  = 500
	pageBytes = 1 << 20
	// maxBatch is the most X.509-SVIDs in one BatchNewX509SVID.
	maxBatch = 500
	// maxVersion is the most characters of an agent's version.
	maxVersion = 255
	// connectionAge is when a client is asked to reconnect, so that no connection
	// is used long after its SVID was verified. Calls in flight may continue for
	// graceAge after that.
	connectionAge = 3 * time.Minute
	graceAge      = time.Minute
	// maxRequest is the largest request in bytes. A batch of 500 CSRs of RSA
	// keys of 4096 bits fits. maxStreams is how many calls of one connection
	// are served at a time; the client delays further calls. A renewd agent
	// makes 80 when the server is slow.
	maxRequest = 1 << 20
	maxStreams = 128
)

// Observer receives the outcome of every request for a workload's SVID, and every
// call that was rate limited. Agent SVIDs do not count. Its methods must be fast
// and safe for concurrent use.
type Observer interface {
	// Minted reports one SVID of svidType "x509" or "jwt": the outcome, and
	// how long checking, signing and recording took. code is Unavailable if the
	// SVID was signed and could not be recorded. The SVIDs of a batch are recorded
	// together, and the time of each includes all of the recording.
	Minted(svidType string, code codes.Code, took time.Duration)
	// Limited reports a call that was delayed or rejected by a limit of its
	// client. The method has no package or service, and is "connect" for a
	// connection that was refused or closed.
	Limited(method string)
}

// Config says what to serve. TrustDomain, Keysets, Storage and Ledger are required.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	// Keysets is the deployment that signs.
	Keysets *keyset.Deployment
	// Published returns the bundle that GetBundle serves and that client
	// certificates are verified against; Keysets.Bundle when nil. If several
	// deployments share the trust domain, it is the union of their bundles. It is
	// called for every such answer and must be fast. It should return the same
	// pointer until the bundle changes, so that an answer is made once for all agents.
	Published func() *keyset.Bundle
	// Storage keeps agents, join tokens and entries.
	Storage Storage
	// Lost are the periods that Storage has no data of, one for each restore from
	// a copy. A period whose SVIDs have all expired may be left out.
	Lost []Lost
	// LostUntil returns when the last of Lost ended, by the present clock: at the
	// restore the clock may have been behind. When nil, To is used.
	LostUntil func() time.Time
	// X509TTL is the lifetime of an X.509-SVID whose entry has none, of agent
	// SVIDs and of the server's certificate: 1 to 168 hours, 24 when zero.
	X509TTL time.Duration
	// JWTTTL is the lifetime of a JWT-SVID whose entry has none; 24 hours
	// when zero.
	JWTTTL time.Duration
	// RefreshHint is how often agents should fetch the bundle, in full seconds;
	// no hint when zero.
	RefreshHint time.Duration
	// ConnectionAge is when a client is asked to reconnect: after three minutes
	// when zero, never when negative.
	ConnectionAge time.Duration
	// NodeVerifiers attest nodes, each another type. Join tokens are always accepted.
	NodeVerifiers []NodeVerifier
	// Limits are the limits of the clients; [DefaultLimits] for all when nil.
	Limits *ClientLimits
	// IsOperator reports whether a SPIFFE ID may operate the server: an entry with
	// such an ID needs an agent's ParentID or Operator. When nil, no ID may.
	IsOperator func(spiffeid.ID) bool
	// Ledger records every SVID before it is sent.
	Ledger Ledger
	// Connections bounds the connections of every Serve together; each has its
	// own bound when nil.
	Connections *listen.Pool
	Observer    Observer     // optional
	Log         *slog.Logger // optional
	// Now is the clock; time.Now when nil. AtLeast is a lower bound of the true
	// time, by which expired agents and join tokens are deleted; Now when nil.
	Now, AtLeast func() time.Time
	// SetBack reports whether the clock is behind what it has shown before; never when
	// nil.
	SetBack func() bool
	// Heard receives the time that an agent's own clock showed when it made a
	// call; optional.
	Heard func(agent string, sentAt time.Time)
	// Options are added to every gRPC server that Serve makes. Their interceptors
	// run before those of Serve.
	Options []grpc.ServerOption
}

// Lost is a period that Storage has no data of: From is when the copy was made,
// To when it was restored.
type Lost struct{ From, To time.Time }

// Server serves one deployment. All methods may be called concurrently.
type Server struct {
	td       spiffeid.TrustDomain
	keysets  *keyset.Deployment
	storage  Storage
	config   Config
	log      *slog.Logger
	now      func() time.Time
	observer Observer
	ledger   Ledger
	lines    *loglimit.Log
	limits   *limits
	tls      *tls.Config

	verifiers   atomic.Pointer[map[string]NodeVerifier] // by type
	refreshHint atomic.Int64                            // a time.Duration

	entries    atomic.Pointer[EntrySet]
	entriesSem chan struct{} // a semaphore for writers of entries

	rendered atomic.Pointer[published]

	serving CertificateCache

	expiriesMu sync.Mutex
	expiries   expiries

	calls detach.Group

	federatedMu sync.RWMutex
	federated   map[spiffeid.TrustDomain]*types.Bundle
}

// New makes a Server and loads entries, agents and join tokens from its storage.
func New(c Config) (*Server, error) {
	s := &Server{
		td: c.TrustDomain, keysets: c.Keysets, storage: c.Storage, config: c, log: cmp.Or(c.Log, slog.New(slog.DiscardHandler)),
		now: c.Now, observer: cmp.Or[Observer](c.Observer, noopObserver{}), ledger: c.Ledger,
		entriesSem: make(chan struct{}, 1), federated: make(map[spiffeid.TrustDomain]*types.Bundle),
	}
	if s.now == nil {
		s.now = time.Now
	}
	if s.config.AtLeast == nil {
		s.config.AtLeast = s.now
	}
	if s.config.SetBack == nil {
		s.config.SetBack = func() bool { return false }
	}
	if s.config.Heard == nil {
		s.config.Heard = func(string, time.Time) {}
	}
	if s.config.IsOperator == nil {
		s.config.IsOperator = func(spiffeid.ID) bool { return false }
	}
	s.config.ConnectionAge = cmp.Or(s.config.ConnectionAge, connectionAge)
	ctx := context.Background()
	if s.config.Published == nil {
		s.config.Published = s.keysets.Bundle
	}
	if err := s.loadEntries(ctx); err != nil {
		return nil, fmt.Errorf("new server: %w", err)
	}
	if err := s.loadExpiries(ctx); err != nil {
		return nil, fmt.Errorf("new server: %w", err)
	}
	s.lines = listen.NewLog(s.log)
	s.limits = newLimits(s.observer, s.lines)
	apply, err := s.Reload(Reloaded{NodeVerifiers: c.NodeVerifiers, RefreshHint: c.RefreshHint, Limits: c.Limits})
	if err != nil {
		return nil, fmt.Errorf("new server: %w", err)
	}
	apply()
	s.serving.Now, s.serving.Issue = s.now, s.issue
	s.serving.Usable = func(authority string) bool { return authority == s.keysets.Active().X509AuthorityID }
	s.tls = s.newTLSConfig()
	return s, nil
}

// Reloaded are the fields of a [Config] that can change while the server serves.
type Reloaded struct {
	NodeVerifiers []NodeVerifier
	RefreshHint   time.Duration
	Limits        *ClientLimits
}

// Reload checks these fields and returns the function that replaces them. Lower limits of
// connections end none that is open. As New does, that function logs the stored entries
// that would be refused now: IsOperator may have changed, too.
func (s *Server) Reload(r Reloaded) (apply func(), err error) {
	verifiers, err := verifiersByType(r.NodeVerifiers)
	if err != nil {
		return nil, err
	}
	return func() {
		s.verifiers.Store(&verifiers)
		s.refreshHint.Store(int64(r.RefreshHint))
		s.limits.of.Store(cmp.Or(r.Limits, &ClientLimits{Default: DefaultLimits}))
		s.logInvalidEntries()
	}, nil
}

// Keysets returns the deployment that signs.
func (s *Server) Keysets() *keyset.Deployment { return s.keysets }

// BundlePEM returns the published X.509 authorities as PEM certificates, the
// format of an agent's bootstrap bundle file.
func (s *Server) BundlePEM() []byte { return s.config.Published().PEM() }

// Serve answers on lis, which it closes, until ctx ends or lis fails, as
// [listen.Serve] does, except that calls which wait for storage may remain; see
// [Server.Wait]. Several may run at a time, on different listeners, and serve the
// same state. They share the rate limits; connections are limited for each
// listener.
func (s *Server) Serve(ctx context.Context, lis net.Listener) error {
	return listen.Serve(ctx, lis, listen.Config{
		Credentials: credentials.NewTLS(s.tls), Identify: identity, Admit: s.preauthorize,
		Pool: s.config.Connections, Limits: s.limits.connections, Refused: s.limits.refuse, Lines: s.lines,
		Age: s.config.ConnectionAge, Grace: graceAge, MaxRequest: maxRequest, MaxStreams: maxStreams,
		Options: append(slices.Clone(s.config.Options),
			grpc.ForceServerCodecV2(newCodec()),
			grpc.ChainUnaryInterceptor(rpc.Unary(&s.calls), s.authorizeUnary),
			grpc.ChainStreamInterceptor(rpc.Stream(&s.calls), s.authorizeStream)),
		Register: s.register,
	})
}

func (s *Server) register(r grpc.ServiceRegistrar) {
	agentv1.RegisterAgentServer(r, &agentService{s: s})
	bundlev1.RegisterBundleServer(r, &bundleService{s: s})
	entryv1.RegisterEntryServer(r, &entryService{s: s})
	svidv1.RegisterSVIDServer(r, &svidService{s: s})
	api.RegisterFleetServer(r, &fleetService{s: s})
}

// Wait returns when no call is waiting for storage. Call it after closing storage.
func (s *Server) Wait() { s.calls.Wait() }

type noopObserver struct{}

func (noopObserver) Minted(string, codes.Code, time.Duration) {}
func (noopObserver) Limited(string)                           {}
