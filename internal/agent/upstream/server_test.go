package upstream_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/api"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// authority is a CA of the tests.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

var serials struct {
	sync.Mutex
	last int64
}

func serial() *big.Int {
	serials.Lock()
	defer serials.Unlock()
	serials.last++
	return big.NewInt(serials.last)
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	sn := serial()
	tmpl := &x509.Certificate{
		SerialNumber: sn, Subject: pkix.Name{CommonName: fmt.Sprintf("authority %d", sn)},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(90 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs: []*url.URL{td.ID().URL()}, SubjectKeyId: sn.Bytes(),
	}
	der := must(x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key))
	return &authority{must(x509.ParseCertificate(der)), key}
}

// sign makes an SVID; edit may change it.
func (a *authority) sign(id string, pub crypto.PublicKey, ttl time.Duration, edit ...func(*x509.Certificate)) []byte {
	tmpl := &x509.Certificate{
		SerialNumber: serial(), NotBefore: time.Now().Add(-10 * time.Second), NotAfter: time.Now().Add(ttl),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs:        []*url.URL{spiffeid.RequireFromString(id).URL()}, BasicConstraintsValid: true,
	}
	for _, e := range edit {
		e(tmpl)
	}
	return must(x509.CreateCertificate(rand.Reader, tmpl, a.cert, pub, a.key))
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

const (
	serverID = "spiffe://example.org/spire/server"
	agentID  = "spiffe://example.org/spire/agent/join_token/t"
)

// server serves the SPIRE Server API over bufconn with TLS. It treats agent SVIDs as
// SPIRE does: one serial number is active, and that of a renewed SVID becomes active
// at its first use.
type server struct {
	agentv1.UnimplementedAgentServer
	bundlev1.UnimplementedBundleServer
	entryv1.UnimplementedEntryServer
	svidv1.UnimplementedSVIDServer

	t       testing.TB
	ca      *authority
	id      string // the ID it presents
	options []grpc.ServerOption

	mu           sync.Mutex
	listener     *bufconn.Listener
	grpc         *grpc.Server
	tokens       map[string]bool
	active, next string // serial numbers
	banned       bool
	conns        int
	ttl          time.Duration
	roots        []*types.X509Certificate
	keys         []*types.JWTKey
	federated    *types.Bundle // of other.org
	entries      []*types.Entry
	page         int
	asked        [][]string // IDs of each request for full entries
	calls        map[string]int
	reattestable bool
	lacksSync    bool
	plain        bool // it speaks no TLS
	corruptSVID  func(*x509.Certificate)
	fleet        *fleet // nil: the server takes no reports

	// hook, when set, is called at the start of each call that was admitted.
	hook func(ctx context.Context, method string) error
	// sync, when set, replaces SyncAuthorizedEntries, and mint BatchNewX509SVID.
	sync func(entryv1.Entry_SyncAuthorizedEntriesServer) error
	mint func(*svidv1.BatchNewX509SVIDRequest) *svidv1.BatchNewX509SVIDResponse
}

func newServer(t testing.TB, options ...grpc.ServerOption) *server {
	ca := newAuthority(t)
	s := &server{
		t: t, ca: ca, id: serverID, options: options, ttl: time.Hour, page: 500,
		tokens: map[string]bool{"t": true}, calls: make(map[string]int),
		roots: []*types.X509Certificate{{Asn1: ca.cert.Raw}},
	}
	s.start()
	t.Cleanup(s.stop)
	return s
}

func (s *server) start() {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	cert := tls.Certificate{PrivateKey: key, Certificate: [][]byte{s.ca.sign(s.id, key.Public(), 24*time.Hour)}}
	creds := credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequestClientCert, VerifyConnection: inTime})
	if s.plain {
		creds = insecure.NewCredentials()
	}
	g := grpc.NewServer(append([]grpc.ServerOption{
		grpc.Creds(creds),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			if err := s.admit(ctx, info.FullMethod); err != nil {
				return nil, err
			}
			return h(ctx, req)
		}),
		grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, h grpc.StreamHandler) error {
			if err := s.admit(ss.Context(), info.FullMethod); err != nil {
				return err
			}
			return h(srv, ss)
		}),
	}, s.options...)...)
	agentv1.RegisterAgentServer(g, s)
	bundlev1.RegisterBundleServer(g, s)
	entryv1.RegisterEntryServer(g, s)
	svidv1.RegisterSVIDServer(g, s)
	if s.fleet != nil {
		api.RegisterFleetServer(g, s.fleet)
	}
	l := bufconn.Listen(1 << 16)
	s.mu.Lock()
	s.grpc, s.listener = g, l
	s.mu.Unlock()
	go g.Serve(l)
}

