package system_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/renewd/renewd/test/kubetest"
)

// Our agents attest to our server by what their nodes are.
func TestAgentsAttestNodes(t *testing.T) {
	t.Parallel()
	env := make(map[string]string)
	nodes(t, env)
	run(t, "attest-node.txtar", env)
}

// SPIRE's agents do the same.
func TestSPIREAgentsAttestNodes(t *testing.T) {
	t.Parallel()
	env := withSPIRE(t)
	nodes(t, env)
	run(t, "spire-attest.txtar", env)
}

// nodes makes two nodes with certificates (PKI), and one of Kubernetes, whose API server
// is in KUBECONFIG and the token of whose agent is TOKEN.
func nodes(t *testing.T, env map[string]string) {
	t.Helper()
	env["PKI"] = nodeCertificates(t)
	part := base64.RawURLEncoding.EncodeToString
	env["TOKEN"] = part([]byte(`{"alg":"RS256"}`)) + "." + part([]byte(`{"aud":["spire-server"],"exp":4102444800}`)) + "." + part([]byte("signature"))
	api := kubetest.Start(t)
	api.Put(env["TOKEN"], kubetest.Pod{
		Namespace: "spire", ServiceAccount: "spire-agent", Name: "spire-agent-x7", UID: "1b5e-pod", HostIP: "192.0.2.7", Labels: map[string]string{"app": "agent"},
		Node: "worker-1", NodeUID: "77aa-node", NodeLabels: map[string]string{"zone": "a"}, Audiences: []string{"spire-server"},
	})
	env["KUBECONFIG"] = api.Kubeconfig(t)
}

// nodeCertificates writes a CA (ca.pem), and below an intermediate (intermediate.pem) the
// certificates and keys of two nodes: rsa.pem, rsa.key, ecdsa.pem and ecdsa.key. It returns
// their folder.
func nodeCertificates(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	write := func(name, kind string, der []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	issue := func(name string, key crypto.Signer, parent *x509.Certificate, by crypto.Signer, isCA bool) *x509.Certificate {
		c := &x509.Certificate{
			SerialNumber: big.NewInt(0xabc), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
			KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true, IsCA: isCA,
		}
		if isCA {
			c.KeyUsage = x509.KeyUsageCertSign
		} else {
			c.URIs = []*url.URL{{Scheme: "x509pop", Host: "example.org", Path: "/rack/" + name}}
		}
		if parent == nil {
			parent = c
		}
		der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), by)
		if err != nil {
			t.Fatal(err)
		}
		write(name+".pem", "CERTIFICATE", der)
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	key := func() *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	caKey, intermediateKey, ecdsaKey := key(), key(), key()
	ca := issue("ca", caKey, nil, caKey, true)
	intermediate := issue("intermediate", intermediateKey, ca, caKey, true)
	for name, k := range map[string]crypto.Signer{"rsa": rsaKey, "ecdsa": ecdsaKey} {
		issue(name, k, intermediate, intermediateKey, false)
		der, err := x509.MarshalPKCS8PrivateKey(k)
		if err != nil {
			t.Fatal(err)
		}
		write(name+".key", "PRIVATE KEY", der)
	}
	return dir
}
