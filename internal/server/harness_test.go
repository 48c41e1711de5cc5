package server_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/operator/renewd"
	"github.com/renewd/renewd/internal/server"
	"github.com/renewd/renewd/internal/server/rotation"
	"github.com/renewd/renewd/internal/server/seal"
)

var (
	td       = spiffeid.RequireTrustDomainFromString("example.org")
	serverID = spiffeid.RequireFromPath(td, "/spire/server")
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newConfig returns a server with a store and every listener, on free ports, without
// automatic rotation.
func newConfig(t testing.TB, deployments ...string) server.Config {
	t.Helper()
	dir, err := os.MkdirTemp("", "rn") // a socket's path is short
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	check(t, seal.NewFile(filepath.Join(dir, "key.json")))
	c := server.Config{
		TrustDomain: td, DataDir: filepath.Join(dir, "data"), KeyFile: filepath.Join(dir, "key.json"),
		AdminSocket: filepath.Join(dir, "admin.sock"), OperatorAddress: "127.0.0.1:0",
		Managers:        []string{"unix:uid:0", "unix:uid:" + strconv.Itoa(os.Geteuid()), "spiffe://example.org/ops/alice"},
		Readers:         []string{"spiffe://example.org/ops/bob"},
		EndpointAddress: "127.0.0.1:0", RefreshHint: time.Minute, MetricsAddress: "127.0.0.1:0",
		Rotation: rotation.Policy{Mode: rotation.Off}, Version: "1.2.3",
	}
	return served(c, deployments...)
}

// served returns the configuration with these deployments.
func served(c server.Config, names ...string) server.Config {
	c.Deployments = nil
	for _, name := range names {
		c.Deployments = append(c.Deployments, server.DeploymentConfig{Name: name, ListenAddress: "127.0.0.1:0"})
	}
	return c
}

// start is a log handler that collects the addresses of the listeners.
type start struct {
	mu        sync.Mutex
	addresses map[string]string // by configuration field
	refused   []string          // IDs of stored entries that would be refused
	clock     []string          // what was logged of the clock
	done      chan struct{}
}

func (s *start) Enabled(context.Context, slog.Level) bool { return true }
func (s *start) WithAttrs([]slog.Attr) slog.Handler       { return s }
func (s *start) WithGroup(string) slog.Handler            { return s }

func (s *start) Handle(_ context.Context, r slog.Record) error {
	var field, address, entry string
	r.Attrs(func(a slog.Attr) bool {
		switch a.Key {
		case "endpoint":
			field = a.Value.String()
		case "address":
			address = a.Value.String()
		case "entry_id":
			entry = a.Value.String()
		}
		return true
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	if strings.HasPrefix(r.Message, "clock ") && r.Level >= slog.LevelInfo {
		s.clock = append(s.clock, r.Level.String()+" "+r.Message)
	}
	switch r.Message {
	case "listening":
		s.addresses[field] = address
	case "stored entry would be refused":
		s.refused = append(s.refused, entry)
	case "server started":
		close(s.done)
	}
	return nil
}

// running is a domain that serves until the test ends.
type running struct {
	*server.Domain
	t      testing.TB
	config server.Config
	start  *start
	stop   func() // ends Run and waits for it
	api    *renewd.Client
}

func run(t testing.TB, c server.Config) *running {
	t.Helper()
	r := &running{t: t, config: c, start: &start{addresses: map[string]string{}, done: make(chan struct{})}}
	c.Log = slog.New(r.start)
	var err error
	r.Domain, err = server.Open(t.Context(), c)
	check(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(r.stop)
	select {
	case <-r.start.done:
	case err := <-ended:
		ended <- nil
		t.Fatalf("Run: %v", err)
	}
	if c.AdminSocket != "" {
		r.api, err = renewd.DialSocket(c.AdminSocket)
		check(t, err)
		t.Cleanup(func() { r.api.Close() })
	}
	return r
}

// address returns the address of the listener of a configuration field.
func (r *running) address(field string) string {
	r.t.Helper()
	a := r.start.addresses[field]
	if a == "" {
		r.t.Fatalf("no listener of %s", field)
	}
	return a
}

func scope(deployment string) *api.Scope { return &api.Scope{Deployment: deployment} }

// identity is an SVID and its key.
type identity struct {
	id    spiffeid.ID
	chain []*x509.Certificate
	key   crypto.Signer
}

// agent is an agent's connection to a deployment, with clients of all services.
type agent struct {
	*identity
	*grpc.ClientConn
	agentv1.AgentClient
	bundlev1.BundleClient
	entryv1.EntryClient
	svidv1.SVIDClient
	api.FleetClient
	t testing.TB
}

// credentials authenticate a client, anonymous when nil, to a server of the trust domain.
func (r *running) credentials(client *identity) credentials.TransportCredentials {
	authorities := x509bundle.FromX509Authorities(td, r.Published().Certificates())
	config := tlsconfig.TLSClientConfig(authorities, tlsconfig.AuthorizeID(serverID))
	if client != nil {
		svid := &x509svid.SVID{ID: client.id, Certificates: client.chain, PrivateKey: client.key}
		config = tlsconfig.MTLSClientConfig(svid, authorities, tlsconfig.AuthorizeID(serverID))
	}
	return credentials.NewTLS(config)
}

// dial connects to a deployment.
func (r *running) dial(deployment string, client *identity) *agent {
	r.t.Helper()
	return r.connect(client, r.address("deployments."+deployment+".listen_address"))
}

func (r *running) connect(client *identity, address string, options ...grpc.DialOption) *agent {
	r.t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+address, append(options, grpc.WithTransportCredentials(r.credentials(client)))...)
	check(r.t, err)
	r.t.Cleanup(func() { conn.Close() })
	return &agent{
		client, conn, agentv1.NewAgentClient(conn), bundlev1.NewBundleClient(conn), entryv1.NewEntryClient(conn),
		svidv1.NewSVIDClient(conn), api.NewFleetClient(conn), r.t,
	}
}

// join attests a new agent to a deployment.
func (r *running) join(deployment string) *agent {
	r.t.Helper()
	return r.attest(deployment, r.token(deployment))
}

func (r *running) token(deployment string) string {
	r.t.Helper()
	resp, err := r.api.CreateJoinToken(r.t.Context(), &api.CreateJoinTokenRequest{Scope: scope(deployment)})
	check(r.t, err)
	return resp.GetToken()
}

func (r *running) attest(deployment, token string) *agent {
	r.t.Helper()
	return r.dial(deployment, r.dial(deployment, nil).attest(token))
}

// attest exchanges a join token for an agent SVID.
func (a *agent) attest(token string) *identity {
	a.t.Helper()
	key, csr := newKey(a.t)
	stream, err := a.AttestAgent(a.t.Context())
	check(a.t, err)
	check(a.t, stream.Send(attestation(token, csr)))
	resp, err := stream.Recv()
	check(a.t, err)
	return parse(a.t, resp.GetResult().GetSvid(), key)
}

func attestation(token string, csr []byte) *agentv1.AttestAgentRequest {
	return &agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{
		Params: &agentv1.AttestAgentRequest_Params{
			Data:   &types.AttestationData{Type: "join_token", Payload: []byte(token)},
			Params: &agentv1.AgentX509SVIDParams{Csr: csr},
		},
	}}
}

func newKey(t testing.TB) (crypto.Signer, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	check(t, err)
	return key, csr
}

func parse(t testing.TB, svid *types.X509SVID, key crypto.Signer) *identity {
	t.Helper()
	client := &identity{id: spiffeid.RequireFromPath(td, svid.GetId().GetPath()), key: key}
	for _, der := range svid.GetCertChain() {
		cert, err := x509.ParseCertificate(der)
		check(t, err)
		client.chain = append(client.chain, cert)
	}
	return client
}

// mint requests X.509-SVIDs of entries, with one key.
func (a *agent) mint(entries ...string) ([]*identity, error) {
	a.t.Helper()
	key, csr := newKey(a.t)
	req := &svidv1.BatchNewX509SVIDRequest{}
	for _, id := range entries {
		req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: id, Csr: csr})
	}
	resp, err := a.BatchNewX509SVID(a.t.Context(), req)
	if err != nil {
		if len(resp.GetResults()) > 0 {
			a.t.Errorf("error with results: %v", resp)
		}
		return nil, err
	}
	var out []*identity
	for _, res := range resp.GetResults() {
		if res.GetStatus().GetCode() != 0 {
			a.t.Fatalf("%v", res.GetStatus())
		}
		out = append(out, parse(a.t, res.GetSvid(), key))
	}
	return out, nil
}

