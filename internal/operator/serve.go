package operator

import (
	"context"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/net/netutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/detach/rpc"
)

const (
	// connectTime bounds a handshake.
	connectTime = 10 * time.Second
	// connectionAge is when a client is asked to connect anew, so that no
	// connection outlives the verification of its SVID by much; graceAge is
	// what a mutation in flight then still has.
	connectionAge = 3 * time.Minute
	graceAge      = mutationTime + 10*time.Second
	// drainTime is how long calls in flight may take when serving ends. A
	// mutation that is cut off has happened or has not.
	drainTime = 2 * time.Second
	// maxMessage bounds a request, and at the client an answer, in bytes:
	// 100,000 entries take about 30 MB, and twice that when all have changed.
	// Nobody without a role gets to send one.
	maxMessage = 128 << 20
	// maxConnections bounds what strangers can make the server hold. It shares its
	// file descriptors with what signs for agents.
	maxConnections = 1000
	// maxStreams is how many calls of one connection are served at a time.
	maxStreams = 16
	// maxHeaders is the most bytes of a call's metadata.
	maxHeaders = 16 << 10
)

// ServeUnix answers on the admin socket, which it closes, until ctx ends; then
// calls in flight have two seconds to finish before they are canceled. It
// returns when all its connections are closed and all its calls have ended: nil
// when ctx ended. A socket in a folder that anybody may write to is refused:
// somebody else could put another in its place.
func (s *Service) ServeUnix(ctx context.Context, lis net.Listener) error {
	if err := checkFolder(lis.Addr()); err != nil {
		_ = lis.Close() // the other error is the one to mend
		return err
	}
	return s.serve(ctx, lis, processCredentials{})
}

func checkFolder(socket net.Addr) error {
	addr, ok := socket.(*net.UnixAddr)
	if !ok {
		return nil // the handshakes will fail
	}
	folder := filepath.Dir(addr.Name)
	info, err := os.Stat(folder)
	if err != nil {
		return fmt.Errorf("socket %s: look at its folder: %w", addr.Name, err)
	}
	const anybody fs.FileMode = 0o002
	if info.Mode()&anybody != 0 {
		return fmt.Errorf("socket %s: anybody may write to folder %s and put another socket in its place: choose another folder, or run chmod o-w %s",
			addr.Name, folder, folder)
	}
	return nil
}

// ServeTLS answers remote operators likewise, on at most a thousand connections:
// more wait to be accepted.
func (s *Service) ServeTLS(ctx context.Context, lis net.Listener) error {
	return s.serve(ctx, netutil.LimitListener(lis, maxConnections), credentials.NewTLS(s.tlsConfig()))
}

func (s *Service) serve(ctx context.Context, lis net.Listener, creds credentials.TransportCredentials) error {
	gs := grpc.NewServer(append(slices.Clone(s.config.Options),
		grpc.Creds(creds),
		grpc.ConnectionTimeout(connectTime),
		grpc.WaitForHandlers(true),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: connectionAge, MaxConnectionAgeGrace: graceAge}),
		grpc.InTapHandle(s.admit),
		grpc.ChainUnaryInterceptor(s.carryOut),
		grpc.ChainStreamInterceptor(s.carryOutBackup, rpc.Stream(&s.calls)),
	)...)
	api.RegisterOperatorServer(gs, s)

	end, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()
	failed, drained := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(drained)
		select {
		case <-ctx.Done():
			drain(gs, cut)
		case <-failed:
			cut()
			gs.Stop()
		}
	}()
	err := gs.Serve(&listener{Listener: lis, end: end})
	close(failed)
	<-drained
	if err == nil || ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("serve: %w", err)
}

// drain lets calls in flight finish for a while.
func drain(gs *grpc.Server, cut func()) {
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
		cut()
		gs.Stop()
		<-done
	}
}

// listener closes its connections when end is done. gRPC waits for connections
// that are still in their handshake and cannot close them, so without this a
// client that never says a word would hold up the end.
type listener struct {
	net.Listener
	end context.Context
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	raw, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &conn{Conn: raw, release: context.AfterFunc(l.end, func() { _ = raw.Close() })}, nil
}

type conn struct {
	net.Conn
	release func() bool
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.release()
	return c.Conn.Close()
}
