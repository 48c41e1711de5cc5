package admin_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/operator/renewd"
	"github.com/renewd/renewd/internal/operator/runbook"
	"github.com/renewd/renewd/internal/server/admin"
	"github.com/renewd/renewd/internal/socket"
)

// TestStartingServer: a call before the server listens waits for it, also if an earlier server
// left its socket. Permanent errors are returned at once.
func TestStartingServer(t *testing.T) {
	t.Parallel()
	w := newWorldFor(t, nil, nil)
	stale := filepath.Join(t.TempDir(), "stale.sock")
	old, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	check(t, err)
	old.SetUnlinkOnClose(false)
	check(t, old.Close())
	for name, path := range map[string]string{"no socket": filepath.Join(t.TempDir(), "admin.sock"), "stale socket": stale} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			slow, done := make(chan struct{}), make(chan error, 1)
			c, err := renewd.DialStarting(path, time.Hour, func() { close(slow) })
			check(t, err)
			defer c.Close()
			go func() {
				_, err := c.Backend("", "").Status(t.Context())
				done <- err
			}()
			select {
			case <-slow:
			case err := <-done:
				t.Fatalf("before the server listens: %v", err)
			}
			lis, err := socket.Listen(path, 0o600)
			check(t, err)
			serveUnix(t, w, lis)
			check(t, <-done)
		})
	}
	c, err := renewd.DialStarting(filepath.Join(t.TempDir(), strings.Repeat("x", 200)), time.Hour, nil)
	check(t, err)
	defer c.Close()
	if _, err := c.Backend("", "").Prepare(t.Context()); err == nil {
		t.Error("a path that is too long for a socket: no error")
	}
}

// TestSocketPath: the socket's path is not parsed as a URL.
func TestSocketPath(t *testing.T) {
	t.Parallel()
	w := newWorldFor(t, nil, nil)
	path := filepath.Join(t.TempDir(), "a %41?b#c", "s:1.sock")
	lis, err := socket.Listen(path, 0o600)
	check(t, err)
	serveUnix(t, w, lis)
	c, err := renewd.DialSocket(path)
	check(t, err)
	defer c.Close()
	if _, err := c.Backend("", "").Prepare(t.Context()); err != nil {
		t.Error(err)
	}
}

// workloadAPI gives all callers the same SVID.
type workloadAPI struct {
	workloadpb.UnimplementedSpiffeWorkloadAPIServer
	id     spiffeid.ID
	svid   *x509svid.SVID
	bundle []byte
}

func (a *workloadAPI) FetchX509SVID(_ *workloadpb.X509SVIDRequest, s grpc.ServerStreamingServer[workloadpb.X509SVIDResponse]) error {
	switch {
	case a.id.IsZero(): // it has no answer
		<-s.Context().Done()
		return s.Context().Err()
	case a.svid == nil:
		return status.Error(codes.PermissionDenied, "no identity issued")
	}
	key, err := x509.MarshalPKCS8PrivateKey(a.svid.PrivateKey)
	if err != nil {
		return err
	}
	if err := s.Send(&workloadpb.X509SVIDResponse{Svids: []*workloadpb.X509SVID{{
		SpiffeId: a.id.String(), X509Svid: a.svid.Certificates[0].Raw, X509SvidKey: key, Bundle: a.bundle,
	}}}); err != nil {
		return err
	}
	<-s.Context().Done()
	return nil
}

func serveWorkloadAPI(t *testing.T, w *world, id spiffeid.ID, svid *x509svid.SVID) (address string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "api.sock")
	lis, err := net.Listen("unix", path)
	check(t, err)
	gs := grpc.NewServer()
	var bundle []byte
	for _, c := range w.published().Certificates() {
		bundle = append(bundle, c.Raw...)
	}
	workloadpb.RegisterSpiffeWorkloadAPIServer(gs, &workloadAPI{id: id, svid: svid, bundle: bundle})
	done := make(chan error, 1)
	go func() { done <- gs.Serve(lis) }()
	t.Cleanup(func() { gs.Stop(); check(t, <-done) })
	return "unix://" + path
}