// workload requests the X.509-SVID of one entry.
func (a *agent) workload(entry string) *identity {
	a.t.Helper()
	all, err := a.mint(entry)
	check(a.t, err)
	return all[0]
}

// bundle returns the trust bundle that the agent gets, as received and parsed.
func (a *agent) bundle() (*types.Bundle, *spiffebundle.Bundle) {
	a.t.Helper()
	b, err := a.GetBundle(a.t.Context(), &bundlev1.GetBundleRequest{})
	check(a.t, err)
	out := spiffebundle.New(td)
	for _, x := range b.GetX509Authorities() {
		cert, err := x509.ParseCertificate(x.GetAsn1())
		check(a.t, err)
		out.AddX509Authority(cert)
	}
	for _, j := range b.GetJwtAuthorities() {
		key, err := x509.ParsePKIXPublicKey(j.GetPublicKey())
		check(a.t, err)
		check(a.t, out.AddJWTAuthority(j.GetKeyId(), key))
	}
	return b, out
}

// put creates an entry for spiffe://example.org/PATH in a deployment.
func (r *running) put(deployment, entry, path string) {
	r.t.Helper()
	_, err := r.api.PutEntry(r.t.Context(), &api.PutEntryRequest{Scope: scope(deployment), Entry: &api.Entry{
		Id: entry, SpiffeId: "spiffe://example.org" + path, Selectors: []*api.Selector{{Type: "unix", Value: "uid:0"}},
	}})
	check(r.t, err)
}

// rotate prepares and activates a keyset and taints the previous one. It returns the
// previous one's ID.
func (r *running) rotate(deployment string) (old string) {
	r.t.Helper()
	ctx, s := r.t.Context(), scope(deployment)
	for _, k := range r.keysets(deployment).GetKeysets() {
		if k.GetState() == api.KeysetState_ACTIVE {
			old = k.GetId()
		}
	}
	p, err := r.api.PrepareKeyset(ctx, &api.PrepareKeysetRequest{Scope: s})
	check(r.t, err)
	_, err = r.api.ActivateKeyset(ctx, &api.ActivateKeysetRequest{Scope: s, KeysetId: p.GetKeyset().GetId()})
	check(r.t, err)
	_, err = r.api.TaintKeyset(ctx, &api.TaintKeysetRequest{Scope: s, KeysetId: old})
	check(r.t, err)
	return old
}

func (r *running) keysets(deployment string) *api.ListKeysetsResponse {
	r.t.Helper()
	resp, err := r.api.ListKeysets(r.t.Context(), &api.ListKeysetsRequest{Scope: scope(deployment)})
	check(r.t, err)
	return resp
}

// occupied returns an address that is in use.
func occupied(t testing.TB) string {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	t.Cleanup(func() { lis.Close() })
	return lis.Addr().String()
}
