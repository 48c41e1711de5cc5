package server

import (
	"cmp"
	"context"
	"crypto/x509"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/server/federation"
	"github.com/renewd/renewd/internal/server/keyset"
)

// openFederation gives the servers of all deployments the stored bundles of federated
// trust domains.
func (d *Domain) openFederation(ctx context.Context) error {
	c := federation.Config{
		TrustDomain: d.cfg.TrustDomain, Own: func() []*x509.Certificate { return d.Published().Certificates() },
		Endpoints: d.cfg.Federation, Storage: d.store, Publish: d.setFederatedBundle, Dial: d.cfg.FederationDial, Log: d.cfg.Log, Now: d.cfg.Now,
		Observe: func(td spiffeid.TrustDomain, outcome string) { d.metrics.FederatedBundleRefreshed(td.Name(), outcome) },
	}
	var err error
	if d.federation, err = federation.New(ctx, c); err != nil {
		return err
	}
	d.warnNotFollowed()
	return nil
}

// warnNotFollowed logs entries that federate with a trust domain that is not configured.
func (d *Domain) warnNotFollowed() {
	for _, dep := range d.deployments {
		unknown := make(map[string]int)
		for _, e := range dep.server.Entries() {
			for _, td := range e.FederatesWith {
				if !d.federation.Follows(td) {
					unknown[td.Name()]++
				}
			}
		}
		for _, name := range slices.Sorted(maps.Keys(unknown)) {
			d.cfg.Log.Warn("entries federate with a trust domain that is not configured: their workloads do not get its bundle",
				"deployment", dep.Name, "trust_domain", name, "entries", unknown[name])
		}
	}
}

// setFederatedBundle gives all servers the bundle of another trust domain; nil
// withdraws it.
func (d *Domain) setFederatedBundle(td spiffeid.TrustDomain, b *spiffebundle.Bundle) {
	var out *keyset.Bundle
	var hint time.Duration
	if b != nil {
		out = convertBundle(b)
		hint, _ = b.RefreshHint()
	}
	for _, dep := range d.deployments {
		if err := dep.server.SetFederatedBundle(td, out, hint); err != nil {
			d.cfg.Log.Error("federated bundle rejected", "deployment", dep.Name, "trust_domain", td.Name(), "error", err)
		}
	}
}

// convertBundle converts a federated bundle. SPIFFE's format has neither taint marks nor
// expiry times of JWT keys.
func convertBundle(b *spiffebundle.Bundle) *keyset.Bundle {
	out := new(keyset.Bundle)
	out.Sequence, _ = b.SequenceNumber()
	for _, cert := range b.X509Authorities() {
		out.X509 = append(out.X509, keyset.X509Authority{Certificate: cert})
	}
	for id, key := range b.JWTAuthorities() {
		// The follower accepts only keys that can be encoded.
		if pkix, err := x509.MarshalPKIXPublicKey(key); err == nil {
			out.JWT = append(out.JWT, keyset.JWTAuthority{KeyID: id, PublicKey: key, PKIX: pkix})
		}
	}
	slices.SortFunc(out.JWT, func(x, y keyset.JWTAuthority) int { return cmp.Compare(x.KeyID, y.KeyID) })
	return out
}

func federatedNames(endpoints []federation.Endpoint) []string {
	var names []string
	for _, e := range endpoints {
		names = append(names, e.TrustDomain.Name())
	}
	return names
}
