package keyset_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/test/memory"
)

func TestAuthorityCertificate(t *testing.T) {
	t.Parallel()
	c := &clock{start}
	d := open(t, keyset.Config{Now: c.Now})
	a := d.Bundle().X509[0]
	ca := a.Certificate
	if len(ca.URIs) != 1 || ca.URIs[0].String() != "spiffe://example.org" || len(ca.DNSNames) > 0 {
		t.Errorf("URI SAN %v, DNS %v", ca.URIs, ca.DNSNames)
	}
	if !ca.IsCA || !ca.BasicConstraintsValid || ca.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign || len(ca.ExtKeyUsage) > 0 {
		t.Errorf("CA %v, key usage %b, extended %v", ca.IsCA, ca.KeyUsage, ca.ExtKeyUsage)
	}
	if len(ca.SubjectKeyId) == 0 || a.ID != hex.EncodeToString(ca.SubjectKeyId) || a.ID != d.Active().X509AuthorityID {
		t.Errorf("authority ID %q, SKI %x", a.ID, ca.SubjectKeyId)
	}
	if err := ca.CheckSignatureFrom(ca); err != nil {
		t.Errorf("not self-signed: %v", err)
	}
	if !ca.NotBefore.Before(start) || !ca.NotAfter.Equal(d.Active().ExpiresAt) {
		t.Errorf("valid from %v to %v", ca.NotBefore, ca.NotAfter)
	}
	block, rest := pem.Decode(d.BundlePEM())
	if block == nil || block.Type != "CERTIFICATE" || !bytes.Equal(block.Bytes, ca.Raw) || len(rest) > 0 {
		t.Errorf("PEM is %s", d.BundlePEM())
	}
}

func TestSignX509(t *testing.T) {
	t.Parallel()
	c := &clock{start}
	d := open(t, keyset.Config{Now: c.Now})
	key := newKey(t)
	svid, err := d.SignX509(workload, key.Public(), 2*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	cert := parse(t, svid.DER)
	now := start.Truncate(time.Second)
	if !cert.NotBefore.Equal(now.Add(-10*time.Second)) || !cert.NotAfter.Equal(now.Add(2*time.Hour)) {
		t.Errorf("valid from %v to %v", cert.NotBefore, cert.NotAfter)
	}
	if !cert.NotBefore.Equal(svid.NotBefore) || !cert.NotAfter.Equal(svid.NotAfter) || cert.SerialNumber.String() != svid.Serial {
		t.Errorf("the certificate has %v, %v, %v; SignX509 returned %v", cert.NotBefore, cert.NotAfter, cert.SerialNumber, svid)
	}
	if cert.IsCA || cert.KeyUsage != x509.KeyUsageDigitalSignature|x509.KeyUsageKeyEncipherment|x509.KeyUsageKeyAgreement {
		t.Errorf("CA %v, key usage %b", cert.IsCA, cert.KeyUsage)
	}
	if fmt.Sprint(cert.ExtKeyUsage) != fmt.Sprint([]x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}) {
		t.Errorf("extended key usage %v", cert.ExtKeyUsage)
	}
	if hex.EncodeToString(cert.AuthorityKeyId) != d.Active().X509AuthorityID || svid.Authority != d.Active().X509AuthorityID {
		t.Errorf("AKI %x, authority %s", cert.AuthorityKeyId, svid.Authority)
	}
	if cert.SerialNumber.Sign() <= 0 || len(cert.SerialNumber.Bytes()) > 20 {
		t.Errorf("serial number %v", cert.SerialNumber)
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		t.Error("another key was signed")
	}
	authorities := x509bundle.FromX509Authorities(td, d.Bundle().Certificates())
	id, _, err := x509svid.Verify([]*x509.Certificate{cert}, authorities, x509svid.WithTime(start))
	if err != nil || id != workload {
		t.Errorf("verified %v, %v", id, err)
	}
}

