package server

import (
	"crypto/x509"

	"github.com/renewd/renewd/internal/server/nodeattest/k8spsat"
	"github.com/renewd/renewd/internal/server/nodeattest/x509pop"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// nodeVerifiers makes the verifiers of a deployment.
func (d *Domain) nodeVerifiers(c DeploymentConfig) (out []spireapi.NodeVerifier, err error) {
	if c.X509Pop != nil {
		config := *c.X509Pop
		config.TrustDomain, config.Now, config.Log = d.cfg.TrustDomain, d.cfg.Now, d.cfg.Log.With("deployment", c.Name)
		config.TrustBundle = func() []*x509.Certificate { return d.Published().Certificates() }
		v, err := x509pop.New(config)
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	if len(c.Clusters) > 0 {
		v, err := k8spsat.New(d.cfg.TrustDomain, c.Clusters)
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, nil
}
