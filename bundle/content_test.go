package bundle_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/renewd/renewd/bundle"
)

func pkix(t testing.TB, key crypto.PublicKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func newKey(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// junk has unusable elements, as a server can send them.
func junk(t testing.TB) map[string]func(*bundle.Content) {
	root, other := newCA(t, "j", nil), newCA(t, "k", nil)
	notCA := root.leaf(t)
	noSigning := sign(t, &x509.Certificate{
		SerialNumber: notCA.SerialNumber, SubjectKeyId: []byte("no signing"), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
	}, root.cert, other.key, root.key)
	p224 := pkix(t, newKey(t, elliptic.P224()).Public())
	good := pkix(t, root.key.Public())
	return map[string]func(*bundle.Content){
		"no DER":                  func(c *bundle.Content) { c.AddX509([]byte("x"), true) },
		"nothing":                 func(c *bundle.Content) { c.AddX509(nil, false) },
		"two certificates in one": func(c *bundle.Content) { c.AddX509(slices.Concat(root.cert.Raw, other.cert.Raw), false) },
		"no CA":                   func(c *bundle.Content) { c.AddX509(notCA.Raw, false) },
		"no certificate signing":  func(c *bundle.Content) { c.AddX509(noSigning.Raw, true) },
		"no PKIX":                 func(c *bundle.Content) { c.AddJWT("x", []byte("x"), time.Time{}, true) },
		"no key":                  func(c *bundle.Content) { c.AddJWT("x", nil, time.Time{}, false) },
		"no key ID":               func(c *bundle.Content) { c.AddJWT("", good, time.Time{}, true) },
		"curve without a JWK":     func(c *bundle.Content) { c.AddJWT("p224", p224, time.Time{}, false) },
	}
}

// An unusable authority is left out alone, with a reason, and its taint mark counts.
func TestUnusableAuthorityIsLeftOutAlone(t *testing.T) {
	t.Parallel()
	root := newCA(t, "a", nil)
	_, eddsa, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, add := range junk(t) {
		for _, first := range []bool{true, false} {
			c := bundle.Content{Sequence: 7}
			if first {
				add(&c)
			}
			c.AddX509(root.cert.Raw, true)
			c.AddJWT("kid", pkix(t, root.key.Public()), time.Time{}, false)
			c.AddJWT("ed", pkix(t, eddsa.Public()), time.Time{}, false)
			if !first {
				add(&c)
			}
			b, err := bundle.New(td, c)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			left := b.LeftOut()
			if len(b.X509()) != 1 || len(b.JWT()) != 2 || len(left) != 1 || left[0].Reason == "" {
				t.Errorf("%s: %d and %d authorities, left out %v", name, len(b.X509()), len(b.JWT()), left)
			}
			if x, ok := b.X509Authority("61"); !ok || !x.Tainted {
				t.Errorf("%s: the taint mark is lost", name)
			}
			if !bytes.Equal(b.X509DER(), root.cert.Raw) || strings.Count(string(b.JWKS()), `"kid"`) != 2+1 { // one of them is the ID
				t.Errorf("%s: workloads get %s", name, b.JWKS())
			}
		}
	}
}

// A duplicate authority is one, tainted if either copy is.
func TestSameAuthorityTwiceIsOne(t *testing.T) {
	t.Parallel()
	root := newCA(t, "a", nil)
	soon, late := time.Now().Round(0), time.Now().Add(time.Hour).Round(0)
	for i := range 4 {
		one, two := i&1 == 1, i&2 == 2
		c := bundle.Content{
			X509: []bundle.X509Authority{{Certificate: root.cert, Tainted: one, TaintedSince: late}, {Certificate: root.cert, Tainted: two, TaintedSince: soon}},
			JWT: []bundle.JWTAuthority{
				{KeyID: "k", PublicKey: root.key.Public(), Tainted: one, ExpiresAt: soon}, {KeyID: "k", PublicKey: root.key.Public(), Tainted: two, ExpiresAt: late},
			},
		}
		b, err := bundle.New(td, c)
		if err != nil {
			t.Fatal(err)
		}
		if len(b.X509()) != 1 || len(b.JWT()) != 1 || len(b.LeftOut()) != 0 {
			t.Fatalf("%d X.509 and %d JWT authorities, left out %v", len(b.X509()), len(b.JWT()), b.LeftOut())
		}
		x, k := b.X509()[0], b.JWT()[0]
		since := map[int]time.Time{1: late, 2: soon, 3: soon}[i]
		if x.Tainted != (i > 0) || k.Tainted != (i > 0) || !x.TaintedSince.Equal(since) || !k.ExpiresAt.Equal(late) {
			t.Errorf("marks %v and %v: %+v, %+v", one, two, x, k)
		}
	}
}

// A reissued or cross-signed root is published as several certificates with one ID. All
// are trusted, and the mark of one counts for the ID.
func TestCertificatesOfOneID(t *testing.T) {
	t.Parallel()
	root, above := newCA(t, "a", nil), newCA(t, "b", nil)
	template := *root.cert
	template.NotAfter = template.NotAfter.Add(time.Hour)
	reissued := sign(t, &template, &template, root.key, root.key)
	cross := sign(t, &template, above.cert, root.key, above.key)
	unrelated := newCA(t, "a", nil) // another key with the same ID
	for marked, by := range []*x509.Certificate{root.cert, reissued, cross, unrelated.cert} {
		c := bundle.Content{}
		for i, cert := range []*x509.Certificate{root.cert, reissued, cross, unrelated.cert} {
			c.X509 = append(c.X509, bundle.X509Authority{Certificate: cert, Tainted: i == marked})
		}
		b, err := bundle.New(td, c)
		if err != nil {
			t.Fatal(err)
		}
		if len(b.X509()) != 4 || len(b.LeftOut()) != 0 {
			t.Fatalf("%d certificates, left out %v", len(b.X509()), b.LeftOut())
		}
		for _, leaf := range []*x509.Certificate{root.leaf(t), unrelated.leaf(t)} {
			id, err := b.Verify(leaf, nil, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			if x, ok := b.X509Authority(id); !ok || !x.Tainted {
				t.Errorf("certificate %d of serial %v is tainted, its ID is not", marked, by.SerialNumber)
			}
		}
	}
}

// Of two keys with one ID the first is used, and a mark of either counts for the ID.
func TestTwoKeysOfOneID(t *testing.T) {
	t.Parallel()
	root := newCA(t, "a", nil)
	first, second := newKey(t, elliptic.P256()).Public(), newKey(t, elliptic.P256()).Public()
	p224 := newKey(t, elliptic.P224()).Public()
	for i := range 8 {
		c := bundle.Content{X509: []bundle.X509Authority{{Certificate: root.cert}}}
		c.AddJWT("k", pkix(t, p224), time.Time{}, i&4 != 0) // cannot be used, and so is not the first
		c.AddJWT("k", pkix(t, first), time.Time{}, i&1 != 0)
		c.AddJWT("k", pkix(t, second), time.Time{}, i&2 != 0)
		b, err := bundle.New(td, c)
		if err != nil {
			t.Fatal(err)
		}
		k, ok := b.JWTKey("k")
		if !ok || len(b.JWT()) != 1 || !k.PublicKey.(*ecdsa.PublicKey).Equal(first) || k.Tainted != (i > 0) {
			t.Errorf("%03b: %+v, %v of %d", i, k, ok, len(b.JWT()))
		}
		if n := len(b.LeftOut()); n != 2 {
			t.Errorf("%03b: left out %v", i, b.LeftOut())
		}
	}
}

// Of the times of a mark the earliest known one counts, and a key of which one copy has no
// expiry has none.
func TestTimesOfCopies(t *testing.T) {
	t.Parallel()
	root := newCA(t, "a", nil)
	none, soon, late := time.Time{}, time.Now().Round(0), time.Now().Add(time.Hour).Round(0)
	for _, tt := range []struct{ one, two, since, expiry time.Time }{
		{soon, late, soon, late}, {late, soon, soon, late}, {none, none, none, none},
		{soon, none, soon, none}, {none, soon, soon, none},
	} {
		b, err := bundle.New(td, bundle.Content{
			X509: []bundle.X509Authority{{Certificate: root.cert, Tainted: true, TaintedSince: tt.one}, {Certificate: root.cert, Tainted: true, TaintedSince: tt.two}},
			JWT:  []bundle.JWTAuthority{{KeyID: "k", PublicKey: root.key.Public(), ExpiresAt: tt.one}, {KeyID: "k", PublicKey: root.key.Public(), ExpiresAt: tt.two}},
		})
		if err != nil {
			t.Fatal(err)
		}
		if x, k := b.X509()[0], b.JWT()[0]; !x.TaintedSince.Equal(tt.since) || !k.ExpiresAt.Equal(tt.expiry) {
			t.Errorf("%v and %v: tainted since %v, expires at %v", tt.one, tt.two, x.TaintedSince, k.ExpiresAt)
		}
	}
}

// Keys that are no usable public keys never get into a bundle, and the reason says what is
// wrong.
func TestUnusableJWTKeys(t *testing.T) {
	t.Parallel()
	root := newCA(t, "a", nil)
	for reason, k := range map[string]bundle.JWTAuthority{
		"it has no key ID":                            {PublicKey: root.key.Public()},
		"it has no public key":                        {KeyID: "k"},
		"it is not a public key of a supported type":  {KeyID: "k", PublicKey: root.key},
		"it is not a public key of a supported type ": {KeyID: "k", PublicKey: ed25519.PublicKey("short")},
		"its key has no JWK form":                     {KeyID: "k", PublicKey: newKey(t, elliptic.P224()).Public()},
	} {
		b, err := bundle.New(td, bundle.Content{X509: []bundle.X509Authority{{Certificate: root.cert}}, JWT: []bundle.JWTAuthority{k}})
		if err != nil {
			t.Fatal(err)
		}
		if left := b.LeftOut(); len(b.JWT()) > 0 || len(left) != 1 || !strings.HasPrefix(left[0].Reason, strings.TrimSpace(reason)) {
			t.Errorf("%s: %d JWT authorities, left out %v", reason, len(b.JWT()), left)
		}
		if _, ok := b.JWTKey(k.KeyID); ok || strings.Contains(string(b.JWKS()), `"kty"`) {
			t.Errorf("%s: the key is in the bundle: %s", reason, b.JWKS())
		}
	}
}

// Whatever a bundle is made of, in whatever order and number: it has all usable
// authorities, each once, with every taint mark of a copy. A bundle made of the result is
// the same.
func TestMixedBundles(t *testing.T) {
	t.Parallel()
	cas := make([]*ca, 5)
	for i := range cas {
		cas[i] = newCA(t, fmt.Sprint(i), nil)
	}
	keys := make([][]byte, len(cas))
	for i := range cas {
		keys[i] = pkix(t, cas[i].key.Public())
	}
	trash := junk(t)
	names := slices.Sorted(maps.Keys(trash))
	rapid.Check(t, func(t *rapid.T) {
		c := bundle.Content{Sequence: rapid.Uint64().Draw(t, "sequence")}
		x, k := map[string]bool{}, map[string]bool{} // tainted, by ID
		for range rapid.IntRange(1, 15).Draw(t, "parts") {
			i, tainted := rapid.IntRange(0, len(cas)-1).Draw(t, "authority"), rapid.Bool().Draw(t, "tainted")
			switch rapid.IntRange(0, 3).Draw(t, "kind") {
			case 0, 1:
				c.AddX509(cas[i].cert.Raw, tainted)
				id := hex.EncodeToString(cas[i].cert.SubjectKeyId)
				x[id] = x[id] || tainted
			case 2:
				id := fmt.Sprint(i)
				c.AddJWT(id, keys[i], time.Time{}, tainted)
				k[id] = k[id] || tainted
			case 3:
				trash[rapid.SampledFrom(names).Draw(t, "junk")](&c)
			}
		}
		b, err := bundle.New(td, c)
		if (err == nil) != (len(x) > 0) {
			t.Fatalf("%d X.509 authorities: %v", len(x), err)
		}
		if err != nil {
			return
		}
		if len(b.X509()) != len(x) || len(b.JWT()) != len(k) {
			t.Fatalf("%d and %d authorities, want %d and %d", len(b.X509()), len(b.JWT()), len(x), len(k))
		}
		for id, tainted := range x {
			if a, ok := b.X509Authority(id); !ok || a.Tainted != tainted {
				t.Errorf("X.509 authority %s: %v, tainted %v, want %v", id, ok, a.Tainted, tainted)
			}
		}
		for id, tainted := range k {
			if a, ok := b.JWTKey(id); !ok || a.Tainted != tainted {
				t.Errorf("JWT authority %s: %v, tainted %v, want %v", id, ok, a.Tainted, tainted)
			}
		}
		again, err := bundle.New(td, bundle.Content{Sequence: b.Sequence(), X509: b.X509(), JWT: b.JWT(), LeftOut: b.LeftOut()})
		if err != nil || !again.Equal(b) {
			t.Errorf("made of the result it is another one: %v", err)
		}
	})
}

// The authorities left out are logged once for each change, in one short line.
func TestLeftOutIsLoggedOnce(t *testing.T) {
	t.Parallel()
	var log strings.Builder
	l := slog.New(slog.NewTextHandler(&log, nil))
	lines := func() int {
		defer log.Reset()
		if log.Len() > 5000 {
			t.Errorf("a line of %d bytes", log.Len())
		}
		return strings.Count(log.String(), "\n")
	}
	var many []bundle.LeftOut
	for i := range 1000 {
		many = append(many, bundle.LeftOut{Type: bundle.TypeJWT, ID: strings.Repeat("\xff", 1000), Reason: fmt.Sprint(i, strings.Repeat("y", 1000))})
	}
	const some, none = "unusable authorities left out of the bundle", "no authority left out of the bundle"
	for _, tt := range []struct {
		before, now []bundle.LeftOut
		lines       int
		text        string
	}{{nil, nil, 0, ""}, {nil, many, 1, some}, {many, many, 0, ""}, {many, many[1:], 1, some}, {many, nil, 1, none}} {
		bundle.LogLeftOut(l, td, tt.before, tt.now)
		text := log.String()
		if lines() != tt.lines || !strings.Contains(text, tt.text) {
			t.Errorf("from %d to %d left out: want %d lines %q, have %.200q", len(tt.before), len(tt.now), tt.lines, tt.text, text)
		}
	}
}

func TestLeftOutNamesTheAuthority(t *testing.T) {
	t.Parallel()
	for want, l := range map[string]bundle.LeftOut{
		"jwt:k: it has no public key": {Type: bundle.TypeJWT, ID: "k", Reason: "it has no public key"},
		"unknown: it has no use":      {Type: bundle.TypeUnknown, Reason: "it has no use"},
	} {
		if got := l.String(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
