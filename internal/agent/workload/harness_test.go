package workload

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/attest"
)

var (
	td      = spiffeid.RequireTrustDomainFromString("example.org")
	otherTD = spiffeid.RequireTrustDomainFromString("other.example")
)

// authority is a signing authority of a trust domain.
type authority struct {
	td     spiffeid.TrustDomain
	cert   *x509.Certificate
	key    *ecdsa.PrivateKey
	jwtKey *ecdsa.PrivateKey
	kid    string
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newAuthority(t testing.TB, td spiffeid.TrustDomain, name string) *authority {
	t.Helper()
	a := &authority{td: td, key: newKey(t), jwtKey: newKey(t), kid: "jwt-" + name}
	tmpl := &x509.Certificate{
		SerialNumber:          big.NewInt(time.Now().UnixNano()),
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(90 * 24 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
		URIs:                  []*url.URL{td.ID().URL()},
	}
	a.cert = sign(t, tmpl, tmpl, a.key.Public(), a.key)
	return a
}

func sign(t testing.TB, tmpl, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// svid mints an X.509-SVID for the entry.
func (a *authority) svid(t testing.TB, e *cache.Entry, ttl time.Duration) *cache.SVID {
	t.Helper()
	key := newKey(t)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		NotBefore:    time.Now().Add(-10 * time.Second),
		NotAfter:     time.Now().Add(ttl),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs:         []*url.URL{e.SPIFFEID.URL()},
	}
	cert := sign(t, tmpl, a.cert, key.Public(), a.key)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return &cache.SVID{
		ID: e.SPIFFEID, EntryID: e.ID, Revision: e.Revision, Created: e.CreatedAt, Leaf: cert.Raw, Key: der,
		Authority: bundle.AuthorityID(a.cert), NotBefore: cert.NotBefore, NotAfter: cert.NotAfter,
		RenewAt: cert.NotBefore.Add(ttl / 2),
	}
}

// token mints a JWT-SVID.
func (a *authority) token(t testing.TB, sub string, audience []string, ttl time.Duration, extra map[string]any) string {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: a.jwtKey, KeyID: a.kid}},
		(&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		t.Fatal(err)
	}
	claims := map[string]any{"sub": sub, "aud": audience, "iat": time.Now().Unix(), "exp": time.Now().Add(ttl).Unix()}
	for k, v := range extra {
		claims[k] = v
	}
	token, err := jwt.Signed(signer).Claims(claims).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func bundleOf(t testing.TB, td spiffeid.TrustDomain, sequence uint64, authorities ...*authority) *bundle.Bundle {
	t.Helper()
	c := bundle.Content{Sequence: sequence}
	for _, a := range authorities {
		c.X509 = append(c.X509, bundle.X509Authority{Certificate: a.cert})
		c.JWT = append(c.JWT, bundle.JWTAuthority{KeyID: a.kid, PublicKey: a.jwtKey.Public()})
	}
	b, err := bundle.New(td, c)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func entry(id, path string, uid uint32) *cache.Entry {
	return &cache.Entry{
		ID:        id,
		SPIFFEID:  spiffeid.RequireFromPath(td, path),
		Selectors: []cache.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", uid)}},
		CreatedAt: time.Unix(1, 0),
	}
}

// byUID attests callers by the user ID alone.
type byUID struct {
	err func() error
}

func (byUID) Name() string { return "unix" }

func (a byUID) Attest(_ context.Context, p *attest.Peer) ([]cache.Selector, error) {
	if a.err != nil {
		if err := a.err(); err != nil {
			return nil, err
		}
	}
	return []cache.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", p.UID())}}, nil
}

// system is a server with its cache, reached over connections in memory, so
// that it lives in a bubble.
type system struct {
	t     testing.TB
	cache *cache.Cache
	ca    *authority
	lis   *listener
	logs  *logs
	obs   *counts
	stop  func() // ends Serve and waits for it
	err   error  // of Serve
}

// newSystem starts a server whose cache has a bundle and no entries.
func newSystem(t testing.TB, change func(*Config)) *system {
	t.Helper()
	s := &system{
		t: t, ca: newAuthority(t, td, "a"), cache: cache.New(cache.Config{}), lis: newListener(),
		logs: &logs{}, obs: &counts{open: map[string]int{}, attested: map[string]int{}},
	}
	s.cache.SetBundle(&bundle.Snapshot{Own: bundleOf(t, td, 1, s.ca)})
	cfg := Config{
		Cache:     s.cache,
		Attestors: []attest.Attestor{byUID{}}, LogSelectors: []string{"unix"},
		Log:      slog.New(s.logs),
		Observer: s.obs,
		Peers: func(c net.Conn) (*attest.Peer, error) {
			return attest.FromPID(os.Getpid(), c.(*uidConn).uid, 0)
		},
	}
	if change != nil {
		change(&cfg)
	}
	srv, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var done sync.WaitGroup
	done.Go(func() { s.err = srv.Serve(ctx, s.lis) })
	s.stop = func() { cancel(); done.Wait() }
	t.Cleanup(s.stop)
	return s
}

// add registers entries and gives each an SVID.
func (s *system) add(entries ...*cache.Entry) {
	s.t.Helper()
	s.cache.Update(entries, nil)
	for _, e := range entries {
		s.put(e)
	}
}

func (s *system) put(e *cache.Entry) *cache.SVID {
	s.t.Helper()
	svid := s.ca.svid(s.t, e, time.Hour)
	if err := s.cache.Put(svid); err != nil {
		s.t.Fatal(err)
	}
	return svid
}

// client connects as a process of the user.
func (s *system) client(uid uint32) workloadpb.SpiffeWorkloadAPIClient {
	s.t.Helper()
	cc, err := grpc.NewClient("passthrough:///bufconn", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return s.lis.dial(ctx, uid) }),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { cc.Close() })
	return workloadpb.NewSpiffeWorkloadAPIClient(cc)
}

