package domain

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/renewd/renewd/internal/keyset"
)

// proof is the certificate that the server shows to relying parties and remote
// operators.
type proof struct {
	mu        sync.Mutex
	cert      *tls.Certificate // nil: none yet
	authority string
	renewAt   time.Time
}

// certificate returns the proof. It is kept when another keyset becomes active, as
// long as its authority is published and half of its life is not over: a relying
// party asks for the bundle every few minutes only, and one that has not seen the
// new authority by then could never ask again.
func (d *Domain) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	p := &d.proof
	p.mu.Lock()
	defer p.mu.Unlock()
	now := d.cfg.Now()
	if p.cert != nil && now.Before(p.renewAt) && publishes(d.Published(), p.authority) {
		return p.cert, nil
	}
	cert, err := d.newCertificate(now)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		return nil, fmt.Errorf("server certificate: %w", err)
	}
	p.cert, p.authority = cert, hex.EncodeToString(leaf.AuthorityKeyId)
	p.renewAt = leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore) / 2)
	return cert, nil
}

// newCertificate is one of any deployment, since all agree on the server's ID and
// trust all authorities: of the first whose keyset has not expired.
func (d *Domain) newCertificate(now time.Time) (*tls.Certificate, error) {
	for _, dep := range d.deployments {
		if now.Before(dep.keysets.Active().ExpiresAt) {
			return dep.server.Certificate()
		}
	}
	return d.deployments[0].server.Certificate() // the error says it
}

func publishes(b *keyset.Bundle, authority string) bool {
	return slices.ContainsFunc(b.X509, func(a keyset.X509Authority) bool { return a.ID == authority })
}
