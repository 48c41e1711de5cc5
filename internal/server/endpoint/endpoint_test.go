package endpoint_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/federation"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/server/endpoint"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/test/memory"
)

var (
	td       = spiffeid.RequireTrustDomainFromString("example.org")
	serverID = spiffeid.RequireFromString("spiffe://example.org/spire/server")
)

// domain is a deployment whose bundle is published.
type domain struct {
	*keyset.Deployment
	t *testing.T
}

func newDomain(t *testing.T) *domain {
	d, err := keyset.Open(t.Context(), keyset.Config{TrustDomain: td, Storage: new(memory.Keysets)})
	if err != nil {
		t.Fatal(err)
	}
	return &domain{d, t}
}

// svid issues the server's certificate with the active keyset.
func (d *domain) svid(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	key := newKey(d.t)
	svid, err := d.SignX509(serverID, key.Public(), time.Hour)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{svid.DER}, PrivateKey: key}, nil
}

func (d *domain) must(err error) {
	d.t.Helper()
	if err != nil {
		d.t.Fatal(err)
	}
}

// serve starts the endpoint on a free port, and checks at the end of the test
// that it stops. It returns its URL without a path.
func serve(t *testing.T, c endpoint.Config) string {
	t.Helper()
	c.TrustDomain = td
	s, err := endpoint.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return serveServer(t, s)
}

func serveServer(t *testing.T, s *endpoint.Server) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if _, err := net.Dial("tcp", l.Addr().String()); err == nil {
			t.Error("the port is still open after Serve returned")
		}
	})
	return "https://" + l.Addr().String()
}

// TestFollowRotation: a relying party with an initial bundle follows a rotation.
func TestFollowRotation(t *testing.T) {
	t.Parallel()
	d := newDomain(t)
	url := serve(t, endpoint.Config{Bundle: d.Bundle, Certificate: d.svid, RefreshHint: 5 * time.Minute})
	old := d.Active()
	trusted := x509bundle.FromX509Authorities(td, d.Bundle().Certificates())

	ctx, cancel := context.WithCancel(t.Context())
	party := &watcher{updates: make(chan *spiffebundle.Bundle), stop: ctx.Done(), trusted: trusted}
	done := make(chan error, 1)
	go func() {
		done <- federation.WatchBundle(ctx, td, url+"/bundle", party, federation.WithSPIFFEAuth(trusted, serverID))
	}()
	defer func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("WatchBundle: %v", err)
		}
	}()
	expect := func(step string, x509 int) {
		t.Helper()
		var got *spiffebundle.Bundle
		select {
		case got = <-party.updates:
		case <-time.After(2 * time.Minute):
			t.Fatalf("%s: no update", step)
		}
		if hint, ok := got.RefreshHint(); !ok || hint != 5*time.Minute {
			t.Errorf("%s: refresh hint %v", step, hint)
		}
		if n, _ := got.SequenceNumber(); n != d.Bundle().Sequence {
			t.Errorf("%s: sequence %d, want %d", step, n, d.Bundle().Sequence)
		}
		if len(got.X509Authorities()) != x509 || len(got.JWTAuthorities()) != x509 {
			t.Errorf("%s: %d X.509 and %d JWT authorities, want %d", step, len(got.X509Authorities()), len(got.JWTAuthorities()), x509)
		}
	}
	expect("at first", 1)
	next, err := d.Prepare(t.Context())
	d.must(err)
	expect("prepared", 2)
	// From here on the endpoint's certificate is of the new keyset.
	d.must(d.Activate(t.Context(), next.ID))
	d.must(d.Taint(t.Context(), old.ID))
	expect("tainted", 2)
	d.must(d.Remove(t.Context(), old.ID))
	expect("removed", 1)
	if ids := d.Bundle().X509; ids[0].ID != next.X509AuthorityID {
		t.Errorf("authority %s is left", ids[0].ID)
	}
}

// watcher trusts the bundle that it got last, like a relying party.
type watcher struct {
	updates chan *spiffebundle.Bundle
	stop    <-chan struct{}
	trusted *x509bundle.Bundle
}

func (w *watcher) NextRefresh(time.Duration) time.Duration { return time.Millisecond }
func (w *watcher) OnError(error)                           {} // the watch continues, without an update
func (w *watcher) OnUpdate(b *spiffebundle.Bundle) {
	w.trusted.SetX509Authorities(b.X509Authorities())
	select {
	case w.updates <- b:
	case <-w.stop:
	}
}

