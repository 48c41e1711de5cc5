package workload

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/attest"
	"github.com/renewd/renewd/internal/loglimit"
)

// Limits of the resources that one caller can use.
const (
	// DefaultMaxPerUser is how many connections, and how many calls, the
	// processes of one user may have open at a time.
	DefaultMaxPerUser = 4096
	// maxStreams is how many calls one connection may have open.
	maxStreams = 256
	// maxRequest is the size of a request in bytes. The largest holds a JWT-SVID to
	// validate.
	maxRequest = 64 << 10
	// maxHeaders is the size of a request's metadata in bytes.
	maxHeaders = 8 << 10
	// handshakeTimeout is how long the handshake of a connection may take.
	handshakeTimeout = 10 * time.Second
	// maxSubjects is how many subjects of repeated log lines are distinguished, such
	// as denied callers.
	maxSubjects = 1024
	// stopGrace is how long clients get to read the last status at shutdown.
	stopGrace = time.Second
)

// JWTMinter has the server sign a JWT-SVID for an entry.
type JWTMinter interface {
	// MintJWT returns the token in JWS compact serialization. It respects ctx,
	// and is called concurrently.
	MintJWT(ctx context.Context, entryID string, audience []string) (token string, err error)
}

// Observer receives events for metrics. Its methods are called concurrently and
// must not block. Method is the RPC's short name, such as FetchX509SVID.
type Observer interface {
	// StreamOpened is called when a caller of a streaming RPC was attested.
	StreamOpened(method string)
	// StreamClosed is called at the end of each stream that StreamOpened announced.
	StreamClosed(method string)
	// OversizeAnswer is called for each answer above 4 MiB, the limit of gRPC
	// clients by default.
	OversizeAnswer(method string)
	// Attested is called for each attestor after the attestation of a caller, with the
	// time that it took. err is nil if it succeeded.
	Attested(attestor string, took time.Duration, err error)
	// JWTMinted is called after each attempt to mint a JWT-SVID with the time that it
	// took. err is nil if the token was signed and checked.
	JWTMinted(took time.Duration, err error)
}

// Config is what a [Server] needs.
type Config struct {
	// Cache holds what is served. Required.
	Cache *cache.Cache
	// Attestors find the callers' selectors. At least one is required. A caller that an
	// entry could match whose selectors an attestor failed to find gets Unavailable, not
	// PermissionDenied.
	Attestors []attest.Attestor
	// LogSelectors are the types of selectors whose values may be logged, such as unix,
	// or prefixes of whole parts, such as docker:label. Of others only the type is.
	LogSelectors []string
	// Needs returns 0 at first, and a greater number each time that Attestors begin to
	// find more kinds of selectors because an entry needs them; see
	// [cache.Cache.Needs]. The callers of open streams are then attested again, and
	// their streams go on. Nil: never.
	Needs func() uint64
	// JWT mints JWT-SVIDs. Nil: FetchJWTSVID serves cached tokens and is Unavailable
	// otherwise.
	JWT JWTMinter
	// ReplaceTainted mints a cached JWT-SVID of a tainted key again when a caller
	// asks for it. The cached one is served meanwhile.
	ReplaceTainted bool
	// Log receives messages for operators. Nil: nothing is logged.
	Log *slog.Logger
	// Observer receives events for metrics. Nil: none.
	Observer Observer
	// Record is called before each answer with X.509-SVIDs, with the process and all
	// that it may use from then on. It must return soon. Nil: nothing is recorded.
	Record func(cache.Process, []cache.Use)
	// MaxPerUser limits the open connections, the open calls and the JWT-SVID mints of
	// one user, each. Zero means DefaultMaxPerUser.
	MaxPerUser int
	// ServerOptions are added to those of the gRPC server, such as
	// interceptors that count calls.
	ServerOptions []grpc.ServerOption
	// Peers identifies the process of a connection. The peer is closed with the
	// connection. Nil means [attest.FromConn], for Unix sockets.
	Peers func(net.Conn) (*attest.Peer, error)
}

// Server serves the Workload API. Make it with [New].
type Server struct {
	cfg   Config
	lines *loglimit.Log
	conns quota
	calls quota
	mints quota // mintJobs, by the user who started them
}

