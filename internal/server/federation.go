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

// openFederation has the servers of all deployments know the bundles of other
// trust domains that are held, and says which entries want more.
func (d *Domain) openFederation(ctx context.Context) error {
	c := federation.Config{
		TrustDomain: d.cfg.TrustDomain, Own: func() []*x509.Certificate { return d.Published().Certificates() },
		Endpoints: d.cfg.Federation, Publish: d.federate, Dial: d.cfg.FederationDial, Log: d.cfg.Log, Now: d.cfg.Now,
		Observe: func(td spiffeid.TrustDomain, outcome string) { d.metrics.FederatedBundleRefreshed(td.Name(), outcome) },
	}
	if d.store != nil {
		c.Storage = d.store
	}
	var err error
	if d.federation, err = federation.New(ctx, c); err != nil {
		return err
	}
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
			d.cfg.Log.Warn("entries federate with a trust domain that is not followed: their workloads do not get its bundle",
				"deployment", dep.Name, "trust_domain", name, "entries", unknown[name])
		}
	}
	return nil
}

// federate gives the servers the bundle of another trust domain; nil takes it
// away.
func (d *Domain) federate(td spiffeid.TrustDomain, b *spiffebundle.Bundle) {
	var out *keyset.Bundle
	var hint time.Duration
	if b != nil {
		out = foreign(b)
		hint, _ = b.RefreshHint()
	}
	for _, dep := range d.deployments {
		if err := dep.server.SetFederatedBundle(td, out, hint); err != nil {
			d.cfg.Log.Error("federated bundle cannot be served", "deployment", dep.Name, "error", err)
		}
	}
}

// foreign is a bundle in the form of our own. SPIFFE's format knows neither taints
// nor when a key ends.
func foreign(b *spiffebundle.Bundle) *keyset.Bundle {
	out := new(keyset.Bundle)
	out.Sequence, _ = b.SequenceNumber()
	for _, cert := range b.X509Authorities() {
		out.X509 = append(out.X509, keyset.X509Authority{Certificate: cert})
	}
	for id, key := range b.JWTAuthorities() {
		// The follower takes only keys that this form exists of.
		if pkix, err := x509.MarshalPKIXPublicKey(key); err == nil {
			out.JWT = append(out.JWT, keyset.JWTAuthority{KeyID: id, PublicKey: key, PKIX: pkix})
		}
	}
	slices.SortFunc(out.JWT, func(x, y keyset.JWTAuthority) int { return cmp.Compare(x.KeyID, y.KeyID) })
	return out
}

func followed(endpoints []federation.Endpoint) []string {
	var names []string
	for _, e := range endpoints {
		names = append(names, e.TrustDomain.Name())
	}
	return names
}
