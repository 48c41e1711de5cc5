package spireapi

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"sync"
	"time"
)

// CertificateCache keeps a certificate that the server proves itself with as long as
// it holds: it has begun, half of its life is not over, and its authority is one that
// Usable accepts. Every clock step can end that, so it is looked at for each
// handshake. All fields are required.
type CertificateCache struct {
	Now    func() time.Time
	Usable func(authorityID string) bool
	Issue  func() (*tls.Certificate, error)

	mu   sync.Mutex
	cert *tls.Certificate
	leaf *x509.Certificate // nil: none yet
}

// Get returns the certificate, after issuing another one if need be.
func (c *CertificateCache) Get() (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.leaf != nil && c.holds() {
		return c.cert, nil
	}
	cert, err := c.Issue()
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		return nil, fmt.Errorf("server certificate: %w", err)
	}
	c.cert, c.leaf = cert, leaf
	return cert, nil
}

func (c *CertificateCache) holds() bool {
	now, life := c.Now(), c.leaf.NotAfter.Sub(c.leaf.NotBefore)
	return !now.Before(c.leaf.NotBefore) && now.Before(c.leaf.NotBefore.Add(life/2)) &&
		c.Usable(hex.EncodeToString(c.leaf.AuthorityKeyId))
}
