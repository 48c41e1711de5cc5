package spireapi_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

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
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/test/memory"
)

var (
	td       = spiffeid.RequireTrustDomainFromString("example.org")
	serverID = spiffeid.RequireFromPath(td, "/spire/server")
)

// running is a server that answers on a listener until the test ends.
type running struct {
	*spireapi.Server
	lis  *listener
	stop func() // ends Serve and waits for it
}

// listener counts the connections that it accepts.
type listener struct {
	*bufconn.Listener
	from     net.Addr // their remote address, if not nil
	accepted atomic.Int64
}

func (l *listener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.accepted.Add(1)
	if l.from != nil {
		conn = &connFrom{conn, l.from}
	}
	return conn, nil
}

// connFrom is a connection with a given remote address.
type connFrom struct {
	net.Conn
	from net.Addr
}

func (c *connFrom) RemoteAddr() net.Addr { return c.from }

// bubble runs f with a server in its own synctest bubble. A goroutine that is left
// over fails the test.
func bubble(t *testing.T, c spireapi.Config, f func(t *testing.T, s *running)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { f(t, start(t, c)) })
}

func start(t testing.TB, c spireapi.Config) *running {
	t.Helper()
	return serve(t, newServer(t, c))
}

// newServer makes a server. What c does not have is in memory.
func newServer(t testing.TB, c spireapi.Config) *spireapi.Server {
	t.Helper()
	c.TrustDomain = td
	if c.Keysets == nil {
		var err error
		c.Keysets, err = keyset.Open(t.Context(), keyset.Config{TrustDomain: td, Storage: new(memory.Keysets), Now: c.Now})
		check(t, err)
	}
	if c.Storage == nil {
		c.Storage = memory.NewServer()
	}
	if c.Ledger == nil {
		c.Ledger = newFakeLedger()
	}
	s, err := spireapi.New(c)
	check(t, err)
	return s
}

func serve(t testing.TB, s *spireapi.Server) *running {
	t.Helper()
	return serveOn(t, s, &listener{Listener: bufconn.Listen(1 << 20)})
}

func serveOn(t testing.TB, s *spireapi.Server, lis *listener) *running {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, lis) }()
	r := &running{Server: s, lis: lis, stop: sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})}
	t.Cleanup(r.stop)
	return r
}

// identity is an agent's SVID and key.
type identity struct {
	id    spiffeid.ID
	chain []*x509.Certificate
	key   crypto.Signer
}

// client is a connection with all the services on it.
type client struct {
	*grpc.ClientConn
	agentv1.AgentClient
	bundlev1.BundleClient
	entryv1.EntryClient
	svidv1.SVIDClient
}

// dial connects, authenticating the server by its SPIFFE ID; who may be nil.
func (r *running) dial(t testing.TB, caller *identity) *client {
	t.Helper()
	authorities := x509bundle.FromX509Authorities(td, r.Keysets().Bundle().Certificates())
	config := tlsconfig.TLSClientConfig(authorities, tlsconfig.AuthorizeID(serverID))
	config.MinVersion = tls.VersionTLS12
	if caller != nil {
		svid := &x509svid.SVID{ID: caller.id, Certificates: caller.chain, PrivateKey: caller.key}
		config = tlsconfig.MTLSClientConfig(svid, authorities, tlsconfig.AuthorizeID(serverID))
	}
	return r.dialTLS(t, credentials.NewTLS(config))
}

func (r *running) dialTLS(t testing.TB, creds credentials.TransportCredentials) *client {
	t.Helper()
	if creds == nil {
		creds = insecure.NewCredentials()
	}
	conn, err := grpc.NewClient("passthrough:///server", grpc.WithTransportCredentials(creds),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return r.lis.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return &client{
		conn, agentv1.NewAgentClient(conn), bundlev1.NewBundleClient(conn),
		entryv1.NewEntryClient(conn), svidv1.NewSVIDClient(conn),
	}
}

// newKey makes a key and a CSR for it.
func newKey(t testing.TB) (crypto.Signer, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return key, csr
}

// attest sends one attestation and returns the answer.
func (c *client) attest(ctx context.Context, kind, payload string, csr []byte) (*types.X509SVID, error) {
	stream, err := c.AttestAgent(ctx)
	if err != nil {
		return nil, err
	}
	err = stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{
		Params: &agentv1.AttestAgentRequest_Params{
			Data:   &types.AttestationData{Type: kind, Payload: []byte(payload)},
			Params: &agentv1.AgentX509SVIDParams{Csr: csr},
		},
	}})
	if err != nil {
		return nil, err
	}
	resp, err := stream.Recv()
	if err != nil {
		return nil, err
	}
	if resp.GetResult() == nil {
		return nil, errors.New("no result in the answer")
	}
	return resp.GetResult().GetSvid(), nil
}

// token makes a join token that is valid for one minute.
func (r *running) token(t testing.TB) string {
	t.Helper()
	token, err := r.CreateJoinToken(t.Context(), time.Minute, "")
	if err != nil {
		t.Fatal(err)
	}
	return token.Value
}

// apply replaces all entries.
func (r *running) apply(t testing.TB, entries []spireapi.Entry) spireapi.Diff {
	t.Helper()
	diff, err := r.ApplyEntries(t.Context(), entries, false)
	if err != nil {
		t.Fatal(err)
	}
	return diff
}

// join attests a new agent and returns its identity and a connection that uses it.
func (r *running) join(t testing.TB) (*identity, *client) {
	t.Helper()
	token := r.token(t)
	key, csr := newKey(t)
	svid, err := r.dial(t, nil).attest(t.Context(), "join_token", token, csr)
	if err != nil {
		t.Fatal(err)
	}
	caller := newIdentity(t, svid, key)
	return caller, r.dial(t, caller)
}

func newIdentity(t testing.TB, svid *types.X509SVID, key crypto.Signer) *identity {
	t.Helper()
	caller := &identity{id: spiffeid.RequireFromPath(td, svid.GetId().GetPath()), key: key}
	for _, der := range svid.GetCertChain() {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		caller.chain = append(caller.chain, cert)
	}
	return caller
}

// wantCode fails the test unless err has the code and, if one is given, the reason.
func wantCode(t *testing.T, err error, code codes.Code, reason ...types.PermissionDeniedDetails_Reason) {
	t.Helper()
	st := status.Convert(err)
	if st.Code() != code {
		t.Fatalf("got %v, want code %v", err, code)
	}
	for _, want := range reason {
		for _, d := range st.Details() {
			if p, ok := d.(*types.PermissionDeniedDetails); ok && p.GetReason() == want {
				return
			}
		}
		t.Fatalf("details are %v, want reason %v", st.Details(), want)
	}
}

func entry(id string, change ...func(*spireapi.Entry)) spireapi.Entry {
	e := spireapi.Entry{
		ID: id, SPIFFEID: spiffeid.RequireFromPath(td, "/workload/"+id),
		Selectors: []spireapi.Selector{{Type: "unix", Value: "uid:1000"}},
	}
	for _, f := range change {
		f(&e)
	}
	return e
}

// check fails the test if err is not nil.
func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