func TestLifetimes(t *testing.T) {
	t.Parallel()
	c := &clock{start}
	d := open(t, keyset.Config{Now: c.Now})
	key, end := newKey(t), d.Active().ExpiresAt
	for name, tt := range map[string]struct {
		now  time.Time
		ttl  time.Duration
		want time.Time
	}{
		"default":          {start, 0, start.Truncate(time.Second).Add(24 * time.Hour)},
		"asked for":        {start, 5 * time.Hour, start.Truncate(time.Second).Add(5 * time.Hour)},
		"capped by the CA": {end.Add(-time.Minute), time.Hour, end},
	} {
		c.now = tt.now
		x, err := d.SignX509(workload, key.Public(), tt.ttl)
		if err != nil || !x.NotAfter.Equal(tt.want) {
			t.Errorf("%s: X.509 until %v, want %v (%v)", name, x.NotAfter, tt.want, err)
		}
		j, err := d.SignJWT(workload, []string{"a"}, tt.ttl)
		if err != nil || !j.ExpiresAt.Equal(tt.want) {
			t.Errorf("%s: JWT until %v, want %v (%v)", name, j.ExpiresAt, tt.want, err)
		}
	}
}

func TestSignRefuses(t *testing.T) {
	t.Parallel()
	c := &clock{start}
	d := open(t, keyset.Config{Now: c.Now})
	foreign := spiffeid.RequireFromString("spiffe://other.org/workload")
	for name, tt := range map[string]struct {
		id   spiffeid.ID
		ttl  time.Duration
		now  time.Time
		want error
	}{
		"no ID":               {spiffeid.ID{}, 0, start, keyset.ErrSignForeign},
		"other trust domain":  {foreign, 0, start, keyset.ErrSignForeign},
		"trust domain itself": {td.ID(), 0, start, keyset.ErrSignReserved},
		"expired keyset":      {workload, 0, d.Active().ExpiresAt, keyset.ErrSignExpired},
		"negative lifetime":   {workload, -1, start, keyset.ErrSignNegativeLife},
	} {
		c.now = tt.now
		if _, err := d.SignX509(tt.id, newKey(t).Public(), tt.ttl); !errors.Is(err, tt.want) {
			t.Errorf("%s: X.509: %v", name, err)
		}
		if _, err := d.SignJWT(tt.id, []string{"a"}, tt.ttl); !errors.Is(err, tt.want) {
			t.Errorf("%s: JWT: %v", name, err)
		}
	}
	c.now = start
	if _, err := d.SignX509(workload, "no key", 0); err == nil {
		t.Error("signed an invalid key")
	}
	for _, audience := range [][]string{nil, {""}} {
		if _, err := d.SignJWT(workload, audience, 0); !errors.Is(err, keyset.ErrSignNoAudience) {
			t.Errorf("audience %q: %v", audience, err)
		}
	}
}

// The size of a token is bounded: with few long audiences, with many short ones, and
// with those that are longer in JSON.
func TestSignJWTBoundsAudience(t *testing.T) {
	t.Parallel()
	d := open(t, keyset.Config{})
	for name, tt := range map[string]struct {
		audience []string
		signed   bool
	}{
		"long":           {[]string{strings.Repeat("x", 64<<10-5)}, true},
		"64 KiB":         {[]string{strings.Repeat("x", 64<<10-4)}, false},
		"too long":       {[]string{strings.Repeat("x", 64<<10)}, false},
		"many":           {slices.Repeat([]string{"a"}, 16<<10-1), true},
		"too many":       {slices.Repeat([]string{"a"}, 16<<10+1), false},
		"longer in JSON": {[]string{strings.Repeat("\x01", 16<<10)}, false},
	} {
		svid, err := d.SignJWT(workload, tt.audience, 0)
		if signed := err == nil; signed != tt.signed || !signed && !errors.Is(err, keyset.ErrSignLongAudience) {
			t.Errorf("%s: %v", name, err)
		}
		if len(svid.Token) > 90<<10 {
			t.Errorf("%s: a token of %d bytes", name, len(svid.Token))
		}
	}
}

