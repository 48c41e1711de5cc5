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
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/renewd/renewd/test/kubetest"
)

// Nodes with certificates and nodes of a Kubernetes cluster attest at a real SPIRE server, as
// often as it wants.
func TestNodesUnderSPIRE(t *testing.T) {
	t.Parallel()
	env := withSPIRE(t)
	dir, err := os.MkdirTemp("", "rn") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	writeNodeCertificates(t, dir)
	servePublished(t, dir)

	api := kubetest.Start(t)
	part := base64.RawURLEncoding.EncodeToString
	token := part([]byte(`{"alg":"RS256"}`)) + "." + part(fmt.Appendf(nil, `{"aud":["spire-server"],"exp":%d}`, time.Now().Add(time.Hour).Unix())) + "." + part([]byte("x"))
	api.Put(token, kubetest.Pod{
		Namespace: "renewd", ServiceAccount: "renewd-agent", Name: "renewd-agent-x", UID: "pod-1", Labels: map[string]string{"app": "renewd"},
		HostIP: "10.0.0.1", Node: "node-1", NodeUID: "node-uid-1", Audiences: []string{"spire-server"},
	})
	if err := os.WriteFile(filepath.Join(dir, "token"), []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	env["NODE"], env["KUBE"] = dir, api.Kubeconfig(t)
	run(t, "spire-nodes.txtar", env)
}

// writeNodeCertificates writes root.pem and, for an RSA and an ECDSA key below an
// intermediate of that root, rsa.pem and rsa.key, ecdsa.pem and ecdsa.key. The first file
// has the intermediate after the certificate; the second one's is in intermediate.pem.
func writeNodeCertificates(t *testing.T, dir string) {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	serial := int64(0)
	issue := func(name string, key crypto.Signer, parent *x509.Certificate, parentKey crypto.Signer) *x509.Certificate {
		serial++
		template := &x509.Certificate{
			SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		}
		if name == "root" || name == "intermediate" {
			template.IsCA, template.KeyUsage = true, x509.KeyUsageCertSign
		}
		if parent == nil {
			parent, parentKey = template, key
		}
		der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
		check(err)
		cert, err := x509.ParseCertificate(der)
		check(err)
		return cert
	}
	write := func(name, kind string, ders ...[]byte) {
		var out []byte
		for _, der := range ders {
			out = append(out, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})...)
		}
		check(os.WriteFile(filepath.Join(dir, name), out, 0o600))
	}
	newKey := func() *ecdsa.PrivateKey {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		check(err)
		return key
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	check(err)
	rootKey, interKey := newKey(), newKey()
	root := issue("root", rootKey, nil, nil)
	inter := issue("intermediate", interKey, root, rootKey)
	write("root.pem", "CERTIFICATE", root.Raw)
	write("intermediate.pem", "CERTIFICATE", inter.Raw)
	for name, key := range map[string]crypto.Signer{"rsa": rsaKey, "ecdsa": newKey()} {
		chain := [][]byte{issue(name, key, inter, interKey).Raw}
		if name == "rsa" {
			chain = append(chain, inter.Raw)
		}
		write(name+".pem", "CERTIFICATE", chain...)
		der, err := x509.MarshalPKCS8PrivateKey(key)
		check(err)
		write(name+".key", "PRIVATE KEY", der)
	}
}

// servePublished publishes the file bundle of a folder at its socket publisher.sock, once
// it is there, and checks that the caller says what spire-agent says.
func servePublished(t *testing.T, dir string) {
	t.Helper()
	lis, err := net.Listen("unix", filepath.Join(dir, "publisher.sock"))
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if q := r.URL.Query(); q.Get("spire-attest-mode") != "bootstrap" || q.Get("spiffe-trust-domain") != "example.org" {
			http.Error(w, "who asks?", http.StatusBadRequest)
			return
		}
		http.ServeFile(w, r, filepath.Join(dir, "bundle"))
	})}
	done := make(chan error, 1)
	go func() { done <- s.Serve(lis) }()
	t.Cleanup(func() {
		_ = s.Close()
		<-done
	})
}
