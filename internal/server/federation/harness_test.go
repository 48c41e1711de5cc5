package federation_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/test/bufconn"

	"github.com/renewd/renewd/internal/server/endpoint"
	"github.com/renewd/renewd/internal/server/federation"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/test/memory"
)

var (
	own     = spiffeid.RequireTrustDomainFromString("example.org")
	partner = spiffeid.RequireTrustDomainFromString("partner.example")
	other   = spiffeid.RequireTrustDomainFromString("other.example")
)

const minInterval = 66 * time.Second // a minute, and at most 10 % more

// world is a network in memory, in a synctest bubble, with a follower.
type world struct {
	t     *testing.T
	hosts map[string]*bufconn.Listener // by address
	web   *authority
	log   *lines

	mu       sync.Mutex
	dials    []dial
	bundles  map[spiffeid.TrustDomain]*spiffebundle.Bundle // published; nil: withdrawn
	outcomes []string                                      // of partner

	storage  *records
	follower *federation.Follower
	stop     func()
}

type dial struct {
	address string
	at      time.Time
}

func inWorld(t *testing.T, f func(w *world)) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, hosts: map[string]*bufconn.Listener{}, web: newAuthority(t), log: new(lines), storage: new(records), stop: func() {}}
		defer func() { w.stop() }()
		f(w)
	})
}

func (w *world) check(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) dial(ctx context.Context, _, address string) (net.Conn, error) {
	w.mu.Lock()
	w.dials = append(w.dials, dial{address, time.Now()})
	lis := w.hosts[address]
	w.mu.Unlock()
	if lis == nil {
		return nil, errors.New("connection refused")
	}
	return lis.DialContext(ctx)
}

// listen opens an address until the returned function is called.
func (w *world) listen(address string) (net.Listener, func()) {
	lis := bufconn.Listen(1 << 16)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.hosts[address] = lis
	return lis, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.hosts, address)
	}
}

// publish is the Publish function of the follower.
func (w *world) publish(td spiffeid.TrustDomain, b *spiffebundle.Bundle) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.bundles[td] = b
}

func (w *world) observe(td spiffeid.TrustDomain, outcome string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if td == partner {
		w.outcomes = append(w.outcomes, outcome)
	}
}

// open creates a follower of endpoints without running it.
func (w *world) open(endpoints ...federation.Endpoint) error {
	w.bundles = map[spiffeid.TrustDomain]*spiffebundle.Bundle{}
	var err error
	w.follower, err = federation.New(w.t.Context(), federation.Config{
		TrustDomain: own, Endpoints: endpoints, Storage: w.storage, Publish: w.publish, Observe: w.observe,
		Roots: w.web.pool(), Dial: w.dial, Log: slog.New(slog.NewTextHandler(w.log, nil)),
	})
	return err
}

// start stops the previous follower and runs another.
func (w *world) start(endpoints ...federation.Endpoint) {
	w.t.Helper()
	w.stop()
	w.check(w.open(endpoints...))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.follower.Run(ctx) }()
	w.stop = sync.OnceFunc(func() {
		cancel()
		w.check(<-done)
	})
	synctest.Wait()
}

// held returns the published bundle; nil when there is none.
func (w *world) held(td spiffeid.TrustDomain) *spiffebundle.Bundle {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.bundles[td]
}

// holds fails the test unless exactly these X.509 authorities are published.
func (w *world) holds(td spiffeid.TrustDomain, want ...*x509.Certificate) {
	w.t.Helper()
	var got []*x509.Certificate
	if b := w.held(td); b != nil {
		got = b.X509Authorities()
	}
	if !slices.EqualFunc(got, want, (*x509.Certificate).Equal) {
		w.t.Errorf("%d X.509 authorities of %s are published, want %d", len(got), td.Name(), len(want))
	}
}

// observed returns the outcomes for partner since the last call.
func (w *world) observed() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := strings.Join(w.outcomes, " ")
	w.outcomes = nil
	return out
}

// domain is a trust domain with a bundle endpoint.
type domain struct {
	*keyset.Deployment
	w    *world
	td   spiffeid.TrustDomain
	down func()
	hint time.Duration
}

func (w *world) domain(td spiffeid.TrustDomain) *domain {
	w.t.Helper()
	d := &domain{w: w, td: td, down: func() {}, hint: time.Minute}
	var err error
	d.Deployment, err = keyset.Open(w.t.Context(), keyset.Config{TrustDomain: td, Storage: new(memory.Keysets)})
	w.check(err)
	return d
}

func (d *domain) id() spiffeid.ID { return spiffeid.RequireFromPath(d.td, "/spire/server") }

func (d *domain) certificates() []*x509.Certificate { return d.Bundle().Certificates() }

// follow returns the domain's endpoint, with a file of its present bundle.
func (d *domain) follow() federation.Endpoint {
	return federation.Endpoint{TrustDomain: d.td, URL: "https://" + d.td.Name() + "/bundle", Profile: federation.ProfileSPIFFE, ID: d.id(), BundleFile: d.file()}
}

