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

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/listen"
	"github.com/renewd/renewd/internal/server/detach/rpc"
)

const (
	// connectionAge is when a client is asked to connect anew, so that no
	// connection outlives the verification of its SVID by much; graceAge is
	// what a mutation in flight then still has.
	connectionAge = 3 * time.Minute
	graceAge      = mutationTime + 10*time.Second
	// maxStreams is how many calls of one connection are served at a time.
	maxStreams = 16
)

// Limits are those of the operators' port and, where they are not about
// addresses, of the admin socket. Callers without a role are anonymous.
var Limits = listen.Limits{
	Handshakes: 64, Anonymous: 16, Known: 256, Caller: 64,
	AnonymousCalls: 4, CallerCalls: maxStreams,
}

// ServeUnix answers on the admin socket, which it closes, until ctx ends, as
// [listen.Serve] does. A socket in a folder that anybody may write to is refused:
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

// ServeTLS answers remote operators likewise.
func (s *Service) ServeTLS(ctx context.Context, lis net.Listener) error {
	return s.serve(ctx, lis, credentials.NewTLS(s.tlsConfig()))
}

func (s *Service) serve(ctx context.Context, lis net.Listener, creds credentials.TransportCredentials) error {
	return listen.Serve(ctx, lis, listen.Config{
		Credentials: creds, Identify: s.identity, Admit: s.admit,
		Pool: s.config.Connections, Limits: Limits, Refused: s.limited, Lines: s.lines,
		Age: connectionAge, Grace: graceAge, MaxRequest: api.MaxMessage, MaxStreams: maxStreams,
		Options: append(slices.Clone(s.config.Options),
			grpc.ChainUnaryInterceptor(s.carryOut),
			grpc.ChainStreamInterceptor(s.carryOutBackup, rpc.Stream(&s.calls))),
		Register: func(r grpc.ServiceRegistrar) { api.RegisterOperatorServer(r, s) },
	})
}

// limited notes what the limits refused.
func (s *Service) limited(from netip.Prefix, method string, reason error) {
	s.lines.Note(slog.LevelWarn, "operators' connections or calls refused", listen.Name(from), "client", listen.Name(from), "method", method, "error", reason)
}
