package workload

import (
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
)

// Limits on what one caller can make the agent hold or do.
const (
	// DefaultMaxPerUser is how many connections, and how many calls, the
	// processes of one user may have open at a time.
	DefaultMaxPerUser = 4096
	// maxStreams is how many calls one connection may have open.
	maxStreams = 256
	// maxRequest is the size of a request in bytes. The largest there is holds
	// a JWT-SVID to validate.
	maxRequest = 64 << 10
	// maxHeaders is the size of a request's metadata in bytes.
	maxHeaders = 8 << 10
	// handshakeTimeout is how long a connection may take to become one.
	handshakeTimeout = 10 * time.Second
	// stopGrace is how long clients get to read the last status at shutdown.
	stopGrace = time.Second
)

// JWTMinter has the server sign a JWT-SVID for an entry.
type JWTMinter interface {
	// MintJWT returns the token in JWS compact serialization. It respects ctx,
	// and is called concurrently.
	MintJWT(ctx context.Context, entryID string, audience []string) (token string, err error)
}

// Observer is told what happens, for metrics. Its methods are called
// concurrently and must not block. Method is the RPC's short name, such as
// FetchX509SVID.
type Observer interface {
	// StreamOpened is called when a caller of a streaming RPC was let in.
	StreamOpened(method string)
	// StreamClosed is called at the end of what StreamOpened announced.
	StreamClosed(method string)
	// OversizeAnswer counts answers above the 4 MiB that gRPC clients accept
	// unless told otherwise.
	OversizeAnswer(method string)
	// JWTMinted is called after each attempt to have a JWT-SVID minted, with
	// how long it took; err is nil for one that was signed and checked.
	JWTMinted(took time.Duration, err error)
}

// Config is what a [Server] needs.
type Config struct {
	// Cache holds what is served. Required.
	Cache *cache.Cache
	// Attestors find the callers' selectors. At least one is required.
	Attestors []attest.Attestor
	// Needs is 0 while Attestors find out all that they can, and greater each time
	// that they begin to find out more because an entry has come to need it; see
	// [cache.Cache.Needs]. Streams whose callers were attested before are attested
	// again then, while they go on. Nil: never.
	Needs func() uint64
	// JWT mints JWT-SVIDs. Nil: FetchJWTSVID hands out what is cached and is
	// Unavailable otherwise.
	JWT JWTMinter
	// ReplaceTainted has a JWT-SVID that is held and was signed by a tainted key
	// minted again when a caller asks for it. It is handed out meanwhile.
	ReplaceTainted bool
	// Log gets what an operator should know. Nil: nothing is logged.
	Log *slog.Logger
	// Observer is told what happens. Nil: nobody.
	Observer Observer
	// Record is called before each answer with X.509-SVIDs, with what its process can
	// use from then on and for how long; it returns soon. Nil: nothing is recorded.
	Record func(cache.Process, []cache.Use)
	// MaxPerUser limits the open connections and the open calls of one user,
	// each. Zero means DefaultMaxPerUser.
	MaxPerUser int
	// ServerOptions are added to those of the gRPC server, such as
	// interceptors that count calls.
	ServerOptions []grpc.ServerOption
	// Peers identifies the process behind a connection, which is closed with
	// the connection. Nil means [attest.FromConn], for Unix sockets.
	Peers func(net.Conn) (*attest.Peer, error)
}

// Server serves the Workload API. Make it with [New].
type Server struct {
	cfg   Config
	log   *slog.Logger
	obs   Observer
	said  repeats
	conns quota // by user
	calls quota
	// flying are the mints of JWT-SVIDs under way, by the user who began them.
	flying quota
}

// New returns a server. It fails when the configuration lacks what is
// required.
func New(cfg Config) (*Server, error) {
	if cfg.Cache == nil {
		return nil, errors.New("workload API: no cache")
	}
	if len(cfg.Attestors) == 0 {
		return nil, errors.New("workload API: no workload attestor is configured")
	}
	if cfg.MaxPerUser == 0 {
		cfg.MaxPerUser = DefaultMaxPerUser
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Observer == nil {
		cfg.Observer = nobody{}
	}
	if cfg.Peers == nil {
		cfg.Peers = unixPeer
	}
	if cfg.Needs == nil {
		cfg.Needs = func() uint64 { return 0 }
	}
	if cfg.Record == nil {
		cfg.Record = func(cache.Process, []cache.Use) {}
	}
	return &Server{
		cfg:    cfg,
		log:    cfg.Log,
		obs:    cfg.Observer,
		conns:  quota{limit: cfg.MaxPerUser},
		calls:  quota{limit: cfg.MaxPerUser},
		flying: quota{limit: cfg.MaxPerUser},
	}, nil
}

// Serve answers calls on lis, which it closes, until ctx ends. Then open calls
// end with Unavailable, so that clients try again, and Serve returns nil once
// every one of them has ended. It fails when lis does.
func (s *Server) Serve(ctx context.Context, lis net.Listener) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	svc := &service{Server: s, stopping: ctx, mints: make(chan struct{}, maxMints),
		flights: make(map[flightKey]*flight), lanes: make(map[*cache.Entry]*lane)}
	// The order matters: options given by the caller come first, so that they
	// cannot lift the limits.
	g := grpc.NewServer(append(s.cfg.ServerOptions[:len(s.cfg.ServerOptions):len(s.cfg.ServerOptions)],
		grpc.Creds(peerCredentials{s}),
		grpc.ForceServerCodecV2(codec{}),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.WaitForHandlers(true),
		// A connection mostly waits for the next rotation: it should not own
		// buffers meanwhile. Requests are tiny.
		grpc.ReadBufferSize(readBuffer),
		grpc.WriteBufferSize(0), // see peerConn.await
		grpc.StaticStreamWindowSize(64<<10),
		grpc.StaticConnWindowSize(64<<10),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	)...)
	g.RegisterService(&apiDesc, svc)

	// Handlers end by themselves when ctx does. A client that does not read its
	// last answer, or keeps its connection, is cut off after the grace.
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
	svc.minting.Wait()
	if failed {
		return fmt.Errorf("serve the Workload API: %w", err)
	}
	return nil
}

// service answers the calls of one Serve.
type service struct {
	workloadpb.UnimplementedSpiffeWorkloadAPIServer
	*Server
	stopping context.Context

	minting sync.WaitGroup
	mints   chan struct{} // a slot for each running mint

	mu      sync.Mutex
	flights map[flightKey]*flight  // the mints under way
	lanes   map[*cache.Entry]*lane // of the entries that they are for
}

// readBuffer is the read buffer of a connection in bytes.
const readBuffer = 1 << 10

type nobody struct{}

func (nobody) StreamOpened(string)            {}
func (nobody) StreamClosed(string)            {}
func (nobody) OversizeAnswer(string)          {}
func (nobody) JWTMinted(time.Duration, error) {}
