package kubernetes

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// pki is the cluster's certificate authority, and the folder of all certificates and keys:
// NAME.pem and NAME.key.
type pki struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newPKI(dir string) (*pki, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	p := &pki{dir: dir}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: "kubernetes-ca"},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	key, err := p.issue("ca", template)
	if err != nil {
		return nil, err
	}
	p.cert, p.key = template, key
	// The key that signs service account tokens.
	_, err = p.issue("service-account", &x509.Certificate{Subject: pkix.Name{CommonName: "service-accounts"}})
	return p, err
}

func (p *pki) file(name string) string { return filepath.Join(p.dir, name) }

// load reads a certificate with its key.
func (p *pki) load(name string) ([]tls.Certificate, error) {
	cert, err := tls.LoadX509KeyPair(p.file(name+".pem"), p.file(name+".key"))
	return []tls.Certificate{cert}, err
}

// issueServer writes a serving certificate.
func (p *pki) issueServer(name string, dnsNames []string, ips ...string) error {
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: name},
		DNSNames:    dnsNames,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, ip := range ips {
		template.IPAddresses = append(template.IPAddresses, net.ParseIP(ip))
	}
	_, err := p.issue(name, template)
	return err
}

// issueClient writes a client certificate of a user, and a kubeconfig with it, NAME.kubeconfig.
func (p *pki) issueClient(name, server, user string, groups ...string) error {
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: user, Organization: groups},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if _, err := p.issue(name, template); err != nil {
		return err
	}
	config := fmt.Sprintf(`apiVersion: v1
kind: Config
clusters:
- {name: test, cluster: {server: %q, certificate-authority: %q}}
users:
- {name: test, user: {client-certificate: %q, client-key: %q}}
contexts:
- {name: test, context: {cluster: test, user: test}}
current-context: test
`, server, p.file("ca.pem"), p.file(name+".pem"), p.file(name+".key"))
	return os.WriteFile(p.file(name+".kubeconfig"), []byte(config), 0o600)
}

// issue writes a new key and its certificate, signed by the authority or, before there is one,
// by itself. It completes the template.
func (p *pki) issue(name string, template *x509.Certificate) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	if template.SerialNumber, err = rand.Int(rand.Reader, big.NewInt(1<<62)); err != nil {
		return nil, err
	}
	template.NotBefore = time.Now().Add(-time.Minute)
	template.NotAfter = time.Now().Add(24 * time.Hour)
	parent, signer := template, crypto.Signer(key)
	if p.cert != nil {
		parent, signer = p.cert, p.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		return nil, fmt.Errorf("certificate %s: %w", name, err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	for file, block := range map[string]*pem.Block{
		name + ".pem": {Type: "CERTIFICATE", Bytes: der},
		name + ".key": {Type: "PRIVATE KEY", Bytes: keyDER},
	} {
		if err := os.WriteFile(p.file(file), pem.EncodeToMemory(block), 0o600); err != nil {
			return nil, err
		}
	}
	return key, nil
}
