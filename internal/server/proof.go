package server

import (
	"crypto/tls"
	"slices"

	"github.com/renewd/renewd/internal/server/keyset"
)

// certificate returns the certificate that the server shows to relying parties and
// remote operators. It is kept when another keyset becomes active, as long as its
// authority is published and half of its life is not over: a relying
// party asks for the bundle every few minutes only, and one that has not seen the
// new authority by then could never ask again.
func (d *Domain) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) { return d.proof.Get() }

// newCertificate is one of any deployment, since all agree on the server's ID and
// trust all authorities: of the first whose keyset has not expired.
func (d *Domain) newCertificate() (*tls.Certificate, error) {
	now := d.cfg.Now()
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
