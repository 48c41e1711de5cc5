package bundle_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/big"
	"net/url"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

type ca struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// newCA returns an authority with the ID id, signed by parent or by itself.
func newCA(t testing.TB, id string, parent *ca) *ca {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), SubjectKeyId: []byte(id), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{td.ID().URL()},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
	}
	signer, by := key, template
	if parent != nil {
		signer, by = parent.key, parent.cert
	}
	return &ca{sign(t, template, by, key, signer), key}
}

func (c *ca) leaf(t testing.TB) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(2), URIs: []*url.URL{spiffeid.RequireFromPath(td, "/w").URL()},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
	}, c.cert, key, c.key)
}

func sign(t testing.TB, template, parent *x509.Certificate, key, signer *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func newBundle(t testing.TB, seq uint64, auths ...bundle.X509Authority) *bundle.Bundle {
	t.Helper()
	b, err := bundle.New(td, bundle.Content{Sequence: seq, X509: auths})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestNewRejectsInvalidBundles(t *testing.T) {
	good := bundle.X509Authority{Certificate: newCA(t, "a", nil).cert}
	for name, tt := range map[string]struct {
		td spiffeid.TrustDomain
		c  bundle.Content
	}{
		"no trust domain":                        {c: bundle.Content{X509: []bundle.X509Authority{good}}},
		"no X.509 authority":                     {td: td},
		"no X.509 authority but a JWT authority": {td: td, c: bundle.Content{JWT: []bundle.JWTAuthority{{KeyID: "k", PublicKey: good.Certificate.PublicKey}}}},
		"none that can be used":                  {td: td, c: bundle.Content{X509: []bundle.X509Authority{{}}}},
	} {
		if _, err := bundle.New(tt.td, tt.c); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestForms(t *testing.T) {
	a, b := newCA(t, "a", nil), newCA(t, "b", nil)
	got, err := bundle.New(td, bundle.Content{
		X509: []bundle.X509Authority{{Certificate: a.cert}, {Certificate: b.cert}},
		JWT:  []bundle.JWTAuthority{{KeyID: "kid", PublicKey: a.key.Public()}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := append(slices.Clone(a.cert.Raw), b.cert.Raw...); !bytes.Equal(got.X509DER(), want) {
		t.Error("X509DER is not the concatenated certificates")
	}
	var jwks struct{ Keys []map[string]any }
	if err := json.Unmarshal(got.JWKS(), &jwks); err != nil {
		t.Fatal(err)
	}
	if len(jwks.Keys) != 1 || jwks.Keys[0]["kid"] != "kid" || jwks.Keys[0]["kty"] != "EC" || jwks.Keys[0]["d"] != nil {
		t.Errorf("JWKS is %s, want the one public JWT key", got.JWKS())
	}
	if x, ok := got.X509Authority("61"); !ok || x.Certificate != a.cert {
		t.Error("authority a is not found under the hex of its key identifier")
	}
}

func TestVerifyFindsTheAuthority(t *testing.T) {
	root, other, unknown := newCA(t, "a", nil), newCA(t, "b", nil), newCA(t, "c", nil)
	middle := newCA(t, "m", root)
	b := newBundle(t, 1, bundle.X509Authority{Certificate: other.cert}, bundle.X509Authority{Certificate: root.cert})
	if id, err := b.Verify(root.leaf(t), nil, time.Now()); err != nil || id != "61" {
		t.Errorf("direct: %q, %v; want authority 61", id, err)
	}
	if id, err := b.Verify(middle.leaf(t), []*x509.Certificate{middle.cert}, time.Now()); err != nil || id != "61" {
		t.Errorf("over an intermediate: %q, %v; want authority 61", id, err)
	}
	if _, err := b.Verify(middle.leaf(t), nil, time.Now()); err == nil {
		t.Error("a chain with a gap was accepted")
	}
	if _, err := b.Verify(unknown.leaf(t), nil, time.Now()); err == nil {
		t.Error("the chain of an unknown authority was accepted")
	}
	if _, err := b.Verify(root.leaf(t), nil, time.Now().Add(2*time.Hour)); err == nil {
		t.Error("an expired leaf was accepted")
	}
}

// A certificate without a subject key identifier has the one of RFC 5280, section 4.2.1.2,
// method 1: the SHA-1 of the public key's bits, without its algorithm.
func TestAuthorityIDWithoutKeyIdentifier(t *testing.T) {
	cert := newCA(t, "a", nil).leaf(t)
	if len(cert.SubjectKeyId) > 0 {
		t.Fatal("the certificate has a subject key identifier")
	}
	bits, err := cert.PublicKey.(*ecdsa.PublicKey).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	if got, want := bundle.AuthorityID(cert), fmt.Sprintf("%x", sha1.Sum(bits)); got != want {
		t.Errorf("ID %s, want %s", got, want)
	}
}

// Of the authorities that a chain leads to, one without a taint mark is preferred: an SVID
// is replaced only if all of them are tainted.
func TestVerifyPrefersAnAuthorityWithoutMark(t *testing.T) {
	roots := []*ca{newCA(t, "a", nil), newCA(t, "b", nil)}
	middle := newCA(t, "m", roots[0])
	cross := sign(t, middle.cert, roots[1].cert, middle.key, roots[1].key)
	for _, tt := range []struct {
		a, b bool
		want []string
	}{{true, false, []string{"62"}}, {false, true, []string{"61"}}, {true, true, []string{"61", "62"}}} {
		b := newBundle(t, 1, bundle.X509Authority{Certificate: roots[0].cert, Tainted: tt.a}, bundle.X509Authority{Certificate: roots[1].cert, Tainted: tt.b})
		for _, chain := range [][]*x509.Certificate{{middle.cert, cross}, {cross, middle.cert}} {
			if id, err := b.Verify(middle.leaf(t), chain, time.Now()); err != nil || !slices.Contains(tt.want, id) {
				t.Errorf("marks %v and %v: %q, %v; want one of %v", tt.a, tt.b, id, err, tt.want)
			}
		}
	}
}

func TestDiff(t *testing.T) {
	certs := map[string]*x509.Certificate{"a": newCA(t, "a", nil).cert, "b": newCA(t, "b", nil).cert}
	again := newCA(t, "a", nil).cert
	auth := func(id string, tainted bool) bundle.X509Authority {
		return bundle.X509Authority{Certificate: certs[id], Tainted: tainted}
	}
	x := func(k bundle.Kind, id string) bundle.Change {
		return bundle.Change{Kind: k, Type: bundle.TypeX509, ID: hex.EncodeToString([]byte(id))}
	}
	for _, tt := range []struct {
		name     string
		from, to *bundle.Bundle
		want     []bundle.Change
	}{
		{"first", nil, newBundle(t, 1, auth("a", false)), []bundle.Change{x(bundle.KindAdded, "a")}},
		{"same", newBundle(t, 1, auth("a", true)), newBundle(t, 2, auth("a", true)), nil},
		{"taint", newBundle(t, 1, auth("a", false), auth("b", false)), newBundle(t, 2, auth("a", true), auth("b", false)), []bundle.Change{x(bundle.KindTainted, "a")}},
		{"taint taken back", newBundle(t, 1, auth("a", true)), newBundle(t, 2, auth("a", false)), []bundle.Change{x(bundle.KindUntainted, "a")}},
		{"arrives tainted", newBundle(t, 1, auth("a", false)), newBundle(t, 2, auth("a", false), auth("b", true)), []bundle.Change{x(bundle.KindAdded, "b"), x(bundle.KindTainted, "b")}},
		{"replaced", newBundle(t, 1, auth("a", true)), newBundle(t, 2, auth("b", false)), []bundle.Change{x(bundle.KindAdded, "b"), x(bundle.KindRemoved, "a")}},
		{"one ID of two certificates", newBundle(t, 1, auth("a", false), bundle.X509Authority{Certificate: again}), newBundle(t, 2, auth("a", false), bundle.X509Authority{Certificate: again, Tainted: true}), []bundle.Change{x(bundle.KindTainted, "a")}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := bundle.Diff(tt.from, tt.to); !slices.Equal(got, tt.want) {
				t.Errorf("Diff = %v, want %v", got, tt.want)
			}
		})
	}
	keys := func(tainted bool, ids ...string) *bundle.Bundle {
		c := bundle.Content{X509: []bundle.X509Authority{auth("a", false)}}
		for _, id := range ids {
			c.JWT = append(c.JWT, bundle.JWTAuthority{KeyID: id, PublicKey: certs["a"].PublicKey, Tainted: tainted})
		}
		b, err := bundle.New(td, c)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	want := []bundle.Change{
		{Kind: bundle.KindTainted, Type: bundle.TypeJWT, ID: "k"}, {Kind: bundle.KindAdded, Type: bundle.TypeJWT, ID: "m"},
		{Kind: bundle.KindTainted, Type: bundle.TypeJWT, ID: "m"}, {Kind: bundle.KindRemoved, Type: bundle.TypeJWT, ID: "l"},
	}
	if got := bundle.Diff(keys(false, "k", "l"), keys(true, "k", "m")); !slices.Equal(got, want) {
		t.Errorf("of JWT keys: %v, want %v", got, want)
	}
}
