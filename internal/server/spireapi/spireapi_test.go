package spireapi_test

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/server/spireapi"
)

// handshake connects without gRPC and returns the authority and the expiry of the
// server's certificate.
func handshake(t *testing.T, r *running) (authority string, notAfter time.Time) {
	t.Helper()
	raw, err := r.lis.DialContext(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	conn := tls.Client(raw, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	defer conn.Close()
	if err := conn.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	leaf := conn.ConnectionState().PeerCertificates[0]
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != serverID.String() {
		t.Errorf("the server is %v", leaf.URIs)
	}
	return hex.EncodeToString(leaf.AuthorityKeyId), leaf.NotAfter
}

// TestCertificateIsReissued: at half of its lifetime and after a rotation, and not
// otherwise.
func TestCertificateIsReissued(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{X509TTL: 10 * time.Hour}, func(t *testing.T, s *running) {
		authority, first := handshake(t, s)
		if authority != s.Keysets().Active().X509AuthorityID || !first.Equal(time.Now().Add(10*time.Hour)) {
			t.Errorf("signed by %s until %v", authority, first)
		}
		time.Sleep(5*time.Hour - 10*time.Second) // it began ten seconds ago
		if _, end := handshake(t, s); !end.Equal(first) {
			t.Error("reissued before half its life")
		}
		time.Sleep(10 * time.Second)
		_, second := handshake(t, s)
		if !second.After(first) {
			t.Error("not reissued at half its life")
		}
		next, err := s.Keysets().Prepare(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, end := handshake(t, s); !end.Equal(second) {
			t.Error("reissued without need")
		}
		if err := s.Keysets().Activate(t.Context(), next.ID); err != nil {
			t.Fatal(err)
		}
		if authority, _ := handshake(t, s); authority != next.X509AuthorityID {
			t.Error("not reissued after activation")
		}
	})
}

// TestServeEndsWithOpenStream: one client leaves a stream open, another never
// finishes its handshake. The bubble fails if a goroutine is left over.
func TestServeEndsWithOpenStream(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		_, c := s.join(t)
		s.apply(t, many(501))
		stream := openSync(t, c, &entryv1.SyncAuthorizedEntriesRequest{})
		receive(t, stream)
		idle, err := s.lis.DialContext(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer idle.Close()
		synctest.Wait()
		begin := time.Now()
		s.stop()
		if took := time.Since(begin); took != 2*time.Second {
			t.Errorf("Serve took %v to end", took)
		}
		_, err = stream.Recv()
		wantCode(t, err, codes.Unavailable)
		if _, err := s.lis.DialContext(t.Context()); err == nil {
			t.Error("the listener is open")
		}
	})
}

// TestServeLetsCallsFinish ends the server while a call is being answered.
func TestServeLetsCallsFinish(t *testing.T) {
	t.Parallel()
	slow := grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		time.Sleep(time.Second)
		return handler(ctx, req)
	})
	bubble(t, spireapi.Config{Options: []grpc.ServerOption{slow}}, func(t *testing.T, s *running) {
		c := s.dial(t, nil)
		done := make(chan error, 1)
		go func() {
			_, err := c.GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
			done <- err
		}()
		synctest.Wait()
		begin := time.Now()
		s.stop()
		if err := <-done; err != nil {
			t.Errorf("a call in flight: %v", err)
		}
		if took := time.Since(begin); took != time.Second {
			t.Errorf("Serve ended after %v", took)
		}
	})
}

// TestServeAgain stops serving and serves the same Server again.
func TestServeAgain(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		caller, c := s.join(t)
		s.stop()
		wantCode(t, c.ping(t.Context()), codes.Unavailable)
		again := serve(t, s.Server)
		if err := again.dial(t, caller).ping(t.Context()); err != nil {
			t.Errorf("after a pause: %v", err)
		}
	})
}

func TestServeReportsAFailedListener(t *testing.T) {
	t.Parallel()
	s := newServer(t, spireapi.Config{})
	broken := errors.New("broken")
	if err := s.Serve(t.Context(), brokenListener{broken}); !errors.Is(err, broken) {
		t.Errorf("Serve: %v", err)
	}
}

type brokenListener struct{ err error }

func (l brokenListener) Accept() (net.Conn, error) { return nil, l.err }
func (l brokenListener) Close() error              { return nil }
func (l brokenListener) Addr() net.Addr            { return &net.TCPAddr{} }

// TestOptionsSeeEveryCall uses an interceptor as a test of an agent would.
func TestOptionsSeeEveryCall(t *testing.T) {
	t.Parallel()
	down := grpc.ChainUnaryInterceptor(func(context.Context, any, *grpc.UnaryServerInfo, grpc.UnaryHandler) (any, error) {
		return nil, status.Error(codes.DataLoss, "broken on purpose")
	})
	bubble(t, spireapi.Config{Options: []grpc.ServerOption{down}}, func(t *testing.T, s *running) {
		_, c := s.join(t)
		wantCode(t, c.ping(t.Context()), codes.DataLoss)
	})
}

// TestConnectionsAreRecycled counts the connections of one busy client.
func TestConnectionsAreRecycled(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name     string
		age      time.Duration
		min, max int
	}{{"by default", 0, 3, 5}, {"never", -1, 1, 1}} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			bubble(t, spireapi.Config{ConnectionAge: tt.age}, func(t *testing.T, s *running) {
				_, c := s.join(t)
				before := s.lis.accepted.Load()
				for range 60 {
					time.Sleep(11 * time.Second)
					if err := c.ping(t.Context()); err != nil {
						t.Fatal(err)
					}
				}
				if n := int(s.lis.accepted.Load() - before); n < tt.min || n > tt.max {
					t.Errorf("%d connections in eleven minutes, want %d to %d", n, tt.min, tt.max)
				}
			})
		})
	}
}

// TestOverTCP uses a real socket, outside of any bubble.
func TestOverTCP(t *testing.T) {
	t.Parallel()
	s := newServer(t, spireapi.Config{})
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, lis) }()
	conn, err := tls.Dial("tcp", lis.Addr().String(), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	if id := conn.ConnectionState().PeerCertificates[0].URIs[0].String(); id != spiffeid.RequireFromPath(td, "/spire/server").String() {
		t.Errorf("the server is %s", id)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Serve: %v", err)
	}
	if _, err := io.Copy(io.Discard, conn); err != nil && !errors.Is(err, net.ErrClosed) {
		t.Logf("connection ended with %v", err)
	}
	_ = conn.Close()
}