// TestDialServer: a remote operator with an SVID from the Workload API.
func TestDialServer(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	listen := func(w *world) string {
		lis, err := net.Listen("tcp", "127.0.0.1:0")
		check(t, err)
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- w.ServeTLS(ctx, lis) }()
		t.Cleanup(func() { cancel(); check(t, <-done) })
		return lis.Addr().String()
	}
	address := listen(w)
	api := serveWorkloadAPI(t, w, boss, w.only().sign(t, boss, time.Hour))
	dial := func(address, api string) *renewd.Client {
		c, err := renewd.DialServer(t.Context(), address, api)
		check(t, err)
		t.Cleanup(func() { check(t, c.Close()) })
		return c
	}
	b := dial(address, api).Backend("example.org", "default")
	k, err := b.Prepare(t.Context())
	check(t, err)
	s, err := b.Status(t.Context())
	check(t, err)
	if len(s.Keysets) != 2 || s.Keysets[1].ID != k.ID {
		t.Errorf("status %+v", s)
	}

	// A workload of the trust domain, and a server with the right ID from another
	// authority.
	for name, w2 := range map[string]*world{"a workload as server": impostor(t, w), "another authority": newWorld(t)} {
		err := dial(listen(w2), api).Backend("", "").Activate(t.Context(), k.ID)
		if err == nil || errors.Is(err, runbook.ErrOutcomeUnknown) || !strings.Contains(err.Error(), "authentication handshake failed") {
			t.Errorf("%s: %v", name, err)
		}
	}

}

// TestNoSVID: the error for an operator without an SVID has the reason, not only the timeout.
func TestNoSVID(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	none := "unix://" + filepath.Join(t.TempDir(), "none.sock")
	for api, want := range map[string]string{
		serveWorkloadAPI(t, w, boss, nil):          "no identity issued",
		serveWorkloadAPI(t, w, spiffeid.ID{}, nil): "deadline exceeded",
		none:         "no such file or directory",
		"/no/scheme": `must have a "tcp" or "unix" scheme`,
	} {
		t.Run(want, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			_, err := renewd.DialServer(ctx, "127.0.0.1:1", api)
			if err == nil || !strings.HasPrefix(err.Error(), "get an SVID from the Workload API at "+api+": ") || !strings.Contains(err.Error(), want) ||
				strings.Count(err.Error(), "deadline exceeded") > 1 {
				t.Errorf("got %v, want %s", err, want)
			}
		})
	}
}

// impostor serves as w, but with the SVID of a workload.
func impostor(t *testing.T, w *world) *world {
	t.Helper()
	svid := w.only().sign(t, workload, time.Hour)
	rules, err := admin.ParseRules(td, []string{boss.String()}, nil)
	check(t, err)
	s, err := admin.New(admin.Config{
		TrustDomain: td, Published: w.published, Rules: rules, Deployments: []admin.Deployment{{Name: "default", Keysets: w.only().keysets}},
		Certificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return &tls.Certificate{Certificate: [][]byte{svid.Certificates[0].Raw}, PrivateKey: svid.PrivateKey}, nil
		},
	})
	check(t, err)
	return &world{Service: s}
}

// TestServerRestarts: a client that polls every few seconds is answered soon after the server
// is back, however long it was unreachable.
func TestServerRestarts(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		var r atomic.Pointer[remote] // nil: no server
		svid := w.only().sign(t, boss, time.Hour)
		creds := credentials.NewTLS(tlsconfig.MTLSClientConfig(svid, w, tlsconfig.AuthorizeID(serverID)))
		conn, err := grpc.NewClient("passthrough:///server", renewd.DialOptions(creds,
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
				if r := r.Load(); r != nil {
					return r.lis.DialContext(ctx)
				}
				return nil, syscall.ECONNREFUSED
			}))...)
		check(t, err)
		defer conn.Close()
		b := renewd.NewClient(conn).Backend("", "")
		for range 300 {
			if _, err := b.Status(t.Context()); err == nil {
				t.Fatal("an answer without a server")
			}
			time.Sleep(runbook.DefaultInterval)
		}
		r.Store(w.serveTLS(t))
		back := time.Now()
		for {
			if _, err := b.Status(t.Context()); err == nil {
				break
			}
			time.Sleep(runbook.DefaultInterval)
		}
		if late := time.Since(back); late > 2*runbook.DefaultInterval {
			t.Errorf("seen %v after the server came back", late)
		}
	})
}
