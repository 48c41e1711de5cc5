// Package spireapi is the embedded signing server: the services of the SPIRE
// Server API that an agent needs, over the keysets of one deployment.
//
// Agents join with a one-time token (AttestAgent, RenewAgent, PostStatus),
// learn which entries they serve (SyncAuthorizedEntries, GetAuthorizedEntries)
// and whom to trust (GetBundle, GetFederatedBundle), and have SVIDs signed
// (BatchNewX509SVID, NewJWTSVID). With a [Ledger] every SVID is recorded there
// before it is handed out, and agents may report where they are in a rotation
// (renewd's own Fleet service). Every other RPC answers Unimplemented: what an
// operator does goes through [Server]'s methods and [Server.Keysets].
//
// The server proves itself as spiffe://<trust domain>/spire/server, with a
// certificate from the active keyset. A client certificate is optional and,
// where there is one, verified as an X.509-SVID against the bundle.
//
// What each client address may ask for is limited as by a SPIRE server: one
// attestation a second, 500 X.509-SVIDs (the agents' own included) and 500
// JWT-SVIDs, 10 statuses and 10 reports; of X.509-SVIDs each item of a batch counts. What
// is more than that waits, for half a minute at most, and fails with
// ResourceExhausted when it would have to wait for longer. A caller without an
// agent's SVID is refused before anything of its request is read, but for
// AttestAgent and GetBundle, of which few can be in flight.
package spireapi

import (
	"context"
	"crypto/tls"
	"errors"
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
	"github.com/renewd/renewd/internal/server/detach"
	"github.com/renewd/renewd/internal/server/detach/rpc"
	"github.com/renewd/renewd/internal/server/keyset"
)

const (
	// pageSize is the most entries in one message of SyncAuthorizedEntries, and
	// pageBytes the most bytes of two and more: a gRPC client that was told
	// nothing else, such as a stock spire-agent, takes 4 MiB.
	pageSize  = 500
	pageBytes = 1 << 20
	// maxBatch is the most X.509-SVIDs in one BatchNewX509SVID.
	maxBatch = 500
	// maxVersion is the most characters of an agent's version.
	maxVersion = 255
	// connectionAge is when a client is asked to connect anew, so that no
	// connection outlives the verification of its SVID by much; graceAge is
	// what calls in flight then still have.
	connectionAge = 3 * time.Minute
	graceAge      = time.Minute
	// maxRequest is the largest request in bytes. A batch of 500 CSRs of RSA
	// keys of 4096 bits fits. maxStreams is how many calls of one connection
	// are served at a time; the client waits with the rest. An agent of renewd
	// makes 80 when the server is slow.
	maxRequest = 1 << 20
	maxStreams = 128
)

// Limits are those of the agents' port. An agent has two connections while it
// moves to a new one. Together with maxRequest they bound what a client can make the
// server hold: 4 MiB of requests without an agent's SVID, 256 MiB for one agent.
var Limits = listen.Limits{
	Handshakes: 64, Anonymous: 16, Known: 2048, Caller: 16,
	AnonymousCalls: 4, CallerCalls: 2 * maxStreams,
}

// Observer is told of every workload's SVID that was asked for, the agents' own
// are not among them, and of what was limited. Its methods must be fast and safe
// for concurrent use.
type Observer interface {
	// Minted reports one SVID of svidType "x509" or "jwt": the outcome, and
	// how long checking, signing and recording took. What was signed and could
	// not be recorded is Unavailable. The SVIDs of a batch are recorded
	// together, and each has taken all of that time.
	Minted(svidType string, code codes.Code, took time.Duration)
	// Limited reports a call that had to wait, or was refused, because its
	// client did more than it may. The method has no package or service, and is
	// "connect" for a connection that was refused or closed.
	Limited(method string)
}

// Config says what to serve. Only TrustDomain is required.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	// Keysets signs; a new deployment in memory when nil.
	Keysets *keyset.Deployment
	// Published returns what GetBundle answers and client certificates are
	// verified against; Keysets.Bundle when nil. Where several deployments share
	// the trust domain it is the union of their bundles. It is called for every
	// such answer and must be fast; as long as nothing changes it should return
	// the same pointer, so that an answer is made once for all agents.
	Published func() *keyset.Bundle
	// Storage keeps agents, join tokens and entries; memory when nil.
	Storage Storage
	// Lost are the times that Storage knows nothing of, one for each time that it was
	// put back from a copy: what happened after From, when it was copied, and before To.
	// One in which nothing was signed that is still valid makes no difference.
	Lost []Lost
	// LostUntil is when the last of Lost ended, by what the clock shows now: at the restore
	// it may have been behind. To counts when nil.
	LostUntil func() time.Time
	// X509TTL is the lifetime of an X.509-SVID whose entry names none, of the
	// agents' own and of the server's certificate: 1 to 168 hours, 24 when
	// zero.
	X509TTL time.Duration
	// JWTTTL is the lifetime of a JWT-SVID whose entry names none; 24 hours
	// when zero.
	JWTTTL time.Duration
	// RefreshHint tells agents how often to ask for the bundle, in whole
	// seconds; no hint when zero.
	RefreshHint time.Duration
	// ConnectionAge is when a client is asked to connect anew: three minutes
	// when zero, never when negative.
	ConnectionAge time.Duration
	// IsOperator reports whether whoever has an SVID of an ID may operate the server:
	// entries with it need a ParentID or Operator; nobody when nil.
	IsOperator func(spiffeid.ID) bool
	// Ledger records every SVID before it is handed out; nothing is recorded,
	// and no reports are taken, when nil.
	Ledger Ledger
	// Connections is where the connections of every Serve count, too; each has a
	// bound of its own when nil.
	Connections *listen.Pool
	// Observer is told of every SVID asked for; nobody when nil.
	Observer Observer
	// Log receives what the server does; nothing is logged when nil.
	Log *slog.Logger
	// Now is the clock; time.Now when nil. Sure is the time that it is at least, by
	// which agents and join tokens are forgotten; Now when nil.
	Now, Sure func() time.Time
	// Heard is told what an agent's own clock showed at a call; nobody when nil.
	Heard func(agent string, sentAt time.Time)
	// Options are added to every gRPC server that Serve makes. Interceptors
	// in it see each call that is read before anything else does.
	Options []grpc.ServerOption
}

