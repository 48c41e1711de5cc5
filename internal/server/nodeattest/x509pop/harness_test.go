package x509pop_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1" //nolint:gosec // as in the package
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/server/nodeattest/x509pop"
	"github.com/renewd/renewd/internal/server/spireapi"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// now is in the validity of all certificates.
var now = time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)

// identity is a certificate and its key.
type identity struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func ecKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	return key
}

// rsaKey returns the same key each time: making one is slow.
var rsaKey = sync.OnceValue(func() crypto.Signer {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return key
})

func edKey(t testing.TB) crypto.Signer {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	check(t, err)
	return key
}

// issue makes a certificate, signed by parent or by itself.
func issue(t testing.TB, parent *identity, key crypto.Signer, change func(*x509.Certificate)) *identity {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(0xabc), Subject: pkix.Name{CommonName: "node1"}, KeyUsage: x509.KeyUsageDigitalSignature,
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
	}
	if change != nil {
		change(template)
	}
	signer := &identity{template, key}
	if parent != nil {
		signer = parent
	}
	der, err := x509.CreateCertificate(rand.Reader, template, signer.cert, key.Public(), signer.key)
	check(t, err)
	cert, err := x509.ParseCertificate(der)
	check(t, err)
	return &identity{cert, key}
}

// authority makes a CA.
func authority(t testing.TB, parent *identity, name string) *identity {
	t.Helper()
	return issue(t, parent, ecKey(t), func(c *x509.Certificate) {
		c.Subject.CommonName, c.IsCA, c.BasicConstraintsValid, c.KeyUsage = name, true, true, x509.KeyUsageCertSign
	})
}

// writeCAs writes a PEM file.
func writeCAs(t testing.TB, path string, cas ...*identity) string {
	t.Helper()
	var out []byte
	for _, ca := range cas {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw})...)
	}
	if path == "" {
		path = filepath.Join(t.TempDir(), "ca.pem")
	}
	check(t, os.WriteFile(path, out, 0o600))
	return path
}

func newVerifier(t testing.TB, c x509pop.Config) *x509pop.Verifier {
	t.Helper()
	c.TrustDomain = td
	c.Now = func() time.Time { return now }
	v, err := x509pop.New(c)
	check(t, err)
	return v
}

// attest attests with a node's certificate and intermediates. change may change the answer.
func attest(t testing.TB, v *x509pop.Verifier, node *identity, intermediates []*identity, change func(map[string]any)) (spireapi.AttestedNode, error) {
	t.Helper()
	certs := [][]byte{node.cert.Raw}
	for _, i := range intermediates {
		certs = append(certs, i.cert.Raw)
	}
	payload, err := json.Marshal(map[string]any{"certificates": certs})
	check(t, err)
	return v.Verify(t.Context(), payload, func(challenge []byte) ([]byte, error) { return answer(t, node.key, challenge, change), nil })
}

// answer answers a challenge as an agent does.
func answer(t testing.TB, key crypto.Signer, challenge []byte, change func(map[string]any)) []byte {
	t.Helper()
	var c map[string]*struct{ Nonce []byte }
	check(t, json.Unmarshal(challenge, &c))
	kind := "ecdsa_signature"
	if _, ok := key.(*rsa.PrivateKey); ok {
		kind = "rsa_signature"
	}
	if c[kind] == nil || len(c[kind].Nonce) != 32 || len(c) != 2 {
		t.Errorf("challenge %s", challenge)
	}
	own := make([]byte, 32)
	_, _ = rand.Read(own)
	digest := sha256.Sum256(append(c[kind].Nonce, own...))
	a := map[string]any{"nonce": own}
	switch key := key.(type) {
	case *rsa.PrivateKey:
		signature, err := rsa.SignPSS(rand.Reader, key, crypto.SHA256, digest[:], nil)
		check(t, err)
		a["signature"] = signature
	case *ecdsa.PrivateKey:
		r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
		check(t, err)
		a["r"], a["s"] = r.Bytes(), s.Bytes()
	}
	if change != nil {
		change(a)
	}
	out, err := json.Marshal(map[string]any{kind: a})
	check(t, err)
	return out
}

func fingerprint(i *identity) string {
	sum := sha1.Sum(i.cert.Raw) //nolint:gosec // as in the package
	return hex.EncodeToString(sum[:])
}

func parseURI(t testing.TB, s string) *url.URL {
	t.Helper()
	u, err := url.Parse(s)
	check(t, err)
	return u
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
