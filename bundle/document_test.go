package bundle_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/renewd/renewd/bundle"
)

// jwk is one element of a document in SPIFFE's format.
func jwk(t testing.TB, use string, key jose.JSONWebKey) string {
	t.Helper()
	key.Use = use
	data, err := json.Marshal(key)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func x509Key(t testing.TB, certs ...*x509.Certificate) string {
	return jwk(t, "x509-svid", jose.JSONWebKey{Key: certs[0].PublicKey, Certificates: certs})
}

func selfSigned(t testing.TB, key *ecdsa.PrivateKey) *x509.Certificate {
	template := &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true}
	return sign(t, template, template, key, key)
}

func doc(keys ...string) string {
	return `{"keys":[` + strings.Join(keys, ",") + `],"spiffe_sequence":3,"spiffe_refresh_hint":60}`
}

func TestReadDocument(t *testing.T) {
	t.Parallel()
	root := newCA(t, "a", nil)
	key := root.key.Public()
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.cert.Raw})
	for name, text := range map[string]string{
		"SPIFFE": doc(x509Key(t, root.cert), jwk(t, "jwt-svid", jose.JSONWebKey{Key: key, KeyID: "k"})),
		"PEM":    string(slices.Concat([]byte("root\n"), block, []byte("# the same\n"), block)),
	} {
		d, err := bundle.Read([]byte(" \n" + text))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if len(d.X509) != 1 || !d.X509[0].Certificate.Equal(root.cert) || d.X509[0].Tainted || len(d.LeftOut) != 0 {
			t.Errorf("%s: %+v", name, d)
		}
		if name == "SPIFFE" && (!d.Numbered || d.Sequence != 3 || d.RefreshHint != time.Minute || len(d.JWT) != 1 || d.JWT[0].KeyID != "k") {
			t.Errorf("%s: %+v", name, d)
		}
	}
	key509 := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: pkix(t, key)})
	mixed, err := bundle.Read(slices.Concat(key509, block))
	if err != nil || len(mixed.X509) != 1 || len(mixed.LeftOut) != 1 {
		t.Errorf("a certificate after another PEM block: %+v, %v", mixed, err)
	}
	empty, err := bundle.ReadJSON([]byte(`{"keys":[]}`))
	if err != nil || empty.Numbered || len(empty.X509) != 0 {
		t.Errorf("no keys: %+v, %v", empty, err)
	}
	for _, text := range []string{"", "hello", "{", "{}", `{"keys":null}`, `{"keys":{}}`, `{"keys":[],"spiffe_sequence":-1}`, `{"keys":[]}x`,
		// An unreadable document withdraws nothing.
		`{"keys":[1]}`, doc(`{"use":"x509-svid","kty":"XYZ"}`), doc(strings.Replace(x509Key(t, root.cert), `"x5c":["`, `"x5c":["AAAA`, 1)), doc(x509Key(t, root.leaf(t))),
		string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")})),
	} {
		if d, err := bundle.Read([]byte(text)); err == nil {
			t.Errorf("%.60s: %+v", text, d)
		}
	}
}

