package workload

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/attest"
	"github.com/renewd/renewd/internal/agent/attest/unix"
	"github.com/renewd/renewd/internal/socket"
)

// These tests use real sockets and real time: a bubble cannot wait for the
// kernel.

// serveSocket serves on a real socket with the real attestor. The entry e1
// matches the test process.
func serveSocket(t testing.TB, change func(*Config)) (s *system, path string, e *cache.Entry) {
	t.Helper()
	s = &system{t: t, ca: newAuthority(t, td, "a"), cache: cache.New(cache.Config{}), logs: &logs{}, obs: &counts{open: map[string]int{}, attested: map[string]int{}}}
	s.cache.SetBundle(&bundle.Snapshot{Own: bundleOf(t, td, 1, s.ca)})
	e = entry("e1", "/one", uint32(os.Geteuid()))
	s.add(e)
	m := &minter{}
	m.set(s.mintFor("/one"))
	cfg := Config{Cache: s.cache, Attestors: []attest.Attestor{unix.New(unix.Config{})}, JWT: m, Log: slog.New(s.logs), Observer: s.obs}
	if change != nil {
		change(&cfg)
	}
	srv, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(t.TempDir(), "run", "api.sock")
	lis, err := socket.Listen(path, 0o777)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() { s.err = srv.Serve(ctx, lis) })
	done.Go(func() { lis.Watch(ctx, slog.New(s.logs)) })
	s.stop = func() { cancel(); done.Wait() }
	t.Cleanup(s.stop)
	return s, path, e
}

// updates is a go-spiffe watcher that passes on its updates.
type updates struct {
	contexts chan *workloadapi.X509Context
	errs     chan error
}

func (u *updates) OnX509ContextUpdate(c *workloadapi.X509Context) { u.contexts <- c }
func (u *updates) OnX509ContextWatchError(err error)              { u.errs <- err }

func TestWithGoSPIFFE(t *testing.T) {
	t.Parallel()
	s, path, e := serveSocket(t, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	addr := workloadapi.WithClientOptions(workloadapi.WithAddr("unix://" + path))

	source, err := workloadapi.NewX509Source(ctx, addr)
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	svid, err := source.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := x509svid.Verify(svid.Certificates, source); err != nil || svid.ID != e.SPIFFEID {
		t.Errorf("%s: %v", svid.ID, err)
	}
	updated := source.Updated()
	renewed := s.put(e)
	select {
	case <-updated:
	case <-ctx.Done():
		t.Fatal("the renewal did not arrive")
	}
	if svid, err = source.GetX509SVID(); err != nil || string(svid.Certificates[0].Raw) != string(renewed.Leaf) {
		t.Errorf("the renewal is not what arrived: %v", err)
	}

	jwts, err := workloadapi.NewJWTSource(ctx, addr)
	if err != nil {
		t.Fatal(err)
	}
	defer jwts.Close()
	token, err := jwts.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "a", ExtraAudiences: []string{"b"}})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := jwtsvid.ParseAndValidate(token.Marshal(), jwts, []string{"b"}); err != nil || got.ID != e.SPIFFEID {
		t.Errorf("FetchJWTSVID: %v, %v", got, err)
	}
	if got, err := workloadapi.ValidateJWTSVID(ctx, token.Marshal(), "a", workloadapi.WithAddr("unix://"+path)); err != nil || got.ID != e.SPIFFEID {
		t.Errorf("ValidateJWTSVID: %v, %v", got, err)
	}
	bundles, err := workloadapi.FetchX509Bundles(ctx, workloadapi.WithAddr("unix://"+path))
	if err != nil || bundles.Len() != 1 {
		t.Errorf("FetchX509Bundles: %v, %v", bundles, err)
	}
}

