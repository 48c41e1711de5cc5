package renew_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/renew"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// ca is a signing authority.
type ca struct {
	id   string
	cert *x509.Certificate
	key  crypto.Signer
}

func newCA(t testing.TB, name string) *ca {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber:          new(big.Int).SetBytes(randomSerial(t)),
		SubjectKeyId:          []byte(name),
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(10000 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
		URIs:                  []*url.URL{td.ID().URL()},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &ca{id: bundle.AuthorityID(cert), cert: cert, key: key}
}

// leaf signs an SVID for id; mutate may spoil it.
func (c *ca) leaf(id spiffeid.ID, public crypto.PublicKey, life time.Duration, mutate func(*x509.Certificate)) ([]byte, error) {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		NotBefore:    time.Now().Add(-10 * time.Second),
		NotAfter:     time.Now().Add(life),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		URIs:         []*url.URL{id.URL()},
	}
	if mutate != nil {
		mutate(template)
	}
	return x509.CreateCertificate(rand.Reader, template, c.cert, public, c.key)
}

// authorityState is an authority as a snapshot has it.
type authorityState struct {
	*ca
	tainted bool
	since   time.Time
}

func trusted(cas ...*ca) []authorityState {
	var out []authorityState
	for _, c := range cas {
		out = append(out, authorityState{ca: c})
	}
	return out
}

func tainted(since time.Time, cas ...*ca) []authorityState {
	var out []authorityState
	for _, c := range cas {
		out = append(out, authorityState{c, true, since})
	}
	return out
}

func snapshot(t testing.TB, states ...authorityState) *bundle.Snapshot {
	t.Helper()
	var content bundle.Content
	for _, s := range states {
		content.X509 = append(content.X509, bundle.X509Authority{Certificate: s.cert, Tainted: s.tainted, TaintedSince: s.since})
	}
	b, err := bundle.New(td, content)
	if err != nil {
		t.Fatal(err)
	}
	return &bundle.Snapshot{Own: b}
}

// fakeServer mints with one authority. Its fields may be changed under mu.
type fakeServer struct {
	mu      sync.Mutex
	signer  *ca
	life    time.Duration
	latency time.Duration
	down    error // the whole call fails
	// item, when set, may replace one item's answer.
	item  func(entryID string, public crypto.PublicKey) (renew.Result, bool)
	ids   map[string]spiffeid.ID
	calls []mintCall
}

type mintCall struct {
	at  time.Time
	ids []string
}

func (f *fakeServer) Mint(ctx context.Context, requests []renew.Request) ([]renew.Result, error) {
	f.mu.Lock()
	call := mintCall{at: time.Now()}
	for _, r := range requests {
		call.ids = append(call.ids, r.EntryID)
	}
	f.calls = append(f.calls, call)
	latency, down := f.latency, f.down
	f.mu.Unlock()
	select {
	case <-time.After(latency):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if down != nil {
		return nil, down
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]renew.Result, len(requests))
	for i, r := range requests {
		csr, err := x509.ParseCertificateRequest(r.CSR)
		if err != nil {
			return nil, fmt.Errorf("bad CSR: %w", err)
		}
		if f.item != nil {
			if res, ok := f.item(r.EntryID, csr.PublicKey); ok {
				out[i] = res
				continue
			}
		}
		id, ok := f.ids[r.EntryID]
		if !ok {
			out[i] = renew.Result{Err: errors.New("no such entry")}
			continue
		}
		der, err := f.signer.leaf(id, csr.PublicKey, f.life, nil)
		out[i] = renew.Result{Chain: [][]byte{der}, Err: err}
	}
	return out, nil
}

func (f *fakeServer) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// since returns the calls made at t or after.
func (f *fakeServer) since(t time.Time) []mintCall {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []mintCall
	for _, c := range f.calls {
		if !c.at.Before(t) {
			out = append(out, c)
		}
	}
	return out
}

// entries registers n entries with the server and returns them. Entry i is
// matched by the selector test:i.
func (f *fakeServer) entries(n int) []*cache.Entry {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ids == nil {
		f.ids = make(map[string]spiffeid.ID)
	}
	out := make([]*cache.Entry, n)
	for i := range out {
		id := entryID(i)
		f.ids[id] = spiffeid.RequireFromPathf(td, "/workload/%d", i)
		out[i] = &cache.Entry{ID: id, SPIFFEID: f.ids[id], Selectors: []cache.Selector{selector(i)}}
	}
	return out
}

func selector(i int) cache.Selector { return cache.Selector{Type: "test", Value: fmt.Sprint(i)} }

func logTo(w io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelDebug}))
}
