package bootstrap_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/agent/bootstrap"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

const maxBytes = 8 << 20

func newRoot(t testing.TB, n int64) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(n), NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// documents returns a bundle of two roots as PEM and, with a JWT key, in SPIFFE's format.
func documents(t testing.TB) (pems, spiffe []byte) {
	t.Helper()
	sb := spiffebundle.New(td)
	for n := range int64(2) {
		root := newRoot(t, n+1)
		pems = slices.Concat(pems, []byte("# a comment\n"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Raw}))
		sb.AddX509Authority(root)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if err := sb.AddJWTAuthority("k", key.Public()); err != nil {
		t.Fatal(err)
	}
	if spiffe, err = sb.Marshal(); err != nil {
		t.Fatal(err)
	}
	return pems, spiffe
}

// unusable are contents that are no bundle, with what the error says.
func unusable() map[string]struct{ content, want string } {
	return map[string]struct{ content, want string }{
		"empty":        {"", "is empty: write it again"},
		"blank":        {"\n", "is not a trust bundle"},
		"text":         {"hello", "is not a trust bundle"},
		"empty JSON":   {"{}", "is not a trust bundle"},
		"no authority": {`{"keys":[]}`, "is not a trust bundle"},
		"bad DER":      {string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")})), "is not a trust bundle"},
		"private key":  {string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")})), "is not a trust bundle"},
		"large":        {strings.Repeat(" ", maxBytes+1), "is larger than"},
	}
}

func TestFile(t *testing.T) {
	t.Parallel()
	pems, spiffe := documents(t)
	load := func(content string) (string, error) {
		path := filepath.Join(t.TempDir(), "bundle")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		b, err := bootstrap.File{Path: path, TrustDomain: td}.Fetch(t.Context(), bootstrap.Request{})
		if err != nil {
			if !strings.HasPrefix(err.Error(), path) {
				t.Errorf("the error does not name the file: %v", err)
			}
			return "", err
		}
		return fmt.Sprint(len(b.X509()), len(b.JWT())), nil
	}
	if got, err := load(string(pems)); got != "2 0" || err != nil {
		t.Errorf("PEM: %s, %v", got, err)
	}
	if got, err := load(" \n" + string(spiffe)); got != "2 1" || err != nil {
		t.Errorf("SPIFFE's format: %s, %v", got, err)
	}
	for name, tt := range unusable() {
		if _, err := load(tt.content); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	missing := bootstrap.File{Path: filepath.Join(t.TempDir(), "none"), TrustDomain: td}
	if _, err := missing.Fetch(t.Context(), bootstrap.Request{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

// publisher serves over https and has its CA in a file.
func publisher(t *testing.T, handler http.HandlerFunc) (address, ca string) {
	s := httptest.NewTLSServer(handler)
	t.Cleanup(s.Close)
	ca = filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return s.URL, ca
}

func fetch(t *testing.T, ctx context.Context, cfg bootstrap.URLConfig, r bootstrap.Request) (string, error) {
	t.Helper()
	cfg.TrustDomain = td
	u, err := bootstrap.NewURL(cfg)
	if err != nil {
		t.Fatal(err)
	}
	b, err := u.Fetch(ctx, r)
	if err != nil {
		return "", err
	}
	return fmt.Sprint(len(b.X509()), len(b.JWT())), nil
}

func TestHTTPS(t *testing.T) {
	t.Parallel()
	pems, spiffe := documents(t)
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(pems) }))
	defer plain.Close()
	stopped := make(chan struct{})
	defer close(stopped)
	bad := unusable()
	address, ca := publisher(t, func(w http.ResponseWriter, r *http.Request) {
		if q := r.URL.RawQuery; q != "" && q != "signature=hunter2" && r.URL.Path != "/query" {
			t.Errorf("query %q", r.URL.RawQuery)
		}
		switch name := strings.TrimPrefix(r.URL.Path, "/"); name {
		case "pem", "query":
			_, _ = w.Write(pems)
		case "json":
			_, _ = w.Write(spiffe)
		case "moved":
			http.Redirect(w, r, "/pem", http.StatusFound)
		case "loop":
			http.Redirect(w, r, "/loop", http.StatusFound)
		case "plain":
			http.Redirect(w, r, plain.URL, http.StatusFound)
		case "moved-with-query":
			http.Redirect(w, r, plain.URL+"/?signature=hunter2", http.StatusFound)
		case "hangs":
			select {
			case <-r.Context().Done():
			case <-stopped:
			}
		default:
			if tt, ok := bad[name]; ok {
				_, _ = w.Write([]byte(tt.content))
				return
			}
			http.NotFound(w, r)
		}
	})
	for path, want := range map[string]string{"pem": "2 0", "json": "2 1", "moved": "2 0", "query?a=b": "2 0"} {
		if got, err := fetch(t, t.Context(), bootstrap.URLConfig{URL: address + "/" + path, CAFile: ca}, bootstrap.Request{}); got != want || err != nil {
			t.Errorf("%s: %s, %v, want %s", path, got, err, want)
		}
	}
	failures := map[string]string{"none": `"404 Not Found"`, "loop": "redirects more than 5 times", "plain": "which is not https"}
	for name, tt := range bad {
		failures[name] = tt.want
	}
	for path, want := range failures {
		at := address + "/" + url.PathEscape(path)
		if got, err := fetch(t, t.Context(), bootstrap.URLConfig{URL: at, CAFile: ca}, bootstrap.Request{}); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), at) {
			t.Errorf("%s: %s, %v, want %s", path, got, err, want)
		}
	}
	// The query of a presigned URL is a secret.
	for path, want := range map[string]string{"none": "404", "plain": "not https", "moved-with-query": "not https", "text": "not a trust bundle"} {
		at := address + "/" + path
		_, err := fetch(t, t.Context(), bootstrap.URLConfig{URL: at + "?signature=hunter2", CAFile: ca}, bootstrap.Request{})
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), at) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s with a query: %v", path, err)
		}
	}
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := fetch(t, short, bootstrap.URLConfig{URL: address + "/hangs", CAFile: ca}, bootstrap.Request{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("hangs: %v", err)
	}
	// The system's CAs have not signed the publisher's certificate, and neither has another
	// file's.
	other := filepath.Join(t.TempDir(), "other.pem")
	if err := os.WriteFile(other, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: newRoot(t, 9).Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	junk := filepath.Join(t.TempDir(), "junk.pem")
	if err := os.WriteFile(junk, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{"": "unknown authority", other: "unknown authority", junk: "holds no PEM certificate", "/none": "read trust_bundle_ca_file"} {
		if _, err := fetch(t, t.Context(), bootstrap.URLConfig{URL: address + "/pem", CAFile: file}, bootstrap.Request{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("CA file %q: %v, want %s", file, err, want)
		}
	}
}

// A local publisher receives what spire-agent tells it.
func TestUnixSocket(t *testing.T) {
	t.Parallel()
	pems, _ := documents(t)
	dir, err := os.MkdirTemp("", "renewd") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket := filepath.Join(dir, "publisher.sock")
	lis, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	asked := make(chan *http.Request, 10)
	s := &httptest.Server{Listener: lis, Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- r
		if r.URL.Path == "/moved" {
			http.Redirect(w, r, "https://example.org", http.StatusFound)
			return
		}
		_, _ = w.Write(pems)
	})}}
	s.Start()
	defer s.Close()
	since := time.Date(2026, 11, 30, 12, 0, 0, 0, time.UTC)
	const rest = "&spire-attest-start-time=2026-11-30T12%3A00%3A00Z&spire-connection-attempts=3&spire-server-address=server.example.org&spire-server-port=8081"
	for _, tt := range []struct {
		url, uri string
		again    bool
	}{
		{"unix://" + socket, "/?spiffe-trust-domain=example.org&spire-attest-mode=bootstrap", false},
		{"unix://" + socket + ":/the/bundle", "/the/bundle?spiffe-trust-domain=example.org&spire-attest-mode=rebootstrap", true},
	} {
		got, err := fetch(t, t.Context(), bootstrap.URLConfig{URL: tt.url, ServerAddress: "server.example.org:8081"}, bootstrap.Request{Rebootstrap: tt.again, Attempt: 3, Since: since})
		if got != "2 0" || err != nil {
			t.Fatalf("%s: %s, %v", tt.url, got, err)
		}
		uri := (<-asked).RequestURI
		if uri != tt.uri+rest {
			t.Errorf("%s: asked %s\nwant %s", tt.url, uri, tt.uri+rest)
		}
	}
	if _, err := fetch(t, t.Context(), bootstrap.URLConfig{URL: "unix://" + socket + ":/moved"}, bootstrap.Request{}); err == nil || !strings.Contains(err.Error(), "must not redirect") {
		t.Errorf("redirect: %v", err)
	}
	s.Close()
	if _, err := fetch(t, t.Context(), bootstrap.URLConfig{URL: "unix://" + socket}, bootstrap.Request{}); err == nil || !strings.Contains(err.Error(), socket) || strings.Contains(err.Error(), "spire-attest") {
		t.Errorf("without a publisher: %v", err)
	}
}