// New returns a server. It fails if a required field is missing.
func New(cfg Config) (*Server, error) {
	if cfg.Cache == nil {
		return nil, errors.New("workload API: no cache")
	}
	if len(cfg.Attestors) == 0 {
		return nil, errors.New("workload API: no workload attestor")
	}
	cfg.MaxPerUser = cmp.Or(cfg.MaxPerUser, DefaultMaxPerUser)
	cfg.Log = cmp.Or(cfg.Log, slog.New(slog.DiscardHandler))
	cfg.Observer = cmp.Or[Observer](cfg.Observer, noopObserver{})
	if cfg.Peers == nil {
		cfg.Peers = peerOfUnixConn
	}
	if cfg.Needs == nil {
		cfg.Needs = func() uint64 { return 0 }
	}
	if cfg.Record == nil {
		cfg.Record = func(cache.Process, []cache.Use) {}
	}
	return &Server{
		cfg:   cfg,
		lines: loglimit.New(cfg.Log, loglimit.Interval, maxSubjects),
		conns: quota{limit: cfg.MaxPerUser},
		calls: quota{limit: cfg.MaxPerUser},
		mints: quota{limit: cfg.MaxPerUser},
	}, nil
}

// Serve answers calls on lis, which it closes, until ctx ends. Then open calls end
// with Unavailable, so that clients retry, and Serve returns nil after the last one.
// It fails if lis fails.
func (s *Server) Serve(ctx context.Context, lis net.Listener) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	svc := &service{Server: s, stopping: ctx, mintSlots: make(chan struct{}, maxMints),
		jobs: make(map[mintKey]*mintJob), entryJobs: make(map[*cache.Entry]*entryLimits)}
	// ServerOptions come first, so that they cannot lift the limits.
	g := grpc.NewServer(append(s.cfg.ServerOptions[:len(s.cfg.ServerOptions):len(s.cfg.ServerOptions)],
		grpc.Creds(peerCredentials{s}),
		grpc.ForceServerCodecV2(codec{}),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.WaitForHandlers(true),
		// An idle connection should hold little memory. Requests are tiny.
		grpc.ReadBufferSize(readBuffer),
		grpc.WriteBufferSize(0), // see peerConn.track
		grpc.StaticStreamWindowSize(64<<10),
		grpc.StaticConnWindowSize(64<<10),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	)...)
	g.RegisterService(&apiDesc, svc)

	// Handlers end with ctx. A client that does not read its last answer, or keeps
	// its connection, is disconnected after stopGrace.
	var stopper sync.WaitGroup
	drained := make(chan struct{})
	stopper.Go(func() {
		<-ctx.Done()
		g.GracefulStop()
		close(drained)
	})
	stopper.Go(func() {
		<-ctx.Done()
		grace := time.NewTimer(stopGrace)
		defer grace.Stop()
		select {
		case <-drained:
		case <-grace.C:
		}
		g.Stop()
	})
	err := g.Serve(lis)
	failed := err != nil && ctx.Err() == nil
	stop()
	stopper.Wait()
	svc.running.Wait()
	if failed {
		return fmt.Errorf("serve the Workload API: %w", err)
	}
	return nil
}

// service answers the calls of one run of Serve.
type service struct {
	workloadpb.UnimplementedSpiffeWorkloadAPIServer
	*Server
	stopping context.Context

	running   sync.WaitGroup // mintJobs
	mintSlots chan struct{}  // a slot for each request to the server

	mu        sync.Mutex
	jobs      map[mintKey]*mintJob
	entryJobs map[*cache.Entry]*entryLimits // of the entries of jobs
}

// readBuffer is the read buffer of a connection in bytes.
const readBuffer = 1 << 10

type noopObserver struct{}

func (noopObserver) StreamOpened(string)                   {}
func (noopObserver) StreamClosed(string)                   {}
func (noopObserver) OversizeAnswer(string)                 {}
func (noopObserver) Attested(string, time.Duration, error) {}
func (noopObserver) JWTMinted(time.Duration, error)        {}