// withHeader is the context of a well-behaved client.
func withHeader(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

// answer is one answer of a stream, and its time.
type answer[T any] struct {
	msg *T
	at  time.Time
	err error
}

// receive reads a stream to its end. The channel never blocks the reader.
func receive[T any](stream grpc.ServerStreamingClient[T], err error) <-chan answer[T] {
	out := make(chan answer[T], 10_000)
	go func() {
		defer close(out)
		for {
			if err != nil {
				out <- answer[T]{err: err, at: time.Now()}
				return
			}
			var msg *T
			if msg, err = stream.Recv(); err == nil {
				out <- answer[T]{msg: msg, at: time.Now()}
			}
		}
	}()
	return out
}

// listener accepts connections in memory that know their user.
type listener struct {
	conns chan net.Conn
	done  chan struct{}
	close func()
}

type uidConn struct {
	net.Conn
	uid uint32
}

func newListener() *listener {
	l := &listener{conns: make(chan net.Conn), done: make(chan struct{})}
	l.close = sync.OnceFunc(func() { close(l.done) })
	return l
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error   { l.close(); return nil }
func (l *listener) Addr() net.Addr { return &net.UnixAddr{Name: "memory", Net: "unix"} }

func (l *listener) dial(ctx context.Context, uid uint32) (net.Conn, error) {
	pair := bufconn.Listen(256 << 10)
	defer pair.Close()
	type result struct {
		c   net.Conn
		err error
	}
	accepted := make(chan result, 1)
	go func() {
		c, err := pair.Accept()
		accepted <- result{c, err}
	}()
	client, err := pair.DialContext(ctx)
	if err != nil {
		return nil, err
	}
	server := <-accepted
	if server.err != nil {
		return nil, server.err
	}
	select {
	case l.conns <- &uidConn{server.c, uid}:
		return client, nil
	case <-l.done:
		return nil, errors.New("refused")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// logs keeps the log records.
type logs struct {
	mu      sync.Mutex
	records []slog.Record
}

func (l *logs) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelInfo }
func (l *logs) WithAttrs([]slog.Attr) slog.Handler               { return l }
func (l *logs) WithGroup(string) slog.Handler                    { return l }
func (l *logs) Handle(_ context.Context, r slog.Record) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.records = append(l.records, r)
	return nil
}

// attrs returns the attributes of each record with the message prefix.
func (l *logs) attrs(prefix string) []map[string]string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []map[string]string
	for _, r := range l.records {
		if len(r.Message) < len(prefix) || r.Message[:len(prefix)] != prefix {
			continue
		}
		m := map[string]string{}
		r.Attrs(func(a slog.Attr) bool { m[a.Key] = a.Value.Resolve().String(); return true })
		out = append(out, m)
	}
	return out
}

// counts is an Observer.
type counts struct {
	mu       sync.Mutex
	open     map[string]int
	oversize int
	mints    []error
	attested map[string]int // by attestor and error
}

func (c *counts) StreamOpened(m string) { c.mu.Lock(); c.open[m]++; c.mu.Unlock() }
func (c *counts) StreamClosed(m string) { c.mu.Lock(); c.open[m]--; c.mu.Unlock() }
func (c *counts) OversizeAnswer(string) { c.mu.Lock(); c.oversize++; c.mu.Unlock() }
func (c *counts) Attested(attestor string, _ time.Duration, err error) {
	c.mu.Lock()
	c.attested[fmt.Sprint(attestor, " ", err)]++
	c.mu.Unlock()
}
func (c *counts) JWTMinted(_ time.Duration, err error) {
	c.mu.Lock()
	c.mints = append(c.mints, err)
	c.mu.Unlock()
}

func (c *counts) streams(m string) int { c.mu.Lock(); defer c.mu.Unlock(); return c.open[m] }
func (c *counts) minted() int          { c.mu.Lock(); defer c.mu.Unlock(); return len(c.mints) }