// In a document, too, an unusable authority is left out alone, and the reason has nothing
// of a private key.
func TestDocumentWithUnusableKeys(t *testing.T) {
	t.Parallel()
	root, other := newCA(t, "a", nil), newCA(t, "b", nil)
	key := newKey(t, elliptic.P256())
	private, err := key.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	secret := base64.RawURLEncoding.EncodeToString(private)
	good := []string{x509Key(t, root.cert), jwk(t, "jwt-svid", jose.JSONWebKey{Key: root.key.Public(), KeyID: "k"})}
	for name, junk := range map[string]string{
		"unknown use":         jwk(t, "wit-svid", jose.JSONWebKey{Key: key.Public(), KeyID: "w"}),
		"no use":              jwk(t, "", jose.JSONWebKey{Key: key.Public(), KeyID: "w"}),
		"unknown kty":         `{"use":"x509-svid","kty":"XYZ"}`,
		"unknown curve":       `{"use":"jwt-svid","kid":"a","kty":"OKP","crv":"X448","x":"AAAA"}`,
		"point off the curve": `{"use":"jwt-svid","kid":"a","kty":"EC","crv":"P-256","x":"AAAA","y":"AAAA"}`,
		"oct":                 `{"use":"jwt-svid","kid":"a","kty":"oct","k":"` + secret + `"}`,
		"a private key":       jwk(t, "jwt-svid", jose.JSONWebKey{Key: key, KeyID: "p"}),
		"a CA's private key":  jwk(t, "x509-svid", jose.JSONWebKey{Key: key, Certificates: []*x509.Certificate{selfSigned(t, key)}}),
		"no kid":              jwk(t, "jwt-svid", jose.JSONWebKey{Key: key.Public()}),
		"a kid in use":        jwk(t, "jwt-svid", jose.JSONWebKey{Key: key.Public(), KeyID: "k"}),
		"x5c of two":          x509Key(t, other.cert, root.cert),
		"no x5c":              jwk(t, "x509-svid", jose.JSONWebKey{Key: key.Public()}),
		"x5c of another key":  `{"use":"x509-svid","kty":"EC","crv":"P-256","x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4","y":"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM","x5c":["` + base64.StdEncoding.EncodeToString(other.cert.Raw) + `"]}`,
		"no CA":               x509Key(t, other.leaf(t)),
		"a number":            "1", "null": "null", "a list": "[]", "a use that is a number": `{"use":1}`,
	} {
		for _, keys := range [][]string{append(slices.Clone(good), junk), append(slices.Clone(good), junk, junk, good[0])} {
			d, err := bundle.ReadJSON([]byte(doc(keys...)))
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			if len(d.X509) != 1 || len(d.JWT) != 1 || len(d.LeftOut) != 1 || !d.X509[0].Certificate.Equal(root.cert) || !root.key.PublicKey.Equal(d.JWT[0].PublicKey) {
				t.Errorf("%s: %d X.509 and %d JWT authorities, left out %v", name, len(d.X509), len(d.JWT), d.LeftOut)
			}
			if text := fmt.Sprint(d.LeftOut); strings.Contains(text, secret) {
				t.Errorf("%s: %s", name, text)
			}
		}
	}
}

// FuzzDocument: any file or answer of an endpoint that can be parsed is a bundle that can
// be published, without private keys, and parsing its parts again gives the same.
func FuzzDocument(f *testing.F) {
	root := newCA(f, "a", nil)
	f.Add([]byte(doc(x509Key(f, root.cert), jwk(f, "jwt-svid", jose.JSONWebKey{Key: root.key.Public(), KeyID: "k"}))))
	f.Add([]byte(doc(x509Key(f, root.cert), `{"use":"x509-svid","kty":"XYZ"}`, `{"use":"jwt-svid","kid":"k","kty":"oct","k":"AAAA"}`, "1")))
	f.Add([]byte(`{"keys":[{"use":"jwt-svid","kid":"a","kty":"RSA","n":"AQAB","e":"AQAB"}],"spiffe_sequence":18446744073709551615,"spiffe_refresh_hint":-1}`))
	f.Add(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.cert.Raw}))
	f.Fuzz(func(t *testing.T, data []byte) {
		d, err := bundle.Read(data)
		if (d == nil) == (err == nil) {
			t.Fatalf("got %v, %v", d, err)
		}
		if err != nil {
			return
		}
		if d.RefreshHint < 0 {
			t.Errorf("refresh hint %v", d.RefreshHint)
		}
		b, err := bundle.New(td, d.Content)
		if (err == nil) != (len(d.X509) > 0) {
			t.Fatalf("%d X.509 authorities: %v", len(d.X509), err)
		}
		if err != nil {
			return
		}
		c := bundle.Content{X509: b.X509(), JWT: b.JWT()}
		if bytes.Contains(b.JWKS(), []byte(`"d":`)) || len(b.JWT()) != len(d.JWT) || len(b.X509()) != len(d.X509) || c.Digest() != d.Digest() {
			t.Errorf("%s of %+v", b.JWKS(), d)
		}
		for _, k := range b.JWT() {
			if _, err := x509.MarshalPKIXPublicKey(k.PublicKey); err != nil {
				t.Errorf("key %q: %v", k.KeyID, err)
			}
		}
	})
}
