package main

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/cli"
)

// shownAgent is an agent as -o json prints it.
type shownAgent struct {
	ID              string     `json:"id"`
	Type            string     `json:"attestation_type"`
	State           string     `json:"state"`                  // attested, banned or expired
	Duplicated      bool       `json:"duplicated,omitempty"`   // two processes use its identity
	Reattestable    bool       `json:"reattestable,omitempty"` // it attests again instead of renewing
	Selectors       []string   `json:"selectors,omitempty"`    // of its node
	ExpiresAt       *time.Time `json:"expires_at,omitempty"`
	Version         string     `json:"version,omitempty"`
	AppliedSequence uint64     `json:"applied_sequence,omitempty"` // of the trust bundle
	LastReport      *time.Time `json:"last_report,omitempty"`
}

func showAgent(a *api.Agent, now time.Time) shownAgent {
	out := shownAgent{
		ID: a.GetId(), Type: a.GetAttestationType(), State: "attested", Duplicated: a.GetDuplicated(), ExpiresAt: moment(a.GetExpiresAt()),
		Version: a.GetVersion(), AppliedSequence: a.GetAppliedSequence(), LastReport: moment(a.GetLastReport()),
		Reattestable: a.GetReattestable(), Selectors: a.GetSelectors(),
	}
	switch {
	case a.GetBanned():
		out.State = "banned"
	case out.ExpiresAt != nil && now.After(*out.ExpiresAt):
		out.State = "expired"
	}
	return out
}

// agentsCommand is "agent list".
func agentsCommand(ctx context.Context, call *cli.Call) error {
	c := newClient(call)
	if _, err := c.Parse(); err != nil {
		return err
	}
	return c.do(ctx, func(ctx context.Context, o api.OperatorClient) error {
		resp, err := o.ListAgents(ctx, &api.ListAgentsRequest{Scope: c.scope()}, large)
		if err != nil {
			return err
		}
		now := time.Now()
		agents := make([]shownAgent, 0, len(resp.GetAgents()))
		for _, a := range resp.GetAgents() {
			agents = append(agents, showAgent(a, now))
		}
		if c.JSON() {
			return cli.PrintJSON(c.Stdout, map[string]any{"agents": agents})
		}
		table := cli.NewTable(c.Stdout)
		_, _ = fmt.Fprint(table, "ID\tTYPE\tSTATE\tVERSION\tBUNDLE\tLAST REPORT\tSVID ENDS\n")
		for _, a := range agents {
			sequence := "-"
			if a.LastReport != nil {
				sequence = strconv.FormatUint(a.AppliedSequence, 10)
			}
			state := a.State
			if a.Duplicated {
				state += ", duplicated"
			}
			_, _ = fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", text(a.ID), text(a.Type), state, text(a.Version), sequence,
				when(a.LastReport, now), when(a.ExpiresAt, now))
		}
		return cli.Flush(table)
	})
}

// banCommand is "agent ban".
func banCommand(ctx context.Context, call *cli.Call) error {
	c := newClient(call)
	id, err := c.Parse("agent's ID")
	if err != nil {
		return err
	}
	return c.do(ctx, func(ctx context.Context, o api.OperatorClient) error {
		if _, err := o.BanAgent(ctx, &api.BanAgentRequest{Scope: c.scope(), AgentId: id[0]}); err != nil {
			return err
		}
		return c.done("agent", id[0], "banned")
	})
}

// evictCommand is "agent evict".
func evictCommand(ctx context.Context, call *cli.Call) error {
	c := newClient(call)
	gone := c.Flags.Bool("gone", false, "")
	id, err := c.Parse("agent's ID")
	if err != nil {
		return err
	}
	return c.do(ctx, func(ctx context.Context, o api.OperatorClient) error {
		if _, err := o.EvictAgent(ctx, &api.EvictAgentRequest{Scope: c.scope(), AgentId: id[0], Gone: *gone}); err != nil {
			return err
		}
		return c.done("agent", id[0], "evicted")
	})
}

// done prints the result of a command.
func (c *client) done(what, id, how string) error {
	if c.JSON() {
		return cli.PrintJSON(c.Stdout, map[string]string{what: id, "result": how})
	}
	return cli.Printf(c.Stdout, "%s %s\n", cli.Printable(id), how)
}

// tokenCommand is "token create".
func tokenCommand(ctx context.Context, call *cli.Call) error {
	c := newClient(call)
	ttl := c.Flags.Duration("ttl", 10*time.Minute, "")
	if _, err := c.Parse(); err != nil {
		return err
	}
	if *ttl < time.Second {
		return cli.Usagef("token create: --ttl %v is shorter than a second", *ttl)
	}
	return c.do(ctx, func(ctx context.Context, o api.OperatorClient) error {
		resp, err := o.CreateJoinToken(ctx, &api.CreateJoinTokenRequest{Scope: c.scope(), Ttl: durationpb.New(*ttl)})
		if err != nil {
			return err
		}
		expires := moment(resp.GetExpiresAt())
		if c.JSON() {
			return cli.PrintJSON(c.Stdout, struct {
				Token     string     `json:"token"`
				ExpiresAt *time.Time `json:"expires_at"`
			}{resp.GetToken(), expires})
		}
		// The token alone, so that standard output can be redirected to a file.
		if err := cli.Printf(c.Stdout, "%s\n", resp.GetToken()); err != nil {
			return err
		}
		return cli.Printf(c.Stderr, "The token attests one agent. It expires %s.\n", when(expires, time.Now()))
	})
}
