package upstream_test

import (
	"context"
	"encoding/base64"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/agent/bootstrap"
	"github.com/renewd/renewd/internal/agent/node"
	"github.com/renewd/renewd/internal/agent/upstream"
)

// serverBehindProxy is a name that only the proxy can connect to.
const serverBehindProxy = "server.internal.invalid:8081"

// connectProxy is an HTTP proxy that supports CONNECT.
type connectProxy struct {
	backend string // address of serverBehindProxy
	user    string // user:password that it requires; empty: none
	extra   string // sent after the answer

	mu     sync.Mutex
	hosts  []string // of the requests
	tunnel sync.WaitGroup
}

func (p *connectProxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.tunnel.Add(1) // before Hijack, after which the server does not wait for this call
	defer p.tunnel.Done()
	p.mu.Lock()
	p.hosts = append(p.hosts, r.Method+" "+r.Host)
	p.mu.Unlock()
	if p.user != "" && r.Header.Get("Proxy-Authorization") != "Basic "+base64.StdEncoding.EncodeToString([]byte(p.user)) {
		http.Error(w, "who are you?", http.StatusProxyAuthRequired)
		return
	}
	if r.Method != http.MethodConnect || r.Host != serverBehindProxy {
		http.Error(w, "not that way", http.StatusForbidden)
		return
	}
	server, err := net.Dial("tcp", p.backend)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	client, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		server.Close()
		return
	}
	_, _ = io.WriteString(client, "HTTP/1.1 200 Connection established\r\n\r\n"+p.extra)
	for _, c := range [][2]net.Conn{{client, server}, {server, client}} {
		p.tunnel.Go(func() {
			_, _ = io.Copy(c[0], c[1])
			c[0].Close()
		})
	}
}

// agentBehindProxy is a node whose server is reached through a proxy alone.
func agentBehindProxy(t *testing.T, p *connectProxy, user *url.Userinfo) *agent {
	ctx, cancel := context.WithCancel(context.Background())
	s := newEmbedded(t)
	lis := must(net.Listen("tcp", "127.0.0.1:0"))
	p.backend = lis.Addr().String()
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, lis) }()
	proxy := httptest.NewServer(p)
	at := must(url.Parse(proxy.URL))
	at.User = user
	dir := t.TempDir()
	file := filepath.Join(dir, "bundle.pem")
	if err := os.WriteFile(file, s.BundlePEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	a := &agent{}
	a.trust.Store(must(bootstrap.File{Path: file, TrustDomain: td}.Fetch(t.Context(), bootstrap.Request{})))
	a.store = must(node.OpenStore(filepath.Join(dir, "data"), nil))
	token := must(s.CreateJoinToken(ctx, time.Hour, "")).Value
	a.node = must(node.New(node.Config{TrustDomain: td, Attestor: node.JoinToken(token, ""), Store: a.store, Bundle: a.trust.Load}))
	a.Client = must(upstream.New(upstream.Config{
		ServerAddress: serverBehindProxy, Proxy: at, TrustDomain: td, Node: a.node, Bundle: a.trust.Load, Version: "1.0",
	}))
	t.Cleanup(func() {
		a.close(t)
		cancel()
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
		proxy.Close()
		p.tunnel.Wait()
	})
	return a
}

// A node attests and asks through the proxy, which resolves the server's name.
func TestThroughProxy(t *testing.T) {
	t.Parallel()
	p := &connectProxy{user: "node:secret of the proxy"}
	a := agentBehindProxy(t, p, url.UserPassword("node", "secret of the proxy"))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := a.Attest(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := a.SyncEntries(t.Context(), nil); err != nil {
		t.Error(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, host := range p.hosts {
		if host != "CONNECT "+serverBehindProxy {
			t.Errorf("the proxy was asked for %q", host)
		}
	}
}

// The error of a refused connection has the proxy's status and no password.
func TestProxyRefuses(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		proxy *connectProxy
		want  string
	}{
		"wrong password": {&connectProxy{user: "node:right"}, "407 Proxy Authentication Required"},
		"not in TLS":     {&connectProxy{extra: "220 mail.example.org"}, "more than CONNECT asks for"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := agentBehindProxy(t, tt.proxy, url.UserPassword("node", "hunter2"))
			_, err := a.FetchBundle(t.Context())
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), serverBehindProxy) || strings.Contains(err.Error(), "hunter2") {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

// A call to a proxy that does not answer ends with its context.
func TestProxyHangs(t *testing.T) {
	t.Parallel()
	lis := must(net.Listen("tcp", "127.0.0.1:0"))
	defer lis.Close()
	ctx, cancel := context.WithCancel(t.Context())
	var proxy sync.WaitGroup
	defer proxy.Wait()
	proxy.Go(func() {
		if conn, err := lis.Accept(); err == nil {
			defer conn.Close()
			_, _ = conn.Read(make([]byte, 1))
			cancel()
			_, _ = io.Copy(io.Discard, conn) // until the other end gives up
		}
	})
	dial := upstream.ThroughProxy(&url.URL{Scheme: "http", Host: lis.Addr().String()})
	conn, err := dial(ctx, serverBehindProxy)
	if conn != nil || !errors.Is(err, context.Canceled) {
		t.Errorf("connected %v, %v; want Canceled", conn != nil, err)
	}
}
