package keyset_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/test/memory"
)

var (
	td       = spiffeid.RequireTrustDomainFromString("example.org")
	workload = spiffeid.RequireFromPath(td, "/workload")
	start    = time.Date(2026, 1, 2, 3, 4, 5, 678e6, time.UTC)
)

// clock is a clock that a test sets.
type clock struct{ now time.Time }

func (c *clock) Now() time.Time { return c.now }

type fataler interface {
	Helper()
	Fatal(args ...any)
	Fatalf(format string, args ...any)
}

func open(t fataler, c keyset.Config) *keyset.Deployment {
	t.Helper()
	c.TrustDomain = td
	if c.Storage == nil {
		c.Storage = new(memory.Keysets)
	}
	d, err := keyset.Open(ctx(t), c)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func list(t fataler, d *keyset.Deployment) map[string]keyset.Keyset {
	t.Helper()
	all, err := d.List(ctx(t))
	if err != nil {
		t.Fatal(err)
	}
	byID := make(map[string]keyset.Keyset, len(all))
	for _, k := range all {
		byID[k.ID] = k
	}
	if len(byID) != len(all) {
		t.Fatalf("two keysets have the same ID: %v", all)
	}
	return byID
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func parse(t testing.TB, der []byte) *x509.Certificate {
	t.Helper()
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}