func TestSignJWT(t *testing.T) {
	t.Parallel()
	d := open(t, keyset.Config{})
	svid, err := d.SignJWT(workload, []string{"a", "", "b"}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	token, err := jwt.ParseSigned(svid.Token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		t.Fatal(err)
	}
	head := token.Headers[0]
	if head.KeyID != d.Active().JWTKeyID || svid.KeyID != head.KeyID || head.ExtraHeaders["typ"] != "JWT" {
		t.Errorf("header %v", head)
	}
	var claims jwt.Claims
	key := d.Bundle().JWT[0]
	if err := token.Claims(key.PublicKey, &claims); err != nil {
		t.Fatal(err)
	}
	if claims.Subject != workload.String() || fmt.Sprint(claims.Audience) != "[a b]" ||
		!claims.Expiry.Time().Equal(svid.ExpiresAt) || !claims.IssuedAt.Time().Equal(svid.IssuedAt) {
		t.Errorf("claims %+v, SignJWT returned %v", claims, svid)
	}
	fromPKIX, err := x509.ParsePKIXPublicKey(key.PKIX)
	if err != nil || !fromPKIX.(*ecdsa.PublicKey).Equal(key.PublicKey) {
		t.Errorf("the published key in DER: %v", err)
	}
	keys := jwtbundle.New(td)
	if err := keys.AddJWTAuthority(key.KeyID, key.PublicKey); err != nil {
		t.Fatal(err)
	}
	if got, err := jwtsvid.ParseAndValidate(svid.Token, keys, []string{"b"}); err != nil || got.ID != workload {
		t.Errorf("validated %v, %v", got, err)
	}
}

// TestJWTClaims: aud is always an array, because clients index it, and jti is there if
// it was asked for and is unique.
func TestJWTClaims(t *testing.T) {
	t.Parallel()
	d := open(t, keyset.Config{})
	claims := func(svid keyset.JWTSVID, err error) map[string]any {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		token, err := jwt.ParseSigned(svid.Token, []jose.SignatureAlgorithm{jose.ES256})
		if err != nil {
			t.Fatal(err)
		}
		var out map[string]any
		if err := token.Claims(d.Bundle().JWT[0].PublicKey, &out); err != nil {
			t.Fatal(err)
		}
		return out
	}
	for _, audience := range [][]string{{"a"}, {"a", "b"}} {
		plain := claims(d.SignJWT(workload, audience, time.Hour))
		if list, ok := plain["aud"].([]any); !ok || len(list) != len(audience) || list[0] != "a" {
			t.Errorf("aud of %q is %v", audience, plain["aud"])
		}
		if len(plain) != 4 {
			t.Errorf("claims %v, want sub, aud, iat and exp", plain)
		}
	}
	seen := map[any]bool{}
	for range 2 {
		with := claims(d.SignJWTWithID(workload, []string{"a"}, time.Hour))
		id, _ := with["jti"].(string)
		if len(id) < 22 || seen[id] || len(with) != 5 { // 128 bits in base64url
			t.Errorf("claims %v, jti before: %v", with, seen)
		}
		seen[id] = true
	}
}

// TestSignsWithTheActiveKeyset checks the authority of signatures during a rotation.
func TestSignsWithTheActiveKeyset(t *testing.T) {
	t.Parallel()
	d := open(t, keyset.Config{})
	old := d.Active()
	signedBy := func(want keyset.Keyset) {
		t.Helper()
		x, err := d.SignX509(workload, newKey(t).Public(), 0)
		if err != nil || x.Authority != want.X509AuthorityID {
			t.Errorf("X.509 by %s, want %s (%v)", x.Authority, want.X509AuthorityID, err)
		}
		j, err := d.SignJWT(workload, []string{"a"}, 0)
		if err != nil || j.KeyID != want.JWTKeyID {
			t.Errorf("JWT by %s, want %s (%v)", j.KeyID, want.JWTKeyID, err)
		}
	}
	next, err := d.Prepare(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	signedBy(old)
	if err := d.Activate(t.Context(), next.ID); err != nil {
		t.Fatal(err)
	}
	signedBy(next)
	if err := d.Activate(t.Context(), old.ID); err != nil {
		t.Fatal(err)
	}
	signedBy(old)
}

func TestParseCSR(t *testing.T) {
	t.Parallel()
	request := func(key any) []byte {
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: []string{"ignored.example"}}, key)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	rsaKey := func(bits int) *rsa.PrivateKey {
		key, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ec := newKey(t)
	curve := func(c elliptic.Curve) *ecdsa.PrivateKey {
		key, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	for name, key := range map[string]any{"ec-p256": ec, "ec-p384": curve(elliptic.P384()), "ec-p521": curve(elliptic.P521()), "rsa-2048": rsaKey(2048)} {
		pub, err := keyset.ParseCSR(request(key))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		d := open(t, keyset.Config{})
		svid, err := d.SignX509(workload, pub, 0)
		if err != nil {
			t.Errorf("%s: sign: %v", name, err)
			continue
		}
		if cert := parse(t, svid.DER); len(cert.DNSNames) > 0 {
			t.Errorf("%s: the CSR's names were signed", name)
		}
	}
	tampered := request(ec)
	tampered[len(tampered)-1] ^= 1
	for name, der := range map[string][]byte{
		"nothing": nil, "garbage": []byte("garbage"), "signature broken": tampered, "rsa-1024": request(rsaKey(1024)),
		"trailing data": append(request(ec), 0), "ec-p224": request(curve(elliptic.P224())), "ed25519": request(ed),
	} {
		if _, err := keyset.ParseCSR(der); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// The work for an RSA key grows with its size and its exponent: a key that is too large
// is refused before its signature is verified.
func TestParseCSRBoundsRSA(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		bits, exponent int
		within         bool
	}{
		{2047, 65537, false}, {2048, 65537, true}, {2048, 3, true}, {3072, 65537, true}, {4096, 65537, true},
		{4097, 65537, false}, {8192, 65537, false}, {16384, 65537, false}, {2048, 65539, false}, {2048, 1<<31 - 1, false},
	} {
		n := new(big.Int).Lsh(big.NewInt(1), uint(tt.bits-1))
		_, err := keyset.ParseCSR(unsigned(t, &rsa.PublicKey{N: n.SetBit(n, 0, 1), E: tt.exponent}))
		if err == nil {
			t.Fatalf("%d bits, exponent %d: a wrong signature was accepted", tt.bits, tt.exponent)
		}
		if verified := strings.Contains(err.Error(), "signature"); verified != tt.within {
			t.Errorf("%d bits, exponent %d: signature verified: %v, want %v (%v)", tt.bits, tt.exponent, verified, tt.within, err)
		}
	}
}

// unsigned returns a request for a key (RFC 2986, section 4) with a signature of zeros.
func unsigned(t *testing.T, key *rsa.PublicKey) []byte {
	t.Helper()
	public, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	type info struct {
		Version          int
		Subject, Key     asn1.RawValue
		AttributesTagged []asn1.RawValue `asn1:"tag:0"`
	}
	der, err := asn1.Marshal(struct {
		Info      info
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}{
		info{Subject: asn1.RawValue{FullBytes: []byte{0x30, 0}}, Key: asn1.RawValue{FullBytes: public}},
		pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 11}, Parameters: asn1.NullRawValue},
		asn1.BitString{Bytes: make([]byte, key.Size()), BitLength: 8 * key.Size()},
	})
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// FuzzParseCSR signs for each parsed CSR: exactly its key is signed.
func FuzzParseCSR(f *testing.F) {
	key := newKey(f)
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		f.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	edDER, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, ed)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(der)
	f.Add(edDER)
	f.Add(der[:len(der)/2])
	d, err := keyset.Open(f.Context(), keyset.Config{TrustDomain: td, Storage: new(memory.Keysets)})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, der []byte) {
		pub, err := keyset.ParseCSR(der)
		if err != nil {
			return
		}
		svid, err := d.SignX509(workload, pub, 0)
		if err != nil {
			t.Fatalf("accepted, but not signed: %v", err)
		}
		cert := parse(t, svid.DER)
		if len(cert.URIs) != 1 || cert.URIs[0].String() != workload.String() || cert.IsCA {
			t.Fatalf("signed %v, CA %v", cert.URIs, cert.IsCA)
		}
		want, err := x509.MarshalPKIXPublicKey(pub)
		if err != nil || sha256.Sum256(want) != sha256.Sum256(cert.RawSubjectPublicKeyInfo) {
			t.Fatalf("another key was signed (%v)", err)
		}
	})
}

func BenchmarkSignX509(b *testing.B) {
	d := open(b, keyset.Config{})
	pub := newKey(b).Public()
	for b.Loop() {
		if _, err := d.SignX509(workload, pub, 0); err != nil {
			b.Fatal(err)
		}
	}
}
