package agent_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/agent"
	"github.com/renewd/renewd/internal/agent/node"
)

// An agent SVID counts for the authority in which its chain ends, as a workload's does,
// also when the root has no key identifier.
func TestSignerWithoutKeyIdentifier(t *testing.T) {
	t.Parallel()
	domain := spiffeid.RequireTrustDomainFromString("example.org")
	now := time.Now()
	serial := int64(0)
	create := func(template *x509.Certificate, parent *x509.Certificate, by *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
		t.Helper()
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		serial++
		template.SerialNumber, template.NotBefore, template.NotAfter = big.NewInt(serial), now.Add(-time.Minute), now.Add(time.Hour)
		if by == nil {
			by = key
		}
		der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), by)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return cert, key
	}
	isCA, err := asn1.Marshal(struct{ CA bool }{true})
	if err != nil {
		t.Fatal(err)
	}
	// crypto/x509 adds a key identifier to templates with IsCA.
	name := pkix.Name{CommonName: "root"}
	root, rootKey := create(&x509.Certificate{Subject: name, KeyUsage: x509.KeyUsageCertSign,
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: isCA}}}, &x509.Certificate{Subject: name}, nil)
	if !root.IsCA || len(root.SubjectKeyId) != 0 {
		t.Fatalf("a root with CA %v and subject key identifier %x", root.IsCA, root.SubjectKeyId)
	}
	intermediate, intermediateKey := create(&x509.Certificate{Subject: pkix.Name{CommonName: "intermediate"}, KeyUsage: x509.KeyUsageCertSign,
		IsCA: true, BasicConstraintsValid: true, URIs: []*url.URL{domain.ID().URL()}}, root, rootKey)
	leaf, key := create(&x509.Certificate{KeyUsage: x509.KeyUsageDigitalSignature,
		URIs: []*url.URL{spiffeid.RequireFromPath(domain, "/spire/agent/x").URL()}}, intermediate, intermediateKey)

	b, err := bundle.New(domain, bundle.Content{X509: []bundle.X509Authority{{Certificate: root, Tainted: true, TaintedSince: now}}})
	if err != nil {
		t.Fatal(err)
	}
	id := &node.Identity{Key: key, Chain: []*x509.Certificate{leaf, intermediate}}
	if got, want := agent.SignerOf(id, b), bundle.AuthorityID(root); got != want {
		t.Errorf("the agent SVID counts for %q, want the root, which is %q", got, want)
	}
}
