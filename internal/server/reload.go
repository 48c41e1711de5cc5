package server

import (
	"errors"
	"fmt"
	"slices"

	"github.com/renewd/renewd/internal/server/admin"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/metrics"
)

// Reload applies what can change while the Domain runs: the operators' rules, node
// attestation, limits and load balancers, the bundle endpoint's certificate files and the
// refresh hint, federation, and the policy of automatic rotation. It reads the files that
// these name again. It ignores the other fields: the caller compares them.
//
// It changes nothing if it returns an error, which says what cannot be used.
func (d *Domain) Reload(c Config) error {
	c = c.withDefaults()
	d.reloading.Lock()
	defer d.reloading.Unlock()
	var apply []func()
	var errs []error
	for _, prepare := range []func(Config) (func(), error){
		d.reloadRules, d.reloadDeployments, d.reloadEndpoint, d.reloadFederation, d.reloadMetrics,
	} {
		part, err := prepare(c)
		apply, errs = append(apply, part), append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for _, part := range apply {
		part()
	}
	return nil
}

func (d *Domain) reloadRules(c Config) (apply func(), err error) {
	rules, err := admin.ParseRules(d.cfg.TrustDomain, c.Managers, c.Readers)
	return func() {
		d.rules.Store(&rules)
		d.operator.SetRules(rules)
	}, err
}

// reloadDeployments reloads what belongs to the agents of each deployment, and the load
// balancers before them.
func (d *Domain) reloadDeployments(c Config) (apply func(), err error) {
	all := []func(){func() { d.proxies.Set(c.Proxies) }}
	var errs []error
	add := func(field string, part func(), err error) {
		if all = append(all, part); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", field, err))
		}
	}
	for _, dep := range d.deployments {
		i := slices.IndexFunc(c.Deployments, func(n DeploymentConfig) bool { return n.Name == dep.Name })
		if i < 0 {
			continue // not served
		}
		verifiers, err := d.nodeVerifiers(c.Deployments[i])
		add("deployments."+dep.Name+".node_attestation", func() {}, err)
		part, err := dep.server.Reload(spireapi.Reloaded{NodeVerifiers: verifiers, RefreshHint: c.RefreshHint, Limits: c.Limits})
		add("deployments."+dep.Name, part, err)
		part, err = dep.scheduler.Reload(dep.rotation(c.Rotation))
		add("rotation", part, err)
	}
	return func() {
		for _, part := range all {
			part()
		}
	}, errors.Join(errs...)
}

func (d *Domain) reloadEndpoint(c Config) (apply func(), err error) {
	if d.endpoint == nil {
		return func() {}, nil
	}
	cert, key := c.endpointFiles()
	if apply, err = d.endpoint.Reload(cert, key, c.RefreshHint); err != nil {
		return nil, fmt.Errorf("bundle_endpoint: %w", err)
	}
	return apply, nil
}

func (d *Domain) reloadFederation(c Config) (apply func(), err error) {
	follow, err := d.federation.Reload(c.Federation)
	return func() {
		d.metrics.Follow(federatedNames(c.Federation))
		follow()
		d.warnNotFollowed()
	}, err
}

// reloadMetrics checks the web configuration file, which is read for each connection.
func (d *Domain) reloadMetrics(c Config) (apply func(), err error) {
	return func() {}, metrics.CheckWebConfig(c.WebConfigFile)
}
