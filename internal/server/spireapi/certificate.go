package spireapi

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"sync"
	"time"
)

// CertificateCache keeps a TLS certificate of the server until half of its
// lifetime is over or Usable rejects its authority. Because the clock can be
// stepped, this is checked for each handshake. All fields are required.
type CertificateCache struct {
	Now    func() time.Time
	Usable func(authorityID string) bool
	Issue  func() (*tls.Certificate, error)

	mu   sync.Mutex
	cert *tls.Certificate
	leaf *x509.Certificate // nil before the first is issued
}

// Get returns the certificate, and issues a new one if necessary.
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
