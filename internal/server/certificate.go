package server

import (
	"crypto/tls"
	"slices"

	"github.com/renewd/renewd/internal/server/keyset"
)

// certificate returns the server's X.509-SVID for relying parties and remote operators.
// It outlives the activation of another keyset, as long as its authority is published
// and half of its lifetime is left. A relying party fetches the bundle every few minutes
// only. If it has not seen the new authority by then, it could not fetch the bundle that
// has it.
func (d *Domain) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) { return d.certs.Get() }

// newCertificate issues the certificate from the first deployment whose active keyset
// has not expired. Any will do: they share the server's ID and trust all authorities.
func (d *Domain) newCertificate() (*tls.Certificate, error) {
	now := d.cfg.Now()
	for _, dep := range d.deployments {
		if now.Before(dep.keysets.Active().ExpiresAt) {
			return dep.server.Certificate()
		}
	}
	return d.deployments[0].server.Certificate() // its error says that the keyset has expired
}

func publishes(b *keyset.Bundle, authority string) bool {
	return slices.ContainsFunc(b.X509, func(a keyset.X509Authority) bool { return a.ID == authority })
}
