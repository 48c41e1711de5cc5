package figures

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/test/memory"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// world is the embedded server on a local TCP port, and a folder.
type world struct {
	b       *testing.B
	dir     string
	server  *spireapi.Server
	address string
	stop    func() // ends Serve
	kubelet int    // read-only port; 0: no kubelet

	frozen  freezer
	refuse  atomic.Bool   // the server signs nothing
	bundles chan struct{} // wakes at each GetBundle answered while refusing

	mu       sync.Mutex
	minted   []time.Time // X.509-SVIDs of workloads
	freezeAt int         // freeze after this many; 0: never
}

func newWorld(b *testing.B, entries []spireapi.Entry) *world {
	b.Helper()
	// Not b.TempDir: its path can be too long for a Unix socket.
	dir, err := os.MkdirTemp("", "figures")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil { // callers are other users
		b.Fatal(err)
	}
	w := &world{b: b, dir: dir, address: "127.0.0.1:0", bundles: make(chan struct{}, 1)}
	keys, err := keyset.Open(b.Context(), keyset.Config{TrustDomain: td, Storage: new(memory.Keysets)})
	if err != nil {
		b.Fatal(err)
	}
	rows, err := ledger.Open(b.Context(), ledger.Config{Storage: memory.Ledger{}})
	if err != nil {
		b.Fatal(err)
	}
	w.server, err = spireapi.New(spireapi.Config{
		TrustDomain: td, Keysets: keys, Storage: memory.NewServer(), Ledger: rows, Observer: w, Options: []grpc.ServerOption{grpc.ChainUnaryInterceptor(w.intercept)},
	})
	if err != nil {
		b.Fatal(err)
	}
	w.set(entries)
	w.serve()
	b.Cleanup(func() { w.stop() })
	return w
}

func (w *world) set(entries []spireapi.Entry) {
	w.b.Helper()
	if _, err := w.server.ApplyEntries(context.Background(), entries, false); err != nil {
		w.b.Fatal(err)
	}
}

// serve starts the server, on the same port as before.
func (w *world) serve() {
	w.b.Helper()
	lis, err := net.Listen("tcp", w.address)
	if err != nil {
		w.b.Fatal(err)
	}
	w.address = lis.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.server.Serve(ctx, &freezingListener{lis, &w.frozen}) }()
	w.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				w.b.Error(err)
			}
		case <-time.After(clientTimeout):
			w.b.Errorf("stop the server: it still serves after %v", clientTimeout)
		}
	})
}

// entries returns n entries for the users that uid names.
func entries(n int, uid func(i int) int) []spireapi.Entry {
	out := make([]spireapi.Entry, n)
	for i := range out {
		out[i] = spireapi.Entry{
			ID:        fmt.Sprintf("entry-%05d", i),
			SPIFFEID:  spiffeid.RequireFromPath(td, fmt.Sprintf("/ns/prod/sa/service-%05d", i)),
			Selectors: []spireapi.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", uid(i))}},
		}
	}
	return out
}

// firstForThisUser assigns the first entry to this user, and the others to users that do not exist.
func firstForThisUser(i int) int {
	if i == 0 {
		return os.Getuid()
	}
	return 1_000_000 + i
}

func allForThisUser(int) int { return os.Getuid() }

// Minted implements spireapi.Observer.
func (w *world) Minted(kind string, code codes.Code, _ time.Duration) {
	if kind == "x509" && code == codes.OK {
		w.mu.Lock()
		w.minted = append(w.minted, time.Now())
		if len(w.minted) == w.freezeAt {
			w.frozen.freeze()
		}
		w.mu.Unlock()
	}
	w.frozen.wait()
}

// Limited implements spireapi.Observer.
func (w *world) Limited(string) {}

func (w *world) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	refusing := w.refuse.Load()
	if refusing && (strings.HasSuffix(info.FullMethod, "/BatchNewX509SVID") || strings.HasSuffix(info.FullMethod, "/RenewAgent")) {
		return nil, status.Error(codes.Unavailable, "shutting down")
	}
	resp, err := handler(ctx, req)
	if refusing && strings.HasSuffix(info.FullMethod, "/GetBundle") {
		select {
		case w.bundles <- struct{}{}:
		default:
		}
	}
	return resp, err
}

// resetMints resets the count of mints and sets the one at which the server freezes.
func (w *world) resetMints(freezeAt int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.minted, w.freezeAt = nil, freezeAt
}

func (w *world) mints() []time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.minted[:len(w.minted):len(w.minted)]
}

// waitMints waits until n X.509-SVIDs were signed since resetMints.
func (w *world) waitMints(n int, limit time.Duration) {
	w.b.Helper()
	for deadline := time.Now().Add(limit); len(w.mints()) < n; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			w.b.Fatalf("%d of %d X.509-SVIDs signed within %v", len(w.mints()), n, limit)
		}
	}
}

// taint rotates: a new keyset signs, and the old one is tainted.
func (w *world) taint() {
	w.b.Helper()
	ctx, keys := context.Background(), w.server.Keysets()
	old := keys.Active()
	next, err := keys.Prepare(ctx)
	if err == nil {
		err = keys.Activate(ctx, next.ID)
	}
	if err == nil {
		err = keys.Taint(ctx, old.ID)
	}
	if err != nil {
		w.b.Fatal(err)
	}
}

// mostPerSecond returns the largest number of times within one second.
func mostPerSecond(times []time.Time) int {
	out, from := 0, 0
	for i, t := range times {
		for t.Sub(times[from]) >= time.Second {
			from++
		}
		out = max(out, i-from+1)
	}
	return out
}

// freezer stops a server like SIGSTOP: the kernel accepts connections and data, but the
// server neither reads nor answers.
type freezer struct {
	mu     sync.Mutex
	thawed chan struct{} // nil: not frozen
}

func (f *freezer) freeze() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.thawed == nil {
		f.thawed = make(chan struct{})
	}
}

func (f *freezer) thaw() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.thawed != nil {
		close(f.thawed)
		f.thawed = nil
	}
}

func (f *freezer) wait() {
	f.mu.Lock()
	thawed := f.thawed
	f.mu.Unlock()
	if thawed != nil {
		<-thawed
	}
}

type freezingListener struct {
	net.Listener
	f *freezer
}

func (l *freezingListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &freezingConn{conn, l.f}, nil
}

type freezingConn struct {
	net.Conn
	f *freezer
}

func (c *freezingConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.f.wait()
	return n, err
}

func (c *freezingConn) Write(p []byte) (int, error) {
	c.f.wait()
	return c.Conn.Write(p)
}

// file writes a file in the world's folder and returns its path.
func (w *world) file(name string, content []byte) string {
	w.b.Helper()
	path := filepath.Join(w.dir, name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		w.b.Fatal(err)
	}
	return path
}
