package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/cli"
)

// bundleCommand is "bundle".
func bundleCommand(ctx context.Context, call *cli.Call) error {
	c := newClient(call)
	if _, err := c.Parse(); err != nil {
		return err
	}
	return c.do(ctx, func(ctx context.Context, o api.OperatorClient) error {
		resp, err := o.GetBundle(ctx, &api.GetBundleRequest{Scope: c.scope()})
		if err != nil {
			return err
		}
		if c.JSON() {
			return cli.PrintJSON(c.Stdout, struct {
				Sequence uint64 `json:"sequence"`
				PEM      string `json:"pem"`
			}{resp.GetSequence(), string(resp.GetPem())})
		}
		return cli.Printf(c.Stdout, "%s", resp.GetPem())
	})
}

// deploymentHealth is the output of "health" for one deployment.
type deploymentHealth struct {
	Deployment   string     `json:"deployment"`
	Healthy      bool       `json:"healthy"`
	Keyset       string     `json:"active_keyset,omitempty"`
	ExpiresAt    *time.Time `json:"expires_at,omitempty"`
	Agents       int64      `json:"agents"`
	AgentsBehind int64      `json:"agents_behind"`
	Rotation     string     `json:"rotation,omitempty"`
}

// healthCommand is "health".
func healthCommand(ctx context.Context, call *cli.Call) error {
	c := newClient(call)
	if _, err := c.Parse(); err != nil {
		return err
	}
	// Without waiting for a starting server, because the present state is asked for.
	return c.doWithin(ctx, 0, func(ctx context.Context, o api.OperatorClient) error {
		names := []string{c.deployment}
		if c.deployment == "" {
			resp, err := o.ListDeployments(ctx, &api.ListDeploymentsRequest{TrustDomain: c.trustDomain})
			if err != nil {
				return err
			}
			names = resp.GetDeployments()
		}
		now, healthy := time.Now(), true
		all := make([]deploymentHealth, 0, len(names))
		for _, name := range names {
			resp, err := o.ListKeysets(ctx, &api.ListKeysetsRequest{Scope: &api.Scope{TrustDomain: c.trustDomain, Deployment: name}})
			if err != nil {
				return err
			}
			d := healthOf(name, resp, now)
			all, healthy = append(all, d), healthy && d.Healthy
		}
		if err := c.printHealth(all, now); err != nil {
			return err
		}
		if !healthy {
			return errors.New("a deployment has no active keyset that can sign; look at \"keysetctl list\"")
		}
		return nil
	})
}

func healthOf(name string, resp *api.ListKeysetsResponse, now time.Time) deploymentHealth {
	d := deploymentHealth{
		Deployment: name, Agents: resp.GetAgents(), AgentsBehind: resp.GetAgentsBehind(), Rotation: resp.GetAutomatic().GetMode(),
	}
	for _, k := range resp.GetKeysets() {
		if k.GetState() == api.KeysetState_ACTIVE {
			d.Keyset, d.ExpiresAt = k.GetId(), moment(k.GetExpiresAt())
			d.Healthy = d.ExpiresAt != nil && now.Before(*d.ExpiresAt)
		}
	}
	return d
}

func (c *client) printHealth(all []deploymentHealth, now time.Time) error {
	if c.JSON() {
		return cli.PrintJSON(c.Stdout, map[string]any{"deployments": all})
	}
	table := cli.NewTable(c.Stdout)
	_, _ = fmt.Fprint(table, "DEPLOYMENT\tHEALTHY\tACTIVE KEYSET\tKEYSET ENDS\tAGENTS\tBEHIND\tROTATION\n")
	for _, d := range all {
		healthy := map[bool]string{true: "yes", false: "no"}[d.Healthy]
		_, _ = fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%d\t%d\t%s\n", text(d.Deployment), healthy, text(d.Keyset),
			when(d.ExpiresAt, now), d.Agents, d.AgentsBehind, text(d.Rotation))
	}
	return cli.Flush(table)
}
