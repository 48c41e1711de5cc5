package listen

import (
	"cmp"
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

	"github.com/renewd/renewd/internal/loglimit"
)

const (
	// connectTime bounds a handshake.
	connectTime = 10 * time.Second
	// drainTime is how long calls in flight may take when serving ends. A canceled
	// attestation can cost an agent its join token, and the outcome of a canceled
	// mutation is unknown to its caller.
	drainTime = 2 * time.Second
	// anonymousTime is how long a call of an anonymous caller may take: twice the
	// longest delay by a rate limit. After anonymousShare it gives way to a new one.
	anonymousTime = time.Minute
	// maxHeaders is the most bytes in a call's metadata.
	maxHeaders = 16 << 10
	// streamWindow is how much of a request is buffered before its call reads it; a
	// request that is being read gets a window of its size. connWindow only bounds
	// data in transit, which is read at once.
	streamWindow = 64 << 10
	connWindow   = 1 << 20
)

// Config configures a gRPC server. Credentials, Identify and Register are required.
type Config struct {
	Credentials credentials.TransportCredentials
	// Identify returns the caller of a connection after its handshake, "" for an
	// anonymous one.
	Identify func(credentials.AuthInfo) (caller string)
	// Admit is called before a call's request is read, and must not block. A call that
	// it refuses is not counted as in flight. Optional.
	Admit tap.ServerInHandle
	// Pool bounds the connections; when nil, the server has its own.
	Pool *Pool
	// Limits returns the limits of a client, the zero Prefix if it has no IP address. It is
	// called for each connection and call, by several goroutines at a time, and must not
	// block. Required.
	Limits func(client netip.Prefix) Limits
	// Refused is called for each call or connection that a limit refuses, with the
	// client, which may be the zero Prefix, the full method of a call, "" for a
	// connection, and the reason. It is called by several goroutines at a time and
	// must not block. Optional.
	Refused func(from netip.Prefix, method string, reason error)
	// Age is when a client is asked to reconnect, so that no connection is used long
	// after its SVID was verified; never if it is not positive. Calls in flight may
	// continue for Grace after that.
	Age, Grace time.Duration
	// MaxRequest is the largest request in bytes, and MaxStreams how many calls of
	// one connection are served at a time; the client delays further calls.
	MaxRequest, MaxStreams int
	// Lines are run while serving, for Admit and Refused; see [NewLog]. Optional.
	Lines *loglimit.Log
	// Options come before those that Serve adds, and cannot replace them.
	Options  []grpc.ServerOption
	Register func(grpc.ServiceRegistrar)
}

// NewLog returns a Log for lines that remote clients can cause at any rate: one a minute
// about each of 16 clients, and one about all others.
func NewLog(log *slog.Logger) *loglimit.Log { return loglimit.New(log, time.Minute, 16) }

// Serve serves gRPC on lis, which it closes, until ctx ends or lis fails. When ctx
// ends, calls in flight have two seconds to finish; then they are canceled. It returns
// when all its connections are closed and all its goroutines have ended: nil if ctx
// has ended.
func Serve(ctx context.Context, lis net.Listener, c Config) error {
	c.Pool = cmp.Or(c.Pool, NewPool())
	c.Lines = cmp.Or(c.Lines, NewLog(slog.New(slog.DiscardHandler)))
	if c.Refused == nil {
		c.Refused = func(netip.Prefix, string, error) {}
	}
	s := &server{Config: c, inFlight: make(map[string][]*call)}
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

// drain stops gs and gives calls in flight drainTime to finish. A graceful stop alone
// would wait for streams that clients keep open.
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

// server is one running Serve.
type server struct {
	Config

	mu       sync.Mutex
	inFlight map[string][]*call // by caller, client or site, the oldest first
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
		// TLS reads full records by itself. Without a buffer an idle connection
		// takes 32 KiB less.
		grpc.ReadBufferSize(0),
		grpc.InTapHandle(s.admit),
	}
	if s.Age > 0 {
		opts = append(opts, grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: s.Age, MaxConnectionAgeGrace: s.Grace}))
	}
	return opts
}

// admit refuses a call that Admit refuses or that exceeds a limit of calls in flight.
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
	c := &call{method: info.FullMethodName, from: from, of: s.countedFor(caller, from), began: time.Now()}
	if caller == "" {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, anonymousTime)
		ctx, c.evict = context.WithCancelCause(ctx)
		context.AfterFunc(stream, cancel)
	}
	evicted, full := s.begin(c)
	if full != nil {
		err := status.Errorf(codes.ResourceExhausted, "%s has %d calls in flight: try again later", full.name, full.limit)
		if c.evict != nil {
			c.evict(err)
		}
		s.Refused(from, info.FullMethodName, err)
		return nil, err
	}
	for _, e := range evicted {
		err := status.Errorf(codes.ResourceExhausted, "%s has too many calls in flight, and this one has taken %v: try again later", e.from, anonymousShare)
		e.evict(err)
		s.Refused(e.from, e.method, err)
	}
	context.AfterFunc(stream, func() { s.end(c) })
	return ctx, nil
}

// call is a call in flight.
type call struct {
	method string
	from   netip.Prefix
	of     []counter
	began  time.Time
	evict  context.CancelCauseFunc // ends a call of an anonymous caller; nil for others
}

// counter counts the calls in flight of a caller, client or site.
type counter struct {
	name  string
	limit int
}

// countedFor returns the counters of a call.
func (s *server) countedFor(caller string, from netip.Prefix) (of []counter) {
	switch limits := s.Limits(from); {
	case caller != "" && limits.CallerCalls > 0:
		of = append(of, counter{caller, limits.CallerCalls})
	case caller == "" && limits.AnonymousCalls > 0 && from.IsValid():
		of = append(of, counter{from.String(), limits.AnonymousCalls})
		if site := Site(from); site.IsValid() {
			of = append(of, counter{site.String(), siteFactor * limits.AnonymousCalls})
		}
	}
	return of
}

// begin counts a call. If a limit is reached, the oldest call that counts towards it is
// no longer counted and is returned, to be evicted; if that is not anonymous or has not
// had anonymousShare, the new call is not counted, and full is the counter.
func (s *server) begin(c *call) (evicted []*call, full *counter) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range c.of {
		of := s.inFlight[c.of[i].name]
		counted := func(o counter) bool { return o.name == c.of[i].name }
		if len(of) < c.of[i].limit || slices.ContainsFunc(evicted, func(e *call) bool { return slices.ContainsFunc(e.of, counted) }) {
			continue
		}
		if of[0].evict == nil || c.began.Sub(of[0].began) < anonymousShare {
			return nil, &c.of[i]
		}
		evicted = append(evicted, of[0])
	}
	for _, e := range evicted {
		s.endLocked(e)
	}
	for _, of := range c.of {
		s.inFlight[of.name] = append(s.inFlight[of.name], c)
	}
	return evicted, nil
}

// end does nothing for a call that was evicted.
func (s *server) end(c *call) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.endLocked(c)
}

func (s *server) endLocked(c *call) {
	for _, of := range c.of {
		left := slices.DeleteFunc(s.inFlight[of.name], func(o *call) bool { return o == c })
		if len(left) == 0 {
			delete(s.inFlight, of.name)
		} else {
			s.inFlight[of.name] = left
		}
	}
}