// inTime rejects a client certificate that is not valid now by the server's clock, as
// a SPIRE server does.
func inTime(cs tls.ConnectionState) error {
	for _, c := range cs.PeerCertificates {
		if now := time.Now(); now.Before(c.NotBefore) || now.After(c.NotAfter) {
			return fmt.Errorf("client certificate is from %v to %v", c.NotBefore, c.NotAfter)
		}
	}
	return nil
}

// stop stops the server and returns when its clients have noticed. Otherwise the
// next call could use the old connection and fail.
func (s *server) stop() {
	s.mu.Lock()
	g := s.grpc
	s.mu.Unlock()
	g.Stop()
	synctest.Wait()
}

func (s *server) dial(ctx context.Context, _ string) (net.Conn, error) {
	s.mu.Lock()
	l := s.listener
	s.conns++
	s.mu.Unlock()
	return l.DialContext(ctx)
}

// locked runs f under the server's lock.
func (s *server) locked(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

func (s *server) count(method string) (n int) {
	s.locked(func() { n = s.calls[method] })
	return n
}

func clientCert(ctx context.Context) *x509.Certificate {
	p, _ := peer.FromContext(ctx)
	if certs := p.AuthInfo.(credentials.TLSInfo).State.PeerCertificates; len(certs) > 0 {
		return certs[0]
	}
	return nil
}

func denied(reason types.PermissionDeniedDetails_Reason) error {
	st := must(status.New(codes.PermissionDenied, "denied: "+reason.String()).WithDetails(&types.PermissionDeniedDetails{Reason: reason}))
	return st.Err()
}

func (s *server) admit(ctx context.Context, method string) error {
	method = method[len(method)-lastPart(method):]
	err := func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.calls[method]++
		if method == "AttestAgent" || method == "GetBundle" {
			return nil
		}
		cert := clientCert(ctx)
		if cert == nil {
			return status.Error(codes.PermissionDenied, "no identity")
		}
		switch sn := cert.SerialNumber.String(); {
		case s.banned:
			return denied(types.PermissionDeniedDetails_AGENT_BANNED)
		case s.active == "":
			return denied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
		case sn == s.next:
			s.active, s.next = sn, ""
		case sn != s.active:
			return denied(types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
		}
		return nil
	}()
	if err == nil && s.hook != nil {
		err = s.hook(ctx, method)
	}
	return err
}

func lastPart(method string) int {
	for i := len(method) - 1; i >= 0; i-- {
		if method[i] == '/' {
			return len(method) - 1 - i
		}
	}
	return len(method)
}

func (s *server) AttestAgent(stream agentv1.Agent_AttestAgentServer) error {
	req, err := stream.Recv()
	if err != nil {
		return err
	}
	csr := must(x509.ParseCertificateRequest(req.GetParams().GetParams().GetCsr()))
	s.mu.Lock()
	defer s.mu.Unlock()
	token := string(req.GetParams().GetData().GetPayload())
	if !s.tokens[token] {
		return status.Error(codes.InvalidArgument, "join token does not exist or has already been used")
	}
	if !s.reattestable {
		delete(s.tokens, token)
	}
	der := s.signAgent(csr.PublicKey)
	s.active, s.next = serialOf(der), ""
	return stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Result_{Result: &agentv1.AttestAgentResponse_Result{
		Svid: &types.X509SVID{CertChain: [][]byte{der}}, Reattestable: s.reattestable,
	}}})
}

func (s *server) signAgent(pub crypto.PublicKey) []byte {
	if s.corruptSVID != nil {
		return s.ca.sign(agentID, pub, s.ttl, s.corruptSVID)
	}
	return s.ca.sign(agentID, pub, s.ttl)
}

func serialOf(der []byte) string { return must(x509.ParseCertificate(der)).SerialNumber.String() }

func (s *server) RenewAgent(_ context.Context, req *agentv1.RenewAgentRequest) (*agentv1.RenewAgentResponse, error) {
	csr := must(x509.ParseCertificateRequest(req.GetParams().GetCsr()))
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.reattestable {
		return nil, denied(types.PermissionDeniedDetails_AGENT_MUST_REATTEST)
	}
	der := s.signAgent(csr.PublicKey)
	s.next = serialOf(der)
	return &agentv1.RenewAgentResponse{Svid: &types.X509SVID{CertChain: [][]byte{der}}}, nil
}

func (s *server) PostStatus(context.Context, *agentv1.PostStatusRequest) (*agentv1.PostStatusResponse, error) {
	return &agentv1.PostStatusResponse{}, nil
}

func (s *server) GetBundle(context.Context, *bundlev1.GetBundleRequest) (*types.Bundle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &types.Bundle{TrustDomain: td.Name(), X509Authorities: slices.Clone(s.roots), JwtAuthorities: slices.Clone(s.keys), SequenceNumber: 1, RefreshHint: 60}, nil
}

