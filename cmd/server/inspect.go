package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/clock"
)

// shownRecord is a record of the audit log as -o json prints it.
type shownRecord struct {
	Number    uint64            `json:"number"`
	At        *time.Time        `json:"at"`
	Actor     string            `json:"actor"`
	Operation string            `json:"operation"`
	Keyset    string            `json:"keyset_id"`
	Before    map[string]string `json:"before"` // state by keyset ID
	After     map[string]string `json:"after"`
	Note      string            `json:"note,omitempty"`

	changes []string // "ks_… Prepared -> Active", in the order of the log
}

func showRecord(r *api.AuditRecord) shownRecord {
	out := shownRecord{
		Number: r.GetNumber(), At: moment(r.GetAt()), Actor: r.GetActor(), Operation: r.GetOperation(), Keyset: r.GetKeysetId(),
		Before: map[string]string{}, After: map[string]string{}, Note: r.GetNote(),
	}
	for _, s := range r.GetBefore() {
		out.Before[s.GetKeysetId()] = s.GetState().String()
	}
	for _, s := range r.GetAfter() {
		out.After[s.GetKeysetId()] = s.GetState().String()
		if before := out.Before[s.GetKeysetId()]; before != s.GetState().String() {
			out.changes = append(out.changes, s.GetKeysetId()+" "+title(before)+" -> "+title(s.GetState().String()))
		}
	}
	for _, s := range r.GetBefore() {
		if _, kept := out.After[s.GetKeysetId()]; !kept {
			out.changes = append(out.changes, s.GetKeysetId()+" "+title(s.GetState().String())+" -> gone")
		}
	}
	return out
}

// title formats a state like keysetctl; "none" if the keyset did not exist.
func title(state string) string {
	if state == "" {
		return "none"
	}
	return state[:1] + strings.ToLower(state[1:])
}

// auditCommand is "audit".
func auditCommand(ctx context.Context, call *cli.Call) error {
	c := newClient(call)
	after := c.Flags.Uint64("after", 0, "")
	if _, err := c.Parse(); err != nil {
		return err
	}
	return c.do(ctx, func(ctx context.Context, o api.OperatorClient) error {
		records := []shownRecord{}
		for last := *after; ; {
			resp, err := o.ReadAudit(ctx, &api.ReadAuditRequest{Scope: c.scope(), After: last})
			if err != nil {
				return err
			}
			for _, r := range resp.GetRecords() {
				records = append(records, showRecord(r))
			}
			if len(resp.GetRecords()) == 0 {
				break
			}
			last = records[len(records)-1].Number
		}
		if c.JSON() {
			return cli.PrintJSON(c.Stdout, map[string]any{"records": records})
		}
		table := cli.NewTable(c.Stdout)
		_, _ = fmt.Fprint(table, "NUMBER\tTIME\tACTOR\tOPERATION\tKEYSET\tCHANGES\tNOTE\n")
		for _, r := range records {
			_, _ = fmt.Fprintf(table, "%d\t%s\t%s\t%s\t%s\t%s\t%s\n", r.Number, clock.Text(*r.At),
				text(r.Actor), text(r.Operation), text(r.Keyset), text(strings.Join(r.changes, ", ")), text(r.Note))
		}
		return cli.Flush(table)
	})
}

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
