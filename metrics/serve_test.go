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

	"github.com/renewd/renewd/metrics"
)

// serve starts Serve on a free port and returns its URL. It is stopped, and its
// result checked, at the end of the test.
func serve(t *testing.T, cfg metrics.ServeConfig) string {
	t.Helper()
	l, err := metrics.Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg.Listener = l
	if cfg.Metrics == nil {
		cfg.Metrics = newMetrics(wave)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- metrics.Serve(ctx, cfg) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if _, err := net.Dial("tcp", l.Addr().String()); err == nil {
			t.Error("the port is still open after Serve returned")
		}
	})
	return "http://" + l.Addr().String()
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
	url := serve(t, metrics.ServeConfig{Ready: func() error {
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
	url := serve(t, metrics.ServeConfig{WebConfigFile: file})
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
	l, err := metrics.Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	taken := l.Addr().String()
	if err := metrics.Serve(t.Context(), metrics.ServeConfig{Address: taken, Metrics: newMetrics(wave)}); err == nil || !strings.Contains(err.Error(), taken) {
		t.Errorf("on a taken port: %v", err)
	}
	missing := filepath.Join(t.TempDir(), "missing.yml")
	if err := metrics.CheckWebConfig(missing); err == nil {
		t.Error("CheckWebConfig accepts a missing file")
	}
	if err := metrics.Serve(t.Context(), metrics.ServeConfig{Listener: l, WebConfigFile: missing, Metrics: newMetrics(wave)}); err == nil {
		t.Error("Serve accepts a missing web config file")
	}
	if _, err := net.Dial("tcp", taken); err == nil {
		t.Error("the listener is still open after Serve failed")
	}
}

// A scrape that hangs must not keep the agent from stopping.
func TestServeStopsWithRequestInFlight(t *testing.T) {
	t.Parallel()
	entered, release := make(chan struct{}), make(chan struct{})
	t.Cleanup(func() { close(release) })
	l, err := metrics.Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- metrics.Serve(ctx, metrics.ServeConfig{Listener: l, Metrics: newMetrics(wave), Live: func() error {
			close(entered)
			<-release
			return nil
		}})
	}()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := io.WriteString(conn, "GET /live HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	<-entered
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("Serve: %v", err)
		}
	case <-time.After(2 * time.Minute):
		t.Fatal("Serve does not stop")
	}
}