// TestSPIFFEAuth: a client that expects another identity fails in the TLS handshake.
func TestSPIFFEAuth(t *testing.T) {
	t.Parallel()
	d := newDomain(t)
	url := serve(t, endpoint.Config{Bundle: d.Bundle, Certificate: d.svid})
	for _, tt := range []struct {
		name   string
		bundle *x509bundle.Bundle
		id     spiffeid.ID
		fails  bool
	}{
		{"right", x509bundle.FromX509Authorities(td, d.Bundle().Certificates()), serverID, false},
		{"another ID", x509bundle.FromX509Authorities(td, d.Bundle().Certificates()), spiffeid.RequireFromString("spiffe://example.org/other"), true},
		{"another authority", x509bundle.FromX509Authorities(td, newDomain(t).Bundle().Certificates()), serverID, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b, err := federation.FetchBundle(t.Context(), td, url, federation.WithSPIFFEAuth(tt.bundle, tt.id))
			if (err != nil) != tt.fails {
				t.Fatalf("error %v", err)
			}
			if _, hint := func() (time.Duration, bool) {
				if b == nil {
					return 0, false
				}
				return b.RefreshHint()
			}(); hint {
				t.Error("a refresh hint that is not configured")
			}
		})
	}
}

// TestWebProfile: a replaced certificate is used without a restart, unless it cannot be
// loaded.
func TestWebProfile(t *testing.T) {
	t.Parallel()
	d := newDomain(t)
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	first := newWebCert(t, 1)
	first.write(t, certFile, keyFile)
	var log lockedBuffer
	url := serve(t, endpoint.Config{
		Bundle: d.Bundle, CertFile: certFile, KeyFile: keyFile, Log: slog.New(slog.NewTextHandler(&log, nil)),
	})
	fetch := func(roots ...*webCert) error {
		pool := x509.NewCertPool()
		for _, c := range roots {
			pool.AddCert(c.cert)
		}
		b, err := federation.FetchBundle(t.Context(), td, url, federation.WithWebPKIRoots(pool))
		if err == nil && len(b.X509Authorities()) != 1 {
			t.Errorf("bundle %v", b)
		}
		return err
	}
	if err := fetch(first); err != nil {
		t.Fatal(err)
	}

	second := newWebCert(t, 2)
	second.writeCert(t, certFile) // and not yet its key
	for range 2 {
		if err := fetch(first); err != nil {
			t.Errorf("between the two files: %v", err)
		}
	}
	if n := strings.Count(log.String(), "not reloaded"); n != 1 {
		t.Errorf("logged %d times that the new certificate cannot be used:\n%s", n, log.String())
	}
	second.writeKey(t, keyFile)
	if err := fetch(second); err != nil {
		t.Errorf("after the change: %v", err)
	}
	if fetch(first) == nil {
		t.Error("the old certificate is still in use")
	}
	if err := os.Remove(certFile); err != nil {
		t.Fatal(err)
	}
	if err := fetch(second); err != nil {
		t.Errorf("with the file gone: %v", err)
	}
}