// Lost is a time that Storage knows nothing of.
type Lost struct{ From, To time.Time }

// Server holds what is served. All methods may be called concurrently.
type Server struct {
	td       spiffeid.TrustDomain
	keysets  *keyset.Deployment
	storage  Storage
	config   Config
	log      *slog.Logger
	now      func() time.Time
	observer Observer
	ledger   Ledger
	lines    *listen.Lines
	limits   *limits
	tls      *tls.Config

	entries  atomic.Pointer[entrySet]
	entriesM chan struct{} // held by who writes entries

	rendered atomic.Pointer[published]

	serving CertificateCache

	expiriesM sync.Mutex
	expiries  expiries

	calls detach.Group

	federatedM sync.RWMutex
	federated  map[spiffeid.TrustDomain]*types.Bundle
}

// New makes a Server and loads what its storage holds.
func New(c Config) (*Server, error) {
	s := &Server{
		td: c.TrustDomain, keysets: c.Keysets, storage: c.Storage, config: c,
		log: c.Log, now: c.Now, observer: c.Observer, ledger: c.Ledger,
		entriesM: make(chan struct{}, 1), federated: make(map[spiffeid.TrustDomain]*types.Bundle),
	}
	if s.now == nil {
		s.now = time.Now
	}
	if s.config.Sure == nil {
		s.config.Sure = s.now
	}
	if s.config.Heard == nil {
		s.config.Heard = func(string, time.Time) {}
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.storage == nil {
		s.storage = NewMemory()
	}
	if s.observer == nil {
		s.observer = nobody{}
	}
	if s.ledger == nil {
		s.ledger = noLedger{}
	}
	if s.config.IsOperator == nil {
		s.config.IsOperator = func(spiffeid.ID) bool { return false }
	}
	if s.config.ConnectionAge == 0 {
		s.config.ConnectionAge = connectionAge
	}
	switch {
	case s.td.IsZero():
		return nil, errors.New("new server: no trust domain")
	case c.JWTTTL < 0:
		return nil, fmt.Errorf("new server: JWT lifetime %v is negative", c.JWTTTL)
	case c.RefreshHint < 0:
		return nil, fmt.Errorf("new server: refresh hint %v is negative", c.RefreshHint)
	}
	if err := checkX509TTL(c.X509TTL); err != nil {
		return nil, fmt.Errorf("new server: X.509 lifetime %w", err)
	}
	ctx := context.Background()
	if s.keysets == nil {
		var err error
		if s.keysets, err = keyset.Open(ctx, keyset.Config{TrustDomain: s.td, Now: s.now}); err != nil {
			return nil, fmt.Errorf("new server: %w", err)
		}
	}
	if s.keysets.TrustDomain() != s.td {
		return nil, fmt.Errorf("new server: keysets are of %q, not of %q", s.keysets.TrustDomain().Name(), s.td.Name())
	}
	if s.config.Published == nil {
		s.config.Published = s.keysets.Bundle
	}
	if err := s.loadEntries(ctx); err != nil {
		return nil, fmt.Errorf("new server: %w", err)
	}
	s.listRefused()
	if err := s.loadExpiries(ctx); err != nil {
		return nil, fmt.Errorf("new server: %w", err)
	}
	s.lines = listen.NewLines(s.log)
	s.limits = newLimits(s.observer, s.lines)
	s.serving.Now, s.serving.Issue = s.now, s.issue
	s.serving.Usable = func(authority string) bool { return authority == s.keysets.Active().X509AuthorityID }
	s.tls = s.newTLSConfig()
	return s, nil
}

// Keysets is the deployment that signs, for operators.
func (s *Server) Keysets() *keyset.Deployment { return s.keysets }

// BundlePEM returns the published X.509 authorities as PEM certificates: what
// an agent's bootstrap bundle file holds.
func (s *Server) BundlePEM() []byte { return s.config.Published().PEM() }

// Serve answers on lis, which it closes, until ctx ends or lis fails, as
// [listen.Serve] does, except that calls which storage does not let go may remain;
// see [Server.Wait]. Several may run at a time, on different
// listeners, and a later one serves the same state. They share the limits of
// calls; connections are limited for each listener.
func (s *Server) Serve(ctx context.Context, lis net.Listener) error {
	return listen.Serve(ctx, lis, listen.Config{
		Credentials: credentials.NewTLS(s.tls), Identify: identity, Admit: s.screen,
		Pool: s.config.Connections, Limits: Limits, Refused: s.limits.refuse, Lines: s.lines,
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
	if s.config.Ledger != nil {
		api.RegisterFleetServer(r, &fleetService{s: s})
	}
}

// Wait returns when no call waits for storage any more. It is for who has closed that.
func (s *Server) Wait() { s.calls.Wait() }

type nobody struct{}

func (nobody) Minted(string, codes.Code, time.Duration) {}
func (nobody) Limited(string)                           {}