// A client keeps its SVID over a restart of the agent and reconnects.
func TestWithGoSPIFFEOverRestart(t *testing.T) {
	t.Parallel()
	s, path, e := serveSocket(t, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	u := &updates{contexts: make(chan *workloadapi.X509Context, 10), errs: make(chan error, 100)}
	client, err := workloadapi.New(ctx, workloadapi.WithAddr("unix://"+path))
	if err != nil {
		t.Fatal(err)
	}
	var watch sync.WaitGroup
	watchCtx, stopWatch := context.WithCancel(ctx)
	watch.Go(func() { client.WatchX509Context(watchCtx, u) })
	defer func() { stopWatch(); watch.Wait(); client.Close() }()
	<-u.contexts
	s.stop()
	if s.err != nil {
		t.Errorf("Serve: %v", s.err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket file is still there: %v", err)
	}
	if err := <-u.errs; !strings.Contains(err.Error(), "Unavailable") {
		t.Errorf("the stream ended with %v, want Unavailable", err)
	}
	lis, err := socket.Listen(path, 0o777)
	if err != nil {
		t.Fatal(err)
	}
	srv, err := New(Config{Cache: s.cache, Attestors: []attest.Attestor{unix.New(unix.Config{})}})
	if err != nil {
		t.Fatal(err)
	}
	again, stop := context.WithCancel(ctx)
	var done sync.WaitGroup
	done.Go(func() { srv.Serve(again, lis) })
	defer func() { stop(); done.Wait() }()
	select {
	case c := <-u.contexts:
		if c.DefaultSVID().ID != e.SPIFFEID {
			t.Errorf("got %s", c.DefaultSVID().ID)
		}
	case <-ctx.Done():
		t.Fatal("the client did not reconnect")
	}
}

// If the socket file is removed, open streams continue, and new callers are served
// within seconds.
func TestSocketFileRemovedUnderStreams(t *testing.T) {
	t.Parallel()
	s, path, e := serveSocket(t, nil)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	addr := workloadapi.WithAddr("unix://" + path)
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(addr))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	if err := os.RemoveAll(filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	for _, err := workloadapi.FetchX509SVID(ctx, addr); err != nil; _, err = workloadapi.FetchX509SVID(ctx, addr) {
		if ctx.Err() != nil {
			t.Fatalf("a new caller: %v", err)
		}
	}
	updated := source.Updated()
	renewed := s.put(e)
	select {
	case <-updated:
	case <-ctx.Done():
		t.Fatal("the renewal did not arrive on the stream that was open")
	}
	if svid, err := source.GetX509SVID(); err != nil || string(svid.Certificates[0].Raw) != string(renewed.Leaf) {
		t.Errorf("the renewal is not what arrived: %v", err)
	}
	if n := len(s.logs.attrs("socket file recreated")); n != 1 {
		t.Errorf("logged %d times, want once", n)
	}
}

func TestConnectionsAreReleased(t *testing.T) {
	t.Parallel()
	peers := make(chan *attest.Peer, 10_000)
	s, path, _ := serveSocket(t, func(c *Config) {
		c.MaxPerUser = 2
		c.Peers = func(conn net.Conn) (*attest.Peer, error) {
			p, err := peerOfUnixConn(conn)
			if err == nil {
				peers <- p
			}
			return p, err
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	for i := range 20 {
		for {
			_, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr("unix://"+path))
			if err == nil {
				break
			}
			if ctx.Err() != nil { // the one before may take a moment to be released
				t.Fatalf("connection %d: %v", i, err)
			}
		}
	}
	s.stop()
	close(peers)
	for p := range peers {
		if err := p.Alive(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("a process is still held: %v", err)
		}
	}
}

func TestListen(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "a", "b", "api.sock")
	lis, err := socket.Listen(path, 0o777)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o777 {
		t.Errorf("mode of the socket: %v, %v", info.Mode(), err)
	}
	if info, err := os.Stat(filepath.Dir(path)); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("mode of its folder: %v, %v", info.Mode(), err)
	}
	refused := func(path, want string) {
		t.Helper()
		lis, err := socket.Listen(path, 0o777)
		if err == nil {
			lis.Close()
		}
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("got %v, want an error with the path and %q", err, want)
		}
	}
	refused(path, "another process listens on it")
	if _, err := net.Dial("unix", path); err != nil {
		t.Errorf("the live socket was damaged: %v", err)
	}

	// The socket file of a killed process.
	lis.Close()
	killed, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	killed.SetUnlinkOnClose(false)
	killed.Close()
	if lis, err = socket.Listen(path, 0o770); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o770 {
		t.Errorf("mode of the socket: %v, %v", info.Mode(), err)
	}
	lis.Close()
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after Close: %v", err)
	}

	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	refused(file, "not a socket")
	link := filepath.Join(dir, "link")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	refused(link, "not a socket")
	if data, _ := os.ReadFile(file); string(data) != "precious" {
		t.Error("the file was damaged")
	}
	refused(filepath.Join(dir, strings.Repeat("x", 108)), "choose a shorter one")
	refused(filepath.Join(file, "sub", "s"), "create its folder")
}

func TestNewRejects(t *testing.T) {
	t.Parallel()
	c := cache.New(cache.Config{})
	for want, cfg := range map[string]Config{
		"no cache":    {Attestors: []attest.Attestor{byUID{}}},
		"no workload": {Cache: c},
	} {
		if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

func TestServeFailsWithItsListener(t *testing.T) {
	t.Parallel()
	srv, err := New(Config{Cache: cache.New(cache.Config{}), Attestors: []attest.Attestor{byUID{}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := srv.Serve(t.Context(), brokenListener{newListener()}); err == nil || !strings.Contains(err.Error(), "no more files") {
		t.Errorf("got %v", err)
	}
}

type brokenListener struct{ *listener }

func (brokenListener) Accept() (net.Conn, error) { return nil, fmt.Errorf("no more files") }
