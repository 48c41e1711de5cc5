package upstream_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/bundle"
)

var otherTD = spiffeid.RequireTrustDomainFromString("other.org")

func newPKIX() []byte {
	return must(x509.MarshalPKIXPublicKey(must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)).Public()))
}

// After its root has tainted a JWT key, a nested SPIRE server (seen with 1.13.3 and
// 1.16-dev) publishes the key twice, once tainted and once not. A later taint of an
// X.509 authority is still recognized, also beside other unusable authorities.
func TestNestedServerPublishesAKeyTwice(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, s *server, a *agent) {
		key, other := newPKIX(), newPKIX()
		var last *bundle.Snapshot
		r := bundle.NewRefresher(bundle.RefresherConfig{Fetcher: a, Publish: func(s *bundle.Snapshot) { last = s }})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		step := func(change func()) *bundle.Bundle {
			s.locked(change)
			time.Sleep(6 * time.Second)
			synctest.Wait()
			return last.Own
		}
		step(func() { s.keys = []*types.JWTKey{{KeyId: "k", PublicKey: key}, {KeyId: "l", PublicKey: other}} })
		b := step(func() { s.keys = append(s.keys, &types.JWTKey{KeyId: "k", PublicKey: key, Tainted: true}) })
		if k, ok := b.JWTKey("k"); !ok || !k.Tainted || len(b.JWT()) != 2 {
			t.Errorf("the key given twice is %+v of %d", k, len(b.JWT()))
		}
		next := newAuthority(t)
		b = step(func() {
			s.keys = append(s.keys, &types.JWTKey{KeyId: "l", PublicKey: newPKIX()}, &types.JWTKey{PublicKey: key}, nil)
			s.roots = []*types.X509Certificate{{Asn1: []byte("x")}, s.roots[0], {Asn1: next.cert.Raw}, {Asn1: s.roots[0].Asn1, Tainted: true}}
		})
		if x := b.X509(); len(x) != 2 || !x[0].Tainted || x[1].Tainted || len(b.JWT()) != 2 || len(b.LeftOut()) != 4 {
			t.Errorf("%+v, %+v, left out %v", x, b.JWT(), b.LeftOut())
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// A federated bundle without any X.509 authority means that there is none to trust.
// One with unusable authorities, or of another trust domain, is an error.
func TestFederatedBundleWithoutAuthority(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, s *server, a *agent) {
		for name, tt := range map[string]struct {
			answer *types.Bundle
			none   bool
		}{
			"none":      {&types.Bundle{TrustDomain: otherTD.Name(), JwtAuthorities: []*types.JWTKey{{KeyId: "k", PublicKey: newPKIX()}}}, true},
			"no use":    {&types.Bundle{TrustDomain: otherTD.Name(), X509Authorities: []*types.X509Certificate{{Asn1: []byte("x")}}}, false},
			"of others": {&types.Bundle{TrustDomain: "third.org"}, false},
			"empty":     {&types.Bundle{}, false},
		} {
			s.locked(func() { s.federated = tt.answer })
			b, err := a.FetchFederatedBundle(t.Context(), otherTD)
			if b != nil || err == nil || errors.Is(err, bundle.ErrNotFound) != tt.none {
				t.Errorf("%s: %v, %v", name, b, err)
			}
		}
	})
}

// A fetch of a federated bundle that reaches its caller's deadline does not close the
// connection of the other calls.
func TestHangingFederatedBundleKeepsTheConnection(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, s *server, a *agent) {
		if err := a.PostStatus(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		conns := s.conns
		s.hook = func(ctx context.Context, method string) error {
			if method != "GetFederatedBundle" {
				return nil
			}
			// The server knows the deadline and may report it first.
			time.Sleep(999 * time.Millisecond)
			return status.Error(codes.DeadlineExceeded, "too late")
		}
		for range 5 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			began := time.Now()
			if _, err := a.FetchFederatedBundle(ctx, otherTD); err == nil || time.Since(began) > 2*time.Second {
				t.Errorf("after %v: %v", time.Since(began), err)
			}
			cancel()
			if err := a.PostStatus(t.Context(), 1); err != nil {
				t.Error(err)
			}
		}
		if n := s.conns - conns; n > 0 {
			t.Errorf("%d new connections", n)
		}
	})
}

// A server whose authority the bundle in force lacks is verified with the trust that
// the operator configures, and rejected otherwise.
func TestServerVerifiedWithTheOperatorsTrust(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t)
		var says atomic.Pointer[bundle.Bundle]
		var asked, otherwise, verified atomic.Int64
		a := newAgent(t, s, options{
			verified: func() { verified.Add(1) },
			otherwise: func(verify func(*bundle.Bundle) error) bool {
				asked.Add(1)
				if trust := says.Load(); trust == nil || verify(trust) != nil {
					return false
				}
				otherwise.Add(1)
				return true
			},
		})
		defer a.close(t)
		fetch := func() error {
			_, err := a.FetchBundle(t.Context())
			return err
		}
		if err := fetch(); err != nil || asked.Load() > 0 || verified.Swap(0) == 0 {
			t.Errorf("with the bundle in force: %v, asked %d times", err, asked.Load())
		}
		s.stop()
		s.ca = newAuthority(t)
		s.roots = []*types.X509Certificate{{Asn1: s.ca.cert.Raw}}
		s.start()
		if err := fetch(); err == nil || asked.Load() == 0 {
			t.Errorf("with nothing new: %v, asked %d times", err, asked.Load())
		}
		says.Store(must(bundle.New(td, bundle.Content{X509: []bundle.X509Authority{{Certificate: newAuthority(t).cert}}})))
		time.Sleep(5 * time.Second)
		if err := fetch(); err == nil || otherwise.Load() > 0 {
			t.Errorf("with authorities of others: %v, verified %d times", err, otherwise.Load())
		}
		says.Store(s.trust())
		time.Sleep(5 * time.Second)
		if err := fetch(); err != nil || otherwise.Load() == 0 {
			t.Errorf("with its authority: %v, verified %d times", err, otherwise.Load())
		}
		if verified.Load() > 0 {
			t.Errorf("verified %d times by the bundle in force", verified.Load())
		}
	})
}
