package admin

import (
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/listen"
	"github.com/renewd/renewd/internal/server/detach/rpc"
)

const (
	// maxConnectionAge is the age at which clients must reconnect, so that their SVIDs
	// are verified again. connectionGrace lets a mutation in flight complete.
	maxConnectionAge = 3 * time.Minute
	connectionGrace  = mutationTimeout + 10*time.Second
	// maxStreams limits the concurrent calls of a connection.
	maxStreams = 16
)

// Limits are the limits of the operators' port and, except for those per address, of the
// admin socket. Callers without a role are anonymous.
var Limits = listen.Limits{
	Handshakes: 64, Anonymous: 16, Known: 256, Caller: 64,
	AnonymousCalls: 4, CallerCalls: maxStreams,
}

// ServeUnix serves on the admin socket until ctx ends and closes it, as [listen.Serve] does.
// It fails if the socket's directory is writable for others, who could replace the socket.
func (s *Service) ServeUnix(ctx context.Context, lis net.Listener) error {
	if err := checkDirectory(lis.Addr()); err != nil {
		_ = lis.Close() // err is the one to report
		return err
	}
	return s.serve(ctx, lis, processCredentials{})
}

func checkDirectory(socket net.Addr) error {
	addr, ok := socket.(*net.UnixAddr)
	if !ok {
		return nil // handshakes will fail
	}
	dir := filepath.Dir(addr.Name)
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("socket %s: check its directory: %w", addr.Name, err)
	}
	const othersWrite fs.FileMode = 0o002
	if info.Mode()&othersWrite != 0 {
		return fmt.Errorf("socket %s: all users can write to directory %s and replace the socket: choose another directory, or run chmod o-w %s",
			addr.Name, dir, dir)
	}
	return nil
}

// ServeTLS serves remote operators until ctx ends and closes lis.
func (s *Service) ServeTLS(ctx context.Context, lis net.Listener) error {
	return s.serve(ctx, lis, credentials.NewTLS(s.tlsConfig()))
}

func (s *Service) serve(ctx context.Context, lis net.Listener, creds credentials.TransportCredentials) error {
	return listen.Serve(ctx, lis, listen.Config{
		Credentials: creds, Identify: s.identity, Admit: s.admit,
		Pool: s.config.Connections, Limits: listen.ForAll(Limits), Refused: s.logLimited, Lines: s.lines,
		Age: maxConnectionAge, Grace: connectionGrace, MaxRequest: api.MaxMessage, MaxStreams: maxStreams,
		Options: append(slices.Clone(s.config.Options),
			grpc.ChainUnaryInterceptor(s.interceptUnary),
			grpc.ChainStreamInterceptor(s.interceptBackup, rpc.Stream(&s.calls))),
		Register: func(r grpc.ServiceRegistrar) {
			api.RegisterOperatorServer(r, s)
			entryv1.RegisterEntryServer(r, &entryService{s: s})
		},
	})
}

// logLimited logs a connection or call that exceeds the limits.
func (s *Service) logLimited(from netip.Prefix, method string, reason error) {
	s.lines.Note(slog.LevelWarn, "operator connection or call rejected by limits", listen.Name(from), "address", listen.Name(from), "method", method, "error", reason)
}