// TestReload: other certificate files and another refresh hint apply to further answers.
// Files that cannot be used change nothing.
func TestReload(t *testing.T) {
	t.Parallel()
	d, dir := newDomain(t), t.TempDir()
	first, second := newWebCert(t, 1), newWebCert(t, 2)
	first.write(t, dir+"/1.crt", dir+"/1.key")
	second.write(t, dir+"/2.crt", dir+"/2.key")
	s, err := endpoint.New(endpoint.Config{TrustDomain: td, Bundle: d.Bundle, CertFile: dir + "/1.crt", KeyFile: dir + "/1.key", RefreshHint: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	url := serveServer(t, s)
	check := func(step string, c *webCert, maxAge, hint string) {
		t.Helper()
		pool := x509.NewCertPool()
		pool.AddCert(c.cert)
		transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}
		defer transport.CloseIdleConnections()
		r := do(t, &http.Client{Transport: transport}, "GET", url, "")
		if got := r.header.Get("Cache-Control"); got != maxAge || !strings.Contains(string(r.body), hint) {
			t.Errorf("%s: Cache-Control %q, body %s", step, got, r.body)
		}
	}
	check("start", first, "public, max-age=60", `"spiffe_refresh_hint":60`)
	if _, err := s.Reload(dir+"/2.crt", dir+"/1.key", time.Hour); err == nil || !strings.HasPrefix(err.Error(), "certificate files: ") {
		t.Errorf("a key of another certificate: %v", err)
	}
	apply, err := s.Reload(dir+"/2.crt", dir+"/2.key", 2*time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	check("before it applies", first, "public, max-age=60", `"spiffe_refresh_hint":60`)
	apply()
	check("reloaded", second, "public, max-age=120", `"spiffe_refresh_hint":120`)
}

// TestHTTP: methods, paths and caching headers.
func TestHTTP(t *testing.T) {
	t.Parallel()
	d := newDomain(t)
	url := serve(t, endpoint.Config{Bundle: d.Bundle, Certificate: d.svid, RefreshHint: 90 * time.Second})
	client := insecureClient(t)
	for _, tt := range []struct {
		method, path string
		code         int
		contentType  string
	}{
		{"GET", "/", 200, "application/json"},
		{"GET", "/bundle", 200, "application/json"},
		{"GET", "/keys", 200, "application/jwk-set+json"},
		{"HEAD", "/bundle", 200, "application/json"},
		{"POST", "/bundle", 405, ""},
		{"PUT", "/keys", 405, ""},
		{"GET", "/other", 404, ""},
		{"GET", "/bundle/../etc", 404, ""},
	} {
		resp := do(t, client, tt.method, url+tt.path, "")
		if resp.code != tt.code {
			t.Errorf("%s %s: %d, want %d", tt.method, tt.path, resp.code, tt.code)
		}
		if tt.code != 200 {
			continue
		}
		if got := resp.header.Get("Content-Type"); got != tt.contentType {
			t.Errorf("%s %s: type %q", tt.method, tt.path, got)
		}
		if got := resp.header.Get("Cache-Control"); got != "public, max-age=90" {
			t.Errorf("%s %s: caching %q", tt.method, tt.path, got)
		}
		if (tt.method == "HEAD") != (len(resp.body) == 0) {
			t.Errorf("%s %s: %d bytes", tt.method, tt.path, len(resp.body))
		}
	}

	first := do(t, client, "GET", url+"/", "")
	tag := first.header.Get("ETag")
	if tag == "" {
		t.Fatal("no ETag")
	}
	if resp := do(t, client, "GET", url+"/bundle", tag); resp.code != http.StatusNotModified || len(resp.body) != 0 {
		t.Errorf("with the ETag of the present bundle: %d", resp.code)
	}
	_, err := d.Prepare(t.Context())
	d.must(err)
	if resp := do(t, client, "GET", url+"/bundle", tag); resp.code != http.StatusOK || resp.header.Get("ETag") == tag {
		t.Errorf("with the ETag of the previous bundle: %d %s", resp.code, resp.header.Get("ETag"))
	}
}

// TestKeys: a library without SPIFFE support verifies a JWT-SVID with the JWK set, and
// neither document contains private keys.
func TestKeys(t *testing.T) {
	t.Parallel()
	d := newDomain(t)
	_, err := d.Prepare(t.Context())
	d.must(err)
	url := serve(t, endpoint.Config{Bundle: d.Bundle, Certificate: d.svid})
	client := insecureClient(t)
	resp := do(t, client, "GET", url+"/keys", "")
	if got := resp.header.Get("Cache-Control"); got != "no-cache" {
		t.Errorf("caching %q without a refresh hint", got)
	}
	var keys jose.JSONWebKeySet
	d.must(json.Unmarshal(resp.body, &keys))
	svid, err := d.SignJWT(spiffeid.RequireFromPath(td, "/web"), []string{"db"}, time.Hour)
	d.must(err)
	token, err := jwt.ParseSigned(svid.Token, []jose.SignatureAlgorithm{jose.ES256})
	d.must(err)
	var claims jwt.Claims
	if err := token.Claims(keys, &claims); err != nil || claims.Subject != "spiffe://example.org/web" {
		t.Errorf("claims %+v: %v", claims, err)
	}
	for _, path := range []string{"/keys", "/bundle"} {
		body := do(t, client, "GET", url+path, "").body
		var doc struct{ Keys []map[string]any }
		d.must(json.Unmarshal(body, &doc))
		if want := map[string]int{"/keys": 2, "/bundle": 4}[path]; len(doc.Keys) != want {
			t.Errorf("%s holds %d keys, want %d", path, len(doc.Keys), want)
		}
		for _, k := range doc.Keys {
			if k["d"] != nil || k["kty"] != "EC" {
				t.Errorf("%s: key %v", path, k)
			}
			if path == "/keys" && (k["alg"] != "ES256" || k["use"] != "sig" || k["x5c"] != nil) {
				t.Errorf("key %v", k)
			}
		}
	}
}

// TestNothingPrivate: a private key in a bundle is not published.
func TestNothingPrivate(t *testing.T) {
	t.Parallel()
	d := newDomain(t)
	bundle := *d.Bundle()
	bundle.JWT = []keyset.JWTAuthority{{KeyID: "k", PublicKey: newKey(t)}}
	var log lockedBuffer
	url := serve(t, endpoint.Config{Bundle: func() *keyset.Bundle { return &bundle }, Certificate: d.svid, Log: slog.New(slog.NewTextHandler(&log, nil))})
	for _, path := range []string{"/", "/keys"} {
		if resp := do(t, insecureClient(t), "GET", url+path, ""); resp.code != http.StatusInternalServerError || strings.Contains(string(resp.body), `"d"`) {
			t.Errorf("%s: %d %s", path, resp.code, resp.body)
		}
	}
	if !strings.Contains(log.String(), "JWT key k is not a public key") {
		t.Errorf("log %s", log.String())
	}
}

// TestRenderedOnce: each bundle is rendered once.
func TestRenderedOnce(t *testing.T) {
	t.Parallel()
	d := newDomain(t)
	for range 2 { // three keys, whose order in a map is random
		_, err := d.Prepare(t.Context())
		d.must(err)
	}
	url := serve(t, endpoint.Config{Bundle: d.Bundle, Certificate: d.svid})
	tags := map[string]bool{}
	for range 20 {
		resp := do(t, insecureClient(t), "HEAD", url, "")
		tags[resp.header.Get("ETag")] = true
	}
	if len(tags) != 1 {
		t.Errorf("%d different answers for one bundle", len(tags))
	}
}

// TestMissingFiles: missing certificate files fail the start.
func TestMissingFiles(t *testing.T) {
	t.Parallel()
	missing := filepath.Join(t.TempDir(), "none.pem")
	_, err := endpoint.New(endpoint.Config{TrustDomain: td, Bundle: newDomain(t).Bundle, CertFile: missing, KeyFile: missing})
	if err == nil || !strings.Contains(err.Error(), missing) {
		t.Errorf("error %v, want %q", err, missing)
	}
}

// TestManyConnections: thousands of silent connections do not delay a relying party. One
// address can have 128 connections.
func TestManyConnections(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := newDomain(t)
		s, err := endpoint.New(endpoint.Config{TrustDomain: td, Bundle: d.Bundle, Certificate: d.svid})
		d.must(err)
		c := newCrowd(5000)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.Serve(ctx, c) }()
		get := func() error {
			client := &http.Client{Transport: &http.Transport{
				TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
				DialContext:     c.Dial,
			}}
			t.Cleanup(client.CloseIdleConnections)
			resp, err := client.Get("https://endpoint/bundle")
			if err == nil {
				_, err = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			}
			return err
		}
		begin := time.Now()
		for range 128 { // each on its own connection, which stays open
			d.must(get())
		}
		if took := time.Since(begin); took != 0 {
			t.Errorf("relying parties waited for %v", took)
		}
		if err := get(); err == nil {
			t.Error("one address has 129 connections")
		}
		time.Sleep(time.Minute) // idle connections are closed
		d.must(get())
		cancel()
		d.must(<-done)
	})
}