// file writes the domain's bundle to a file.
func (d *domain) file() string {
	path := d.w.t.TempDir() + "/bundle.pem"
	d.w.check(writeFile(path, d.Bundle().PEM()))
	return path
}

// certificate issues a certificate with the active keyset.
func (d *domain) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	key := newKey(d.w.t)
	svid, err := d.SignX509(d.id(), key.Public(), time.Hour)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{svid.DER}, PrivateKey: key}, nil
}

// rotate replaces the keyset, with all steps at once.
func (d *domain) rotate() {
	d.w.t.Helper()
	ctx, old := d.w.t.Context(), d.Active()
	next, err := d.Prepare(ctx)
	d.w.check(err)
	d.w.check(d.Activate(ctx, next.ID))
	d.w.check(d.Taint(ctx, old.ID))
	d.w.check(d.Remove(ctx, old.ID))
}

// up serves the bundle with profile https_spiffe.
func (d *domain) up() { d.serve(d.td, d.Bundle, d.certificate) }

// serve serves a trust domain's bundle at an address of its name.
func (d *domain) serve(of spiffeid.TrustDomain, bundle func() *keyset.Bundle, cert func(*tls.ClientHelloInfo) (*tls.Certificate, error)) {
	d.w.t.Helper()
	s, err := endpoint.New(endpoint.Config{TrustDomain: of, Bundle: bundle, RefreshHint: d.hint, Certificate: cert})
	d.w.check(err)
	lis, unlisten := d.w.listen(of.Name() + ":443")
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, lis) }()
	d.down = sync.OnceFunc(func() {
		unlisten()
		cancel()
		d.w.check(<-done)
	})
	d.w.t.Cleanup(d.down)
}

// handle serves a handler at an address.
func (w *world) handle(address string, cert func(*tls.ClientHelloInfo) (*tls.Certificate, error), h http.HandlerFunc) (down func()) {
	lis, unlisten := w.listen(address)
	srv := &http.Server{Handler: h, TLSConfig: &tls.Config{GetCertificate: cert}, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		srv.ServeTLS(lis, "", "")
	}()
	down = sync.OnceFunc(func() {
		unlisten()
		srv.Close()
		<-done
	})
	w.t.Cleanup(down)
	return down
}

// document returns a bundle in SPIFFE's format.
func document(td spiffeid.TrustDomain, sequence uint64, certs ...*x509.Certificate) []byte {
	b := spiffebundle.FromX509Authorities(td, certs)
	b.SetSequenceNumber(sequence)
	data, err := b.Marshal()
	if err != nil {
		panic(err)
	}
	return data
}

// authority is a CA of the web.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	a := &authority{t: t, key: newKey(t)}
	a.cert = a.sign(&x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, SubjectKeyId: []byte(rand.Text())}, a.key)
	return a
}

func (a *authority) sign(template *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	template.SerialNumber, template.Subject = big.NewInt(time.Now().UnixNano()), pkix.Name{CommonName: "web"}
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(10000*time.Hour)
	parent := a.cert
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert
}

func (a *authority) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool
}

// certificate issues a certificate for a host.
func (a *authority) certificate(host string) func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	key := newKey(a.t)
	cert := a.sign(&x509.Certificate{DNSNames: []string{host}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}, key)
	return func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		return &tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}, nil
	}
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// lines collects a log.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

// logged fails the test unless the log since the last call has exactly these lines, each
// with all of the texts that | separates.
func (w *world) logged(want ...string) {
	w.t.Helper()
	w.log.mu.Lock()
	defer w.log.mu.Unlock()
	var got []string
	if text := strings.TrimSpace(w.log.buf.String()); text != "" {
		got = strings.Split(text, "\n")
	}
	w.log.buf.Reset()
	ok := len(got) == len(want)
	for i := 0; ok && i < len(want); i++ {
		for word := range strings.SplitSeq(want[i], "|") {
			ok = ok && strings.Contains(got[i], word)
		}
	}
	if !ok {
		w.t.Errorf("the log has\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// records is a storage that survives a follower.
type records struct {
	mu      sync.Mutex
	records []federation.Record
	err     error
	saved   int
}

func (m *records) Federated(context.Context) ([]federation.Record, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.records), m.err
}

func (m *records) SaveFederated(_ context.Context, r federation.Record) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return m.err
	}
	m.saved++
	m.delete(r.TrustDomain)
	m.records = append(m.records, r)
	return nil
}

func (m *records) ForgetFederated(_ context.Context, td spiffeid.TrustDomain) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.delete(td)
	return m.err
}

func (m *records) delete(td spiffeid.TrustDomain) {
	m.records = slices.DeleteFunc(m.records, func(r federation.Record) bool { return r.TrustDomain == td })
}

// fail makes all methods fail with err, or none when it is nil.
func (m *records) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.err = err
}

func authorityID(cert *x509.Certificate) string { return fmt.Sprintf("%x", cert.SubjectKeyId) }
