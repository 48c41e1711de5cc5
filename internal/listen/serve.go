package listen

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"
)

const (
	// connectTime bounds a handshake.
	connectTime = 10 * time.Second
	// drainTime is how long calls in flight may take when serving ends. A call
	// that is cut off can cost an agent its join token; a mutation that is cut off
	// has happened or has not.
	drainTime = 2 * time.Second
	// anonymousTime is how long a call of an anonymous caller may take: twice as long
	// as it waits for its turn at most.
	anonymousTime = time.Minute
	// maxHeaders is the most bytes of a call's metadata.
	maxHeaders = 16 << 10
	// streamWindow is how much of a request that nobody reads yet is taken, for each
	// call. A request that is being read gets a window of its size. connWindow
	// only bounds what is on its way, which is read at once.
	streamWindow = 64 << 10
	connWindow   = 1 << 20
)

// Config says how a gRPC server is served. Credentials, Identify and Register
// are required.
type Config struct {
	Credentials credentials.TransportCredentials
	// Identify says whose connection it is after its handshake, "" for an anonymous
	// caller.
	Identify func(credentials.AuthInfo) (caller string)
	// Admit is asked before anything of a call's request is read, and must not
	// block. What it refuses holds nothing and is not counted as a call in flight.
	Admit tap.ServerInHandle
	// Pool is where the connections count, too; nil for one of its own.
	Pool   *Pool
	Limits Limits
	// Refused is told of what the limits refused: the client, who may be none, the
	// full method of a call, "" for a connection, and why. It is called by several
	// goroutines at a time and must not block. Nil for nobody.
	Refused func(from netip.Prefix, method string, reason error)
	// Age is when a client is asked to connect again, so that no connection
	// outlives the verification of its SVID by much; never when not positive.
	// Grace is what calls in flight then still have.
	Age, Grace time.Duration
	// MaxRequest is the largest request in bytes, and MaxStreams how many calls of
	// one connection are served at a time; the client waits with the rest.
	MaxRequest, MaxStreams int
	// Lines is what Admit and Refused write to the log, if they do; it is run
	// meanwhile.
	Lines *Lines
	// Options come before those that Serve adds, which they cannot replace.
	Options  []grpc.ServerOption
	Register func(grpc.ServiceRegistrar)
}

// Serve answers gRPC calls on lis, which it closes, until ctx ends or lis fails.
// When ctx ends, calls in flight have two seconds to finish; then they are
// canceled. It returns when all its connections are closed and all its goroutines
// have ended: nil when ctx ended.
func Serve(ctx context.Context, lis net.Listener, c Config) error {
	if c.Pool == nil {
		c.Pool = NewPool()
	}
	if c.Lines == nil {
		c.Lines = NewLines(slog.New(slog.DiscardHandler))
	}
	if c.Refused == nil {
		c.Refused = func(netip.Prefix, string, error) {}
	}
	s := &server{Config: c, inFlight: make(map[string]int)}
	gs := grpc.NewServer(append(slices.Clone(c.Options), s.options()...)...)
	c.Register(gs)

	limited := c.Pool.Listen(lis, c.Limits, func(from netip.Prefix, reason error) { c.Refused(from, "", reason) })
	written := make(chan struct{})
	logging, stop := context.WithCancel(context.WithoutCancel(ctx))
	go func() {
		defer close(written)
		c.Lines.Run(logging)
	}()
	failed, drained := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(drained)
		select {
		case <-ctx.Done():
			drain(gs, limited)
		case <-failed:
			limited.closeAll()
			gs.Stop()
		}
	}()
	err := gs.Serve(limited)
	close(failed)
	<-drained
	stop()
	<-written
	if err == nil || ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("serve: %w", err)
}

// drain lets calls in flight finish for a while. A stream that a client keeps
// open would hold up a graceful stop for ever.
func drain(gs *grpc.Server, open *Listener) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		gs.GracefulStop()
	}()
	timer := time.NewTimer(drainTime)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
		open.closeAll()
		gs.Stop()
		<-done
	}
}

// server is what Serve serves.
type server struct {
	Config

	mu       sync.Mutex
	inFlight map[string]int // calls, by who makes them
}

func (s *server) options() []grpc.ServerOption {
	opts := []grpc.ServerOption{
		grpc.Creds(&identifying{TransportCredentials: s.Credentials, s: s}),
		grpc.ConnectionTimeout(connectTime),
		grpc.WaitForHandlers(true),
		grpc.MaxRecvMsgSize(s.MaxRequest),
		grpc.MaxConcurrentStreams(uint32(s.MaxStreams)),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.StaticStreamWindowSize(streamWindow),
		grpc.StaticConnWindowSize(connWindow),
		// TLS reads whole records by itself, and an idle connection needs no
		// buffer: 32 KiB less for each.
		grpc.ReadBufferSize(0),
		grpc.InTapHandle(s.admit),
	}
	if s.Age > 0 {
		opts = append(opts, grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: s.Age, MaxConnectionAgeGrace: s.Grace}))
	}
	return opts
}

// admit lets a call in that may be made and has room.
func (s *server) admit(ctx context.Context, info *tap.Info) (context.Context, error) {
	stream := ctx // gRPC cancels it at the end of the call
	if s.Admit != nil {
		var err error
		if ctx, err = s.Admit(ctx, info); err != nil {
			return nil, err
		}
	}
	p, ok := peer.FromContext(ctx)
	if !ok {
		return ctx, nil
	}
	from, caller := Client(p.Addr), s.Identify(p.AuthInfo)
	of := s.countedFor(caller, from)
	if full, ok := s.begin(of); !ok {
		err := status.Errorf(codes.ResourceExhausted, "%s has %d calls in flight: try again later", full.who, full.limit)
		s.Refused(from, info.FullMethodName, err)
		return nil, err
	}
	context.AfterFunc(stream, func() { s.end(of) })
	if caller == "" {
		bounded, cancel := context.WithTimeout(ctx, anonymousTime)
		context.AfterFunc(stream, cancel)
		ctx = bounded
	}
	return ctx, nil
}

// counter counts the calls of somebody.
type counter struct {
	who   string
	limit int
}

// countedFor are the counters of a call, with a limit each.
func (s *server) countedFor(caller string, from netip.Prefix) (of []counter) {
	switch {
	case caller != "" && s.Limits.CallerCalls > 0:
		of = append(of, counter{caller, s.Limits.CallerCalls})
	case caller == "" && s.Limits.AnonymousCalls > 0 && from.IsValid():
		of = append(of, counter{from.String(), s.Limits.AnonymousCalls})
		if site := Site(from); site.IsValid() {
			of = append(of, counter{site.String(), siteFactor * s.Limits.AnonymousCalls})
		}
	}
	return of
}

// begin counts a call, or says which counter has no room for it.
func (s *server) begin(of []counter) (full counter, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range of {
		if s.inFlight[c.who] >= c.limit {
			return c, false
		}
	}
	for _, c := range of {
		s.inFlight[c.who]++
	}
	return counter{}, true
}

func (s *server) end(of []counter) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range of {
		if s.inFlight[c.who]--; s.inFlight[c.who] == 0 {
			delete(s.inFlight, c.who)
		}
	}
}
