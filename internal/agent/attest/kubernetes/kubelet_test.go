package kubernetes_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/attest/cgroup"
	"github.com/renewd/renewd/internal/agent/attest/kubernetes"
)

// handwritten is an answer to /pods that was written by hand; see testdata/README.md.
func handwritten(t testing.TB) []byte {
	t.Helper()
	b, err := os.ReadFile("testdata/pods-handwritten.json")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// id is the ID of a container in the handwritten list.
func id(digit string) string { return strings.Repeat(digit, 64) }

// inPod is what the control group of a process shows.
func inPod(podUID, digit string) cgroup.Container {
	return cgroup.Container{ID: id(digit), Pod: true, PodUID: podUID}
}

const (
	webUID    = "2c48913c-b29f-11e7-9350-020968147796"
	staticUID = "0123456789abcdef0123456789abcdef"
	jobUID    = "a2830d0d-b0f0-4ff0-81b5-0ee4e299cf80"
	newUID    = "72f7f152-440c-66ac-9084-e0fc1d8a910c"
)

// listOf is a list of pods with one container each, by the digit of its ID.
func listOf(t testing.TB, pods map[string]string) []byte {
	t.Helper()
	type m = map[string]any
	items := []m{}
	for uid, digit := range pods {
		items = append(items, m{
			"metadata": m{"name": "pod-" + digit, "namespace": "prod", "uid": uid, "labels": m{"app": digit}},
			"status":   m{"containerStatuses": []m{{"name": "app", "containerID": "containerd://" + id(digit)}}},
		})
	}
	b, err := json.Marshal(m{"kind": "PodList", "items": items})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// kubelet answers with what answer writes, and counts.
type kubelet struct {
	requests atomic.Int32
	answer   atomic.Pointer[http.HandlerFunc]
}

func newKubelet(answer http.HandlerFunc) *kubelet {
	k := new(kubelet)
	k.set(answer)
	return k
}

func (k *kubelet) set(answer http.HandlerFunc) { k.answer.Store(&answer) }

func (k *kubelet) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	k.requests.Add(1)
	(*k.answer.Load())(w, r)
}

// answers returns a handler for a body.
func answers(body []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/pods" {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(body) // the agent may have gone
	}
}

func fails(code int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { http.Error(w, body, code) }
}

// overPipes serves the kubelet's read-only port without a network, for bubbles of synctest,
// and returns an attestor that asks it.
func overPipes(t *testing.T, k http.Handler, cfg kubernetes.Config) *kubernetes.Attestor {
	t.Helper()
	cfg.KubeletReadOnlyPort = 10255
	a, err := kubernetes.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	l := &pipes{conns: make(chan net.Conn), closed: make(chan struct{})}
	a.Dial(l.dial)
	srv := &http.Server{Handler: k, ErrorLog: log.New(io.Discard, "", 0)}
	var served sync.WaitGroup
	served.Go(func() { _ = srv.Serve(l) })
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
		srv.Close()
		served.Wait()
	})
	return a
}

// pipes is a listener in memory.
type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (l *pipes) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	ours, theirs := net.Pipe()
	select {
	case l.conns <- theirs:
		return ours, nil
	case <-l.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (l *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipes) Close() error { l.once.Do(func() { close(l.closed) }); return nil }
func (l *pipes) Addr() net.Addr {
	return &net.UnixAddr{Name: "kubelet", Net: "unix"}
}

// authority is a CA in PEM, with the files that it signs.
type authority struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	ca := &authority{t: t}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "kubernetes"}, IsCA: true, BasicConstraintsValid: true}
	ca.cert, ca.key = ca.sign(template)
	ca.file = writePEM(t, "ca.crt", "CERTIFICATE", ca.cert.Raw)
	return ca
}

func (ca *authority) sign(template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	ca.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		ca.t.Fatal(err)
	}
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, parentKey := ca.cert, ca.key
	if parent == nil {
		parent, parentKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
	if err != nil {
		ca.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		ca.t.Fatal(err)
	}
	return cert, key
}

// server returns a serving certificate for names.
func (ca *authority) server(names ...string) tls.Certificate {
	template := &x509.Certificate{SerialNumber: big.NewInt(2), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	cert, key := ca.sign(template)
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
}

// client writes a client certificate and its key.
func (ca *authority) client(name string) (certFile, keyFile string) {
	cert, key := ca.sign(&x509.Certificate{SerialNumber: big.NewInt(3), Subject: pkix.Name{CommonName: name}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		ca.t.Fatal(err)
	}
	return writePEM(ca.t, "client.crt", "CERTIFICATE", cert.Raw), writePEM(ca.t, "client.key", "PRIVATE KEY", der)
}

func writePEM(t testing.TB, name, kind string, der []byte) string {
	t.Helper()
	return write(t, name, string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})))
}

func write(t testing.TB, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// overTLS serves a kubelet with TLS on 127.0.0.1 and returns a configuration that reaches
// it.
func overTLS(t testing.TB, k http.Handler, ca *authority, names ...string) kubernetes.Config {
	t.Helper()
	srv := httptest.NewUnstartedServer(k)
	clients := x509.NewCertPool()
	clients.AddCert(ca.cert)
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{ca.server(names...)}, ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: clients}
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.StartTLS()
	t.Cleanup(srv.Close)
	return kubernetes.Config{
		KubeletPort:   srv.Listener.Addr().(*net.TCPAddr).Port,
		KubeletCAFile: ca.file,
		TokenFile:     write(t, "token", "token-1\n"),
		PollInterval:  time.Millisecond,
	}
}

// attestOnce makes an attestor and attests once.
func attestOnce(t *testing.T, cfg kubernetes.Config, c cgroup.Container) ([]cache.Selector, error) {
	t.Helper()
	a, err := kubernetes.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	return a.Selectors(t.Context(), c)
}

// values returns the values of selectors, sorted, and checks their type.
func values(t testing.TB, selectors []cache.Selector) []string {
	t.Helper()
	out := make([]string, 0, len(selectors))
	for _, s := range selectors {
		if s.Type != "k8s" {
			t.Errorf("selector type %q, want k8s", s.Type)
		}
		out = append(out, s.Value)
	}
	slices.Sort(out)
	return out
}

// has reports whether the selectors have one with the value.
func has(selectors []cache.Selector, value string) bool {
	return slices.Contains(selectors, cache.Selector{Type: "k8s", Value: value})
}

func requireCount(t *testing.T, k *kubelet, want int32) {
	t.Helper()
	if got := k.requests.Load(); got != want {
		t.Errorf("%d requests to the kubelet, want %d", got, want)
	}
}

// bearer lets a token in.
func bearer(token string, then http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer "+token {
			http.Error(w, "Unauthorized", http.StatusUnauthorized)
			return
		}
		then(w, r)
	}
}

// clientCertificate lets a client certificate in.
func clientCertificate(name string, then http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if len(r.TLS.PeerCertificates) == 0 || r.TLS.PeerCertificates[0].Subject.CommonName != name {
			http.Error(w, fmt.Sprint("want ", name), http.StatusUnauthorized)
			return
		}
		if r.Header.Get("Authorization") != "" {
			http.Error(w, "a token, too", http.StatusBadRequest)
			return
		}
		then(w, r)
	}
}
