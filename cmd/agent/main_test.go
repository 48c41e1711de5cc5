package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/listen"
	"github.com/renewd/renewd/metrics"
	"github.com/renewd/renewd/test/clitest"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"agent": main})
}

// TestScripts runs the command lines in testdata/script against a Workload API (at
// $API; at $NO_IDENTITY one without identities) and an HTTP listener (at $URL, which is http://$ADDRESS; at
// $STARTING one of an agent that is not ready). Kubelets listen on the ports $KUBELET and
// $FORBIDDEN, with certificates that kubelet.crt verifies. $DAEMONSET is the configuration
// in daemonset.yaml.
func TestScripts(t *testing.T) {
	t.Parallel()
	clitest.Run(t, map[string]string{"DEPLOY": "."}, func(e *testscript.Env) {
		e.Setenv("DAEMONSET", filepath.Join(e.WorkDir, "daemonset.yaml"))
		if err := os.WriteFile(e.Getenv("DAEMONSET"), []byte(manifestsOf(t)["ConfigMap"].Data["agent.yaml"]), 0o600); err != nil {
			t.Fatal(err)
		}
		id := newIdentity(t)
		serveWorkloadAPI(t, e, "API", id)
		serveBundle(t, e, id)
		serveWorkloadAPI(t, e, "NO_IDENTITY", nil)
		e.Setenv("URL", serveHTTP(t, e, rotation, nil))
		e.Setenv("ADDRESS", strings.TrimPrefix(e.Getenv("URL"), "http://"))
		e.Setenv("STARTING", serveHTTP(t, e, func() metrics.State { return metrics.State{} },
			errors.New("starting: nothing has arrived yet\ndata_dir: bundle.json: no space left on device")))
		serveKubelet(t, e, "KUBELET", func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, `{"kind": "PodList", "items": []}`)
		})
		serveKubelet(t, e, "FORBIDDEN", func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "Forbidden", http.StatusForbidden) })
	})
}

// rotation is the state of an agent during a rotation, with times whose output does not
// change for centuries.
func rotation() metrics.State {
	at := time.Date(2020, 1, 2, 3, 4, 5, 0, time.UTC)
	return metrics.State{
		Authorities: []metrics.Authority{
			{Type: metrics.TypeX509, ID: "aa11", State: metrics.StateActive, Held: 7},
			{Type: metrics.TypeX509, ID: "bb22", State: metrics.StateTainted, Held: 3, Pending: 2, Streams: 1},
			{Type: metrics.TypeX509, ID: "cc33", State: metrics.StateSettled},
			{Type: metrics.TypeJWT, ID: "k1", State: metrics.StateActive, Held: 4},
		},
		OwnID: "spiffe://example.org/spire/agent/join_token/1", OwnExpiry: at.Add(time.Hour), BundleApplied: at, BundleSequence: 42,
		JWTExpiry: map[string]time.Time{"k1": at.Add(2 * time.Hour)},
		SVIDs:     map[string]int{"waiting": 0, "minting": 0, "fresh": 7, "due": 0, "backing_off": 1, "stale": 2, "expired": 0},
	}
}

func serveHTTP(t *testing.T, e *testscript.Env, state func() metrics.State, notReady error) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	m := metrics.New(metrics.Config{TrustDomain: "example.org", Deployment: "prod", Version: "v1.2.3", Source: state})
	srv, serve := metrics.NewHTTPServer(metrics.HTTPConfig{Metrics: m, Ready: func() error { return notReady }})
	go func() { done <- listen.ServeHTTP(ctx, listen.NewPool(), l, srv, serve) }()
	e.Defer(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return "http://" + l.Addr().String()
}

// serveWorkloadAPI serves one identity, or none if id is nil.
func serveWorkloadAPI(t *testing.T, e *testscript.Env, name string, id *identity) {
	clitest.Serve(t, e, name, func(r grpc.ServiceRegistrar) { workload.RegisterSpiffeWorkloadAPIServer(r, &fakeAPI{id: id}) })
}

type fakeAPI struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	id *identity
}

var errNoIdentity = status.Error(codes.PermissionDenied, "no identity issued")

func (f *fakeAPI) FetchX509SVID(_ *workload.X509SVIDRequest, s grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	if f.id == nil {
		return errNoIdentity
	}
	if err := s.Send(&workload.X509SVIDResponse{Svids: []*workload.X509SVID{{
		SpiffeId: f.id.spiffeID, X509Svid: f.id.leaf, X509SvidKey: f.id.key, Bundle: f.id.root, Hint: "internal",
	}}}); err != nil {
		return err
	}
	<-s.Context().Done()
	return nil
}

func (f *fakeAPI) FetchX509Bundles(_ *workload.X509BundlesRequest, s grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	if f.id == nil {
		return errNoIdentity
	}
	return s.Send(&workload.X509BundlesResponse{Bundles: map[string][]byte{"spiffe://example.org": f.id.root}})
}

func (f *fakeAPI) FetchJWTSVID(_ context.Context, req *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	if f.id == nil {
		return nil, errNoIdentity
	}
	token, err := f.id.token(req.GetAudience())
	if err != nil {
		return nil, err
	}
	return &workload.JWTSVIDResponse{Svids: []*workload.JWTSVID{{SpiffeId: f.id.spiffeID, Svid: token}}}, nil
}

// identity is a workload's identity with its own authority.
type identity struct {
	spiffeID        string
	leaf, key, root []byte
	signer          jose.Signer
}

func newIdentity(t *testing.T) *identity {
	caKey, ca := newKey(t), &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, SubjectKeyId: []byte{0xab, 0xcd},
		URIs:      []*url.URL{{Scheme: "spiffe", Host: "example.org"}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	leafKey, leaf := newKey(t), &x509.Certificate{
		SerialNumber: big.NewInt(4711), URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/web"}},
		DNSNames:  []string{"web.example.org", "a\x1b[31m.example.org"},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
	}
	id := &identity{spiffeID: "spiffe://example.org/web"}
	var err error
	if id.root, err = x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey); err != nil {
		t.Fatal(err)
	}
	if id.leaf, err = x509.CreateCertificate(rand.Reader, leaf, ca, leafKey.Public(), caKey); err != nil {
		t.Fatal(err)
	}
	if id.key, err = x509.MarshalPKCS8PrivateKey(leafKey); err != nil {
		t.Fatal(err)
	}
	id.signer, err = jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: caKey, KeyID: "key-1"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func (id *identity) token(audience []string) (string, error) {
	return jwt.Signed(id.signer).Claims(jwt.Claims{
		Subject: id.spiffeID, Audience: audience,
		IssuedAt: jwt.NewNumericDate(time.Now()), Expiry: jwt.NewNumericDate(time.Now().Add(time.Hour)),
	}).Serialize()
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func noEnv(string) string { return "" }

// serveKubelet serves HTTPS on 127.0.0.1. The port is in the variable, the certificate in
// kubelet.crt.
func serveKubelet(t *testing.T, e *testscript.Env, variable string, answer http.HandlerFunc) {
	t.Helper()
	srv := httptest.NewTLSServer(answer)
	e.Defer(srv.Close)
	e.Setenv(variable, strconv.Itoa(srv.Listener.Addr().(*net.TCPAddr).Port))
	crt := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	if err := os.WriteFile(filepath.Join(e.WorkDir, "kubelet.crt"), crt, 0o600); err != nil {
		t.Fatal(err)
	}
}
