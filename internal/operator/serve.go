package operator

import (
	"context"
	"fmt"
	"net"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/renewd/renewd/internal/api"
)

const (
	// connectTime bounds a handshake.
	connectTime = 5 * time.Second
	// connectionAge is when a client is asked to connect anew, and is verified
	// anew; graceAge is what a mutation in flight then still has.
	connectionAge = 3 * time.Minute
	graceAge      = 3 * time.Minute
	// drainTime is how long calls in flight may take when serving ends. A
	// mutation that is cut off has happened or has not.
	drainTime = 2 * time.Second
	// maxRequest is the largest request in bytes: about 30,000 entries.
	maxRequest = 16 << 20
	// maxStreams is how many calls of one connection are served at a time.
	maxStreams = 16
)

// ServeUnix answers on the admin socket, which it closes, until ctx ends; then
// it returns nil, when all its calls have ended.
func (s *Service) ServeUnix(ctx context.Context, lis net.Listener) error {
	return s.serve(ctx, lis, processCredentials{})
}

// ServeTLS answers remote operators likewise.
func (s *Service) ServeTLS(ctx context.Context, lis net.Listener) error {
	return s.serve(ctx, lis, credentials.NewTLS(s.tlsConfig()))
}

func (s *Service) serve(ctx context.Context, lis net.Listener, creds credentials.TransportCredentials) error {
	gs := grpc.NewServer(append(slices.Clone(s.config.Options),
		grpc.Creds(creds),
		grpc.ConnectionTimeout(connectTime),
		grpc.WaitForHandlers(true),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: connectionAge, MaxConnectionAgeGrace: graceAge}),
		grpc.ChainUnaryInterceptor(s.authorize),
	)...)
	api.RegisterOperatorServer(gs, s)
	failed, drained := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(drained)
		select {
		case <-failed:
			gs.Stop()
			return
		case <-ctx.Done():
		}
		timer := time.AfterFunc(drainTime, gs.Stop)
		defer timer.Stop()
		gs.GracefulStop()
	}()
	err := gs.Serve(lis)
	close(failed)
	<-drained
	if err == nil || ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("serve: %w", err)
}
