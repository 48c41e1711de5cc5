package rotation_test

import (
	"context"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/rotation"
	"github.com/renewd/renewd/test/memory"
)

const day = 24 * time.Hour

var (
	td    = spiffeid.RequireTrustDomainFromString("example.org")
	start = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
)

// facts is a rotation.Facts with functions of the test.
type facts struct {
	behind  func() int                           // nil: 0
	holding func(keyset.Keyset) rotation.Holding // nil: safe
}

func (f facts) Behind() int {
	if f.behind == nil {
		return 0
	}
	return f.behind()
}

func (f facts) Holding(k keyset.Keyset) rotation.Holding {
	if f.holding == nil {
		return rotation.Holding{X509Safe: true, JWTSafe: true}
	}
	return f.holding(k)
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func open(t testing.TB, c keyset.Config) *keyset.Deployment {
	t.Helper()
	c.TrustDomain = td
	if c.Storage == nil {
		c.Storage = new(memory.Keysets)
	}
	d, err := keyset.Open(context.Background(), c)
	check(t, err)
	return d
}

func policy(t testing.TB, p rotation.Policy) rotation.Policy {
	t.Helper()
	p, err := p.For(keyset.DefaultLifetime)
	check(t, err)
	return p
}
