package admin_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/test/bufconn"

	"github.com/renewd/renewd/internal/operator/renewd"
	"github.com/renewd/renewd/internal/server/admin"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/test/memory"
)

var (
	td       = spiffeid.RequireTrustDomainFromString("example.org")
	serverID = spiffeid.RequireFromPath(td, "/spire/server")
	boss     = spiffeid.RequireFromPath(td, "/ops/boss")
	viewer   = spiffeid.RequireFromPath(td, "/ops/viewer")
	workload = spiffeid.RequireFromPath(td, "/web")
)

// world is the signing side of a trust domain, without a listener.
type world struct {
	*admin.Service
	deployments map[string]*deployment
	names       []string
	log         *records
	copied      func(ctx context.Context, w io.Writer) (int64, error) // the backup; nil: a few bytes
	received    func(actor string, sentAt time.Time)
}

func (w *world) backup(ctx context.Context, to io.Writer) (int64, error) {
	if w.copied != nil {
		return w.copied(ctx, to)
	}
	n, err := to.Write([]byte("a few bytes"))
	return int64(n), err
}

type deployment struct {
	keysets *keyset.Deployment
	server  *spireapi.Server
	ledger  *ledger.Ledger
	kept    *memory.Server
	storage *storage
	rows    *rows
}

// newWorld returns a trust domain with deployments of these names. boss is a manager, viewer
// a reader.
func newWorld(t testing.TB, names ...string) *world {
	t.Helper()
	return newWorldFor(t, []string{boss.String()}, []string{viewer.String()}, names...)
}

func newWorldFor(t testing.TB, managers, readers []string, names ...string) *world {
	t.Helper()
	w := &world{deployments: make(map[string]*deployment), names: names, log: new(records), received: func(string, time.Time) {}}
	if len(names) == 0 {
		w.names = []string{"default"}
	}
	rules, err := admin.ParseRules(td, managers, readers)
	check(t, err)
	c := admin.Config{
		TrustDomain: td, Rules: rules, Published: w.published, Backup: w.backup, Log: slog.New(slog.NewJSONHandler(w.log, nil)),
		Heard:       func(actor string, sentAt time.Time) { w.received(actor, sentAt) },
		Certificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) { return w.only().certificate(hello) },
	}
	for _, name := range w.names {
		d := &deployment{kept: memory.NewServer(), storage: new(storage), rows: new(rows)}
		d.keysets, err = keyset.Open(t.Context(), keyset.Config{TrustDomain: td, Name: name, Storage: d.storage})
		check(t, err)
		d.ledger, err = ledger.Open(t.Context(), ledger.Config{Storage: d.rows})
		check(t, err)
		d.server, err = spireapi.New(spireapi.Config{TrustDomain: td, Keysets: d.keysets, Published: w.published, Storage: d.kept, Ledger: d.ledger})
		check(t, err)
		w.deployments[name] = d
		c.Deployments = append(c.Deployments, admin.Deployment{
			Name: name, Keysets: d.keysets, Server: d.server, Ledger: d.ledger, Audit: d.storage.audit,
		})
	}
	w.Service, err = admin.New(c)
	check(t, err)
	return w
}

func (w *world) published() *keyset.Bundle {
	var all []*keyset.Bundle
	for _, name := range w.names {
		all = append(all, w.deployments[name].keysets.Bundle())
	}
	return keyset.Union(all...)
}

// GetX509BundleForTrustDomain returns the published authorities.
func (w *world) GetX509BundleForTrustDomain(spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	return x509bundle.FromX509Authorities(td, w.published().Certificates()), nil
}

// only returns the first deployment.
func (w *world) only() *deployment { return w.deployments[w.names[0]] }

func (d *deployment) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return d.server.Certificate()
}

// storage stores keysets and an audit log in memory. Its hooks can hang or fail.
type storage struct {
	memory.Keysets
	mu  sync.Mutex
	log []admin.AuditRecord
	// before is called before a change is stored, after when it is stored.
	before, after func(context.Context) error
}

func (s *storage) hooks(before, after func(context.Context) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.before, s.after = before, after
}

func (s *storage) Save(ctx context.Context, d keyset.Document, c keyset.Change) error {
	s.mu.Lock()
	before, after := s.before, s.after
	s.mu.Unlock()
	if before != nil {
		if err := before(ctx); err != nil {
			return err
		}
	}
	if err := s.Keysets.Save(ctx, d, c); err != nil {
		return err
	}
	s.mu.Lock()
	s.log = append(s.log, admin.AuditRecord{Number: d.Version, Change: c})
	s.mu.Unlock()
	if after != nil {
		return after(ctx)
	}
	return nil
}

func (s *storage) audit(_ context.Context, after uint64, limit int) ([]admin.AuditRecord, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := s.log[min(after, uint64(len(s.log))):]
	return slices.Clone(all[:min(limit, len(all))]), nil
}

func (s *storage) records() []admin.AuditRecord {
	all, _ := s.audit(context.Background(), 0, 1e6) // it never fails
	return all
}

// rows is a ledger's storage that counts its rows.
type rows struct {
	mu  sync.Mutex
	all map[[3]string]bool
}

func (*rows) LoadLedger(context.Context, func(ledger.Row)) (map[string]time.Time, error) {
	return nil, nil
}

