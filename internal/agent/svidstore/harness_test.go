package svidstore_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"log/slog"
	"math/big"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/svidstore"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// memoryDir returns a folder on a memory file system.
func memoryDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "renewd-test-*")
	if err != nil {
		t.Fatalf("this test needs the memory file system /dev/shm: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

func logTo(w *strings.Builder) *slog.Logger { return slog.New(slog.NewTextHandler(w, nil)) }

func open(t *testing.T, path string, log *slog.Logger) *svidstore.Dir {
	t.Helper()
	d, err := svidstore.Open(path, log)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// signed returns a certificate whose key is discarded.
func signed(template *x509.Certificate) []byte {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template.SerialNumber = big.NewInt(1)
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	return der
}

// leaf returns the certificate of an X.509-SVID.
func leaf(id spiffeid.ID) []byte { return signed(&x509.Certificate{URIs: []*url.URL{id.URL()}}) }

// snapshot has one authority, which has signed no SVID.
func snapshot(t *testing.T) *bundle.Snapshot {
	t.Helper()
	cert, err := x509.ParseCertificate(signed(&x509.Certificate{NotAfter: time.Now().Add(24 * time.Hour), IsCA: true, BasicConstraintsValid: true}))
	if err != nil {
		t.Fatal(err)
	}
	own, err := bundle.New(td, bundle.Content{X509: []bundle.X509Authority{{Certificate: cert}}})
	if err != nil {
		t.Fatal(err)
	}
	return &bundle.Snapshot{Own: own}
}

// addEntry adds an entry to the cache and returns it with an SVID for it.
func addEntry(c *cache.Cache, now time.Time) (*cache.Entry, *cache.SVID) {
	e := &cache.Entry{
		ID: "../odd/entry id", SPIFFEID: spiffeid.RequireFromPath(td, "/w"), Hint: "web", Revision: 3,
		Selectors: []cache.Selector{{Type: "unix", Value: "uid:1"}}, CreatedAt: now.UTC().Truncate(time.Second),
		FederatesWith: []spiffeid.TrustDomain{spiffeid.RequireTrustDomainFromString("other.test")},
	}
	s := &cache.SVID{ID: e.SPIFFEID, EntryID: e.ID, Revision: 3, Created: e.CreatedAt, Leaf: leaf(e.SPIFFEID), Intermediates: []byte{2}, Key: []byte{3}, Authority: "aa",
		NotBefore: now.UTC().Truncate(time.Second), NotAfter: now.Add(time.Hour).UTC().Truncate(time.Second), RenewAt: now.Add(time.Minute).UTC().Truncate(time.Second)}
	c.Update([]*cache.Entry{e}, nil)
	return e, s
}

func put(t *testing.T, c *cache.Cache, s *cache.SVID) {
	t.Helper()
	if err := c.Put(s); err != nil {
		t.Fatal(err)
	}
}

// follow runs Follow until the returned function is called.
func follow(t *testing.T, d *svidstore.Dir, c *cache.Cache) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- d.Follow(ctx, c) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Follow: %v", err)
		}
	}
}

func running(cache.Process) cache.Life { return cache.Running }