// crowd is a listener that accepts size silent connections and then those of Dial, all
// from one address.
type crowd struct {
	from  net.Addr
	size  int
	conns chan net.Conn
	end   chan struct{}
	close func()
}

func newCrowd(size int) *crowd {
	c := &crowd{from: &net.TCPAddr{IP: net.IPv4(10, 0, 0, 1)}, size: size, conns: make(chan net.Conn), end: make(chan struct{})}
	c.close = sync.OnceFunc(func() { close(c.end) })
	return c
}

func (c *crowd) Accept() (net.Conn, error) {
	if c.size > 0 {
		c.size--
		conn, _ := net.Pipe()
		return connFrom{conn, c.from}, nil
	}
	select {
	case conn := <-c.conns:
		return connFrom{conn, c.from}, nil
	case <-c.end:
		return nil, net.ErrClosed
	}
}

func (c *crowd) Dial(context.Context, string, string) (net.Conn, error) {
	near, far := net.Pipe()
	c.conns <- far
	return near, nil
}

func (c *crowd) Close() error   { c.close(); return nil }
func (c *crowd) Addr() net.Addr { return c.from }

type connFrom struct {
	net.Conn
	from net.Addr
}

func (c connFrom) RemoteAddr() net.Addr { return c.from }

// TestStopsWithIdleConnection: an idle connection does not keep the server from stopping;
// serve checks that.
func TestStopsWithIdleConnection(t *testing.T) {
	t.Parallel()
	d := newDomain(t)
	url := serve(t, endpoint.Config{Bundle: d.Bundle, Certificate: d.svid})
	conn, err := tls.Dial("tcp", strings.TrimPrefix(url, "https://"), &tls.Config{InsecureSkipVerify: true})
	d.must(err)
	t.Cleanup(func() { _ = conn.Close() })
	if conn.ConnectionState().Version < tls.VersionTLS12 {
		t.Error("an old TLS version")
	}
}