func TestNewURLRefuses(t *testing.T) {
	t.Parallel()
	for u, want := range map[string]string{
		"":                            "is neither",
		"http://example.org/bundle":   "is neither",
		"file:///etc/bundle":          "is neither",
		"https:///bundle":             "is neither",
		"https://":                    "is neither",
		"https://u:p@example.org/":    "has a user",
		"unix://host/path":            "is neither",
		"unix:path":                   "is neither",
		"unix:///run/x.sock?a=b":      "is neither",
		"unix:///run/x.sock:bundle":   "does not begin with /",
		"https://example.org:x/":      "is not a URL",
		"unix:///run/x.sock:/a#bytes": "is neither",
	} {
		if _, err := bootstrap.NewURL(bootstrap.URLConfig{URL: u}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %s", u, err, want)
		}
	}
}

func FuzzTrustBundleFile(f *testing.F) {
	pems, spiffe := documents(f)
	f.Add(pems)
	f.Add(spiffe)
	f.Add([]byte(`{"keys":[],"spiffe_sequence":1}`))
	path := filepath.Join(f.TempDir(), "bundle")
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := bootstrap.File{Path: path, TrustDomain: td}.Fetch(t.Context(), bootstrap.Request{})
		if (out == nil) == (err == nil) {
			t.Fatalf("got %v, %v", out, err)
		}
	})
}