func (s *server) GetFederatedBundle(_ context.Context, req *bundlev1.GetFederatedBundleRequest) (*types.Bundle, error) {
	if req.GetTrustDomain() != "other.org" {
		return nil, status.Error(codes.NotFound, "bundle not found")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.federated != nil {
		return s.federated, nil
	}
	return &types.Bundle{TrustDomain: "other.org", X509Authorities: []*types.X509Certificate{{Asn1: s.ca.cert.Raw}}}, nil
}

func (s *server) GetAuthorizedEntries(context.Context, *entryv1.GetAuthorizedEntriesRequest) (*entryv1.GetAuthorizedEntriesResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &entryv1.GetAuthorizedEntriesResponse{Entries: slices.Clone(s.entries)}, nil
}

func (s *server) SyncAuthorizedEntries(stream entryv1.Entry_SyncAuthorizedEntriesServer) error {
	if s.lacksSync {
		return status.Error(codes.Unimplemented, "unknown method")
	}
	req, err := stream.Recv()
	if err != nil {
		return err
	}
	if len(req.GetIds()) > 0 || !req.GetOutputMask().GetRevisionNumber() {
		return status.Error(codes.InvalidArgument, "bad first request")
	}
	if s.sync != nil {
		return s.sync(stream)
	}
	s.mu.Lock()
	entries := slices.Clone(s.entries)
	s.mu.Unlock()
	if len(entries) <= s.page {
		return stream.Send(&entryv1.SyncAuthorizedEntriesResponse{Entries: entries})
	}
	byID := make(map[string]*types.Entry)
	for page := range slices.Chunk(entries, s.page) {
		out := &entryv1.SyncAuthorizedEntriesResponse{More: page[len(page)-1] != entries[len(entries)-1]}
		for _, e := range page {
			byID[e.Id] = e
			out.EntryRevisions = append(out.EntryRevisions, &entryv1.EntryRevision{Id: e.Id, RevisionNumber: e.RevisionNumber, CreatedAt: e.CreatedAt})
		}
		if err := stream.Send(out); err != nil {
			return err
		}
	}
	for {
		req, err := stream.Recv()
		if err != nil {
			return nil
		}
		s.locked(func() { s.asked = append(s.asked, req.GetIds()) })
		out := &entryv1.SyncAuthorizedEntriesResponse{}
		for _, id := range req.GetIds() {
			if e := byID[id]; e != nil {
				out.Entries = append(out.Entries, e)
			}
		}
		if err := stream.Send(out); err != nil {
			return err
		}
	}
}

func (s *server) BatchNewX509SVID(_ context.Context, req *svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error) {
	if s.mint != nil {
		return s.mint(req), nil
	}
	out := &svidv1.BatchNewX509SVIDResponse{}
	for _, p := range req.GetParams() {
		csr, err := x509.ParseCertificateRequest(p.GetCsr())
		if err != nil {
			out.Results = append(out.Results, &svidv1.BatchNewX509SVIDResponse_Result{Status: &types.Status{Code: int32(codes.InvalidArgument), Message: "malformed CSR"}})
			continue
		}
		der := s.ca.sign("spiffe://example.org/"+p.GetEntryId(), csr.PublicKey, s.ttl)
		out.Results = append(out.Results, &svidv1.BatchNewX509SVIDResponse_Result{Status: &types.Status{}, Svid: &types.X509SVID{CertChain: [][]byte{der}}})
	}
	return out, nil
}

func (s *server) NewJWTSVID(_ context.Context, req *svidv1.NewJWTSVIDRequest) (*svidv1.NewJWTSVIDResponse, error) {
	return &svidv1.NewJWTSVIDResponse{Svid: &types.JWTSVID{Token: "token for " + req.GetEntryId()}}, nil
}

// trust is the bundle that an operator would configure for the agent.
func (s *server) trust() *bundle.Bundle {
	s.mu.Lock()
	defer s.mu.Unlock()
	var c bundle.Content
	for _, r := range s.roots {
		c.X509 = append(c.X509, bundle.X509Authority{Certificate: must(x509.ParseCertificate(r.Asn1))})
	}
	return must(bundle.New(td, c))
}

func entry(i int) *types.Entry {
	return &types.Entry{
		Id: fmt.Sprintf("e%05d", i), SpiffeId: &types.SPIFFEID{TrustDomain: td.Name(), Path: fmt.Sprintf("/w/%d", i)},
		Selectors: []*types.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", i)}}, CreatedAt: 1000, RevisionNumber: 1,
	}
}

func entries(n int) []*types.Entry {
	out := make([]*types.Entry, n)
	for i := range out {
		out[i] = entry(i)
	}
	return out
}

// maxConnectionAge closes connections after 3 minutes as a SPIRE server does.
var maxConnectionAge = grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: 3 * time.Minute})