func (r *rows) SaveLedger(ctx context.Context, c ledger.Change) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.all == nil {
		r.all = make(map[[3]string]bool)
	}
	for _, p := range c.Put {
		r.all[[3]string{p.Authority, p.Agent, p.Entry}] = true
	}
	for _, g := range c.Gone {
		delete(r.all, [3]string{g.Authority, g.Agent, g.Entry})
	}
	return nil
}

func (r *rows) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.all)
}

// records is a log of JSON lines that tests can read.
type records struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (r *records) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.buf.Write(p)
}

// lines returns the records whose message has this prefix, and clears the log.
func (r *records) lines(t testing.TB, begin string) (out []map[string]any) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	for line := range strings.Lines(r.buf.String()) {
		var rec map[string]any
		check(t, json.Unmarshal([]byte(line), &rec))
		if strings.HasPrefix(rec["msg"].(string), begin) {
			out = append(out, rec)
		}
	}
	r.buf.Reset()
	return out
}

// remote serves operators over mTLS; it works in a synctest bubble.
type remote struct {
	lis  dialer
	stop func() error // ends serving and waits
}

// dialer is an in-memory listener.
type dialer interface {
	net.Listener
	DialContext(ctx context.Context) (net.Conn, error)
}

func (w *world) serveTLS(t testing.TB) *remote {
	t.Helper()
	return w.serveOn(t, bufconn.Listen(1<<20))
}

func (w *world) serveOn(t testing.TB, lis dialer) *remote {
	t.Helper()
	return w.serve(t, lis, func(lis net.Listener) net.Listener { return lis })
}

// serve serves on a listener that wrap may replace.
func (w *world) serve(t testing.TB, lis dialer, wrap func(net.Listener) net.Listener) *remote {
	t.Helper()
	r := &remote{lis: lis}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.ServeTLS(ctx, wrap(r.lis)) }()
	r.stop = sync.OnceValue(func() error {
		cancel()
		return <-done
	})
	t.Cleanup(func() { check(t, r.stop()) })
	return r
}

// sign returns an SVID that expires after ttl.
func (d *deployment) sign(t testing.TB, id spiffeid.ID, ttl time.Duration) *x509svid.SVID {
	t.Helper()
	return sign(t, d.keysets, id, ttl)
}

func sign(t testing.TB, k *keyset.Deployment, id spiffeid.ID, ttl time.Duration) *x509svid.SVID {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	svid, err := k.SignX509(id, key.Public(), ttl)
	check(t, err)
	leaf, err := x509.ParseCertificate(svid.DER)
	check(t, err)
	return &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{leaf}, PrivateKey: key}
}

// dial connects with svid, which may be nil, to the server of w's trust domain.
func (r *remote) dial(t testing.TB, w *world, svid *x509svid.SVID) *grpc.ClientConn {
	t.Helper()
	config := tlsconfig.TLSClientConfig(w, tlsconfig.AuthorizeID(serverID))
	if svid != nil {
		config = tlsconfig.MTLSClientConfig(svid, w, tlsconfig.AuthorizeID(serverID))
	}
	conn, err := grpc.NewClient("passthrough:///server", renewd.DialOptions(credentials.NewTLS(config),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return r.lis.DialContext(ctx) }))...)
	check(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// as connects with an SVID of the first deployment for id.
func (r *remote) as(t testing.TB, w *world, id spiffeid.ID) *renewd.Client {
	t.Helper()
	return renewd.NewClient(r.dial(t, w, w.only().sign(t, id, time.Hour)))
}

// attest stores an agent.
func (d *deployment) attest(t testing.TB, a spireapi.Agent) {
	t.Helper()
	_, err := d.kept.UpdateAgent(t.Context(), a.ID, func(*spireapi.Agent) (*spireapi.Agent, error) { return &a, nil })
	check(t, err)
}

// agent returns the SPIFFE ID of an agent.
func agent(name string) spiffeid.ID { return spiffeid.RequireFromSegments(td, "spire", "agent", name) }

// tainted activates a new keyset and taints the old one, from which agent "a" has SVIDs. It
// returns the old one.
func (d *deployment) tainted(t testing.TB) keyset.Keyset {
	t.Helper()
	old := d.keysets.Active()
	for _, entry := range []string{"", "web"} {
		check(t, d.ledger.RecordX509(t.Context(), ledger.Row{
			Authority: old.X509AuthorityID, Agent: agent("a").String(), Entry: entry, NotAfter: time.Now().Add(time.Hour),
		}))
	}
	next, err := d.keysets.Prepare(t.Context())
	check(t, err)
	check(t, d.keysets.Activate(t.Context(), next.ID))
	check(t, d.keysets.Taint(t.Context(), old.ID))
	return old
}

// settle reports for agent "a" that it has replaced all SVIDs.
func (d *deployment) settle(t testing.TB, k keyset.Keyset) {
	t.Helper()
	check(t, d.ledger.Report(t.Context(), agent("a").String(), ledger.Report{
		Sequence:    d.keysets.Bundle().Sequence,
		Authorities: []ledger.AuthorityReport{{Authority: k.X509AuthorityID, Tainted: true, Settled: true}},
	}))
}

// states returns the stored keysets as "ID STATE", in order of issue.
func (d *deployment) states(t testing.TB) (out []string) {
	t.Helper()
	list, err := d.keysets.List(context.Background())
	check(t, err)
	for _, k := range list {
		out = append(out, k.ID+" "+k.State.String())
	}
	return out
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
