package metrics_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/renewd/renewd/internal/listen"
	"github.com/renewd/renewd/metrics"
)

// start serves on a free port until ctx ends, and returns the address and the result.
func start(ctx context.Context, t *testing.T, cfg metrics.HTTPConfig) (address string, done <-chan error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv, serve := metrics.NewHTTPServer(cfg)
	ended := make(chan error, 1)
	go func() { ended <- listen.ServeHTTP(ctx, listen.NewPool(), l, srv, serve) }()
	return l.Addr().String(), ended
}

// serve serves on a free port and returns its URL. It is stopped, and its result checked,
// at the end of the test.
func serve(t *testing.T, cfg metrics.HTTPConfig) string {
	t.Helper()
	if cfg.Metrics == nil {
		cfg.Metrics = newMetrics(wave)
	}
	ctx, cancel := context.WithCancel(t.Context())
	address, done := start(ctx, t, cfg)
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("ServeHTTP: %v", err)
		}
		if _, err := net.Dial("tcp", address); err == nil {
			t.Error("the port is still open after ServeHTTP returned")
		}
	})
	return "http://" + address
}

func get(t *testing.T, req *http.Request) (int, string) {
	t.Helper()
	client := &http.Client{Timeout: 5 * time.Second}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func request(t *testing.T, method, url string) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	return req
}

func TestServe(t *testing.T) {
	t.Parallel()
	var ready atomic.Bool
	url := serve(t, metrics.HTTPConfig{Ready: func() error {
		if !ready.Load() {
			return errors.New("waiting for the first sync")
		}
		return nil
	}})
	for _, tt := range []struct {
		method, path string
		code         int
		body         string
	}{
		{"GET", "/metrics", 200, "renewd_taint_settled{authority=\"dd\"} 1\n"},
		{"GET", "/live", 200, "ok\n"},
		{"GET", "/ready", 503, "waiting for the first sync\n"},
		{"GET", "/debug/pprof/", 404, ""},
		{"POST", "/live", 405, ""},
	} {
		if code, body := get(t, request(t, tt.method, url+tt.path)); code != tt.code || !strings.Contains(body, tt.body) {
			t.Errorf("%s %s: %d %q, want %d with %q", tt.method, tt.path, code, body, tt.code, tt.body)
		}
	}
	ready.Store(true)
	if code, body := get(t, request(t, "GET", url+"/ready")); code != 200 || body != "ok\n" {
		t.Errorf("/ready after it became ready: %d %q", code, body)
	}
}

func TestServeBasicAuth(t *testing.T) {
	t.Parallel()
	hash, err := bcrypt.GenerateFromPassword([]byte("secret"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "web.yml")
	if err := os.WriteFile(file, []byte("basic_auth_users:\n  ops: "+string(hash)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := metrics.CheckWebConfig(file); err != nil {
		t.Fatal(err)
	}
	url := serve(t, metrics.HTTPConfig{WebConfigFile: file})
	if code, _ := get(t, request(t, "GET", url+"/metrics")); code != http.StatusUnauthorized {
		t.Errorf("without a password: %d", code)
	}
	req := request(t, "GET", url+"/metrics")
	req.SetBasicAuth("ops", "secret")
	if code, _ := get(t, req); code != http.StatusOK {
		t.Errorf("with the password: %d", code)
	}
}

func TestServeErrors(t *testing.T) {
	t.Parallel()
	missing := filepath.Join(t.TempDir(), "missing.yml")
	if err := metrics.CheckWebConfig(missing); err == nil {
		t.Error("CheckWebConfig accepts a missing file")
	}
	address, done := start(t.Context(), t, metrics.HTTPConfig{WebConfigFile: missing, Metrics: newMetrics(wave)})
	if err := <-done; err == nil {
		t.Error("ServeHTTP accepts a missing web config file")
	}
	if _, err := net.Dial("tcp", address); err == nil {
		t.Error("the listener is still open after ServeHTTP failed")
	}
}

// A scrape that hangs must not keep the agent from stopping.
func TestServeStopsWithRequestInFlight(t *testing.T) {
	t.Parallel()
	entered, release := make(chan struct{}), make(chan struct{})
	t.Cleanup(func() { close(release) })
	ctx, cancel := context.WithCancel(t.Context())
	address, done := start(ctx, t, metrics.HTTPConfig{Metrics: newMetrics(wave), Ready: func() error {
		close(entered)
		<-release
		return nil
	}})
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := io.WriteString(conn, "GET /ready HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	<-entered
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("ServeHTTP: %v", err)
		}
	case <-time.After(2 * time.Minute):
		t.Fatal("ServeHTTP does not stop")
	}
}
