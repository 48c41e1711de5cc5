package main

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/config"
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
	Hostname        string     `json:"hostname,omitempty"`         // as the agent reports it
	Label           string     `json:"label,omitempty"`            // of its join token
	AppliedSequence uint64     `json:"applied_sequence,omitempty"` // of the trust bundle
	LastReport      *time.Time `json:"last_report,omitempty"`
}

func showAgent(a *api.Agent, now time.Time) shownAgent {
	out := shownAgent{
		ID: a.GetId(), Type: a.GetAttestationType(), State: "attested", Duplicated: a.GetDuplicated(), ExpiresAt: moment(a.GetExpiresAt()),
		Version: a.GetVersion(), AppliedSequence: a.GetAppliedSequence(), LastReport: moment(a.GetLastReport()),
		Reattestable: a.GetReattestable(), Selectors: a.GetSelectors(), Hostname: a.GetHostname(), Label: a.GetLabel(),
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
			return cli.PrintJSON(c.Stdout, shownAgents{moment(resp.GetServerStartedAt()), agents})
		}
		return printAgents(c.Stdout, agents, moment(resp.GetServerStartedAt()), now)
	})
}

// shownAgents is the output of "agent list" as -o json prints it.
type shownAgents struct {
	// ServerStartedAt is when the server started: it keeps no reports over a restart.
	ServerStartedAt *time.Time   `json:"server_started_at,omitempty"`
	Agents          []shownAgent `json:"agents"`
}

// printAgents prints a row for each agent, and below it the ID, which is long and is what
// other commands take.
func printAgents(w io.Writer, agents []shownAgent, started *time.Time, now time.Time) error {
	var rows strings.Builder
	table := cli.NewTable(&rows)
	_, _ = fmt.Fprint(table, "NODE\tSTATE\tVERSION\tBUNDLE\tLAST REPORT\tSVID ENDS\n")
	unheard := 0
	for _, a := range agents {
		node := text(a.Hostname)
		if a.Label != "" {
			node += " (" + text(a.Label) + ")"
		}
		sequence, report := "-", "none"
		if a.LastReport != nil {
			sequence, report = strconv.FormatUint(a.AppliedSequence, 10), distance(*a.LastReport, now)
		} else if a.State == "attested" {
			unheard++
		}
		state := a.State
		if a.Duplicated && state == "attested" {
			state = "duplicated"
		}
		ends := "-"
		if a.ExpiresAt != nil {
			ends = distance(*a.ExpiresAt, now)
		}
		_, _ = fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\n", node, state, text(a.Version), sequence, report, ends)
	}
	if err := cli.Flush(table); err != nil {
		return err
	}
	var out strings.Builder
	i := -1 // the header
	for row := range strings.Lines(rows.String()) {
		out.WriteString(row)
		if i >= 0 {
			out.WriteString("  " + text(agents[i].ID) + "\n")
		}
		i++
	}
	if unheard > 0 && started != nil {
		fmt.Fprintf(&out, "none: no report since the server started, %s\n", cli.When(*started, now))
	}
	return cli.Printf(w, "%s", out.String())
}

// distance says how far a time is from now, roughly, because a row has to fit.
func distance(t, now time.Time) string {
	d := t.Sub(now)
	var text string
	switch far := d.Abs(); {
	case far >= 48*time.Hour:
		text = strconv.Itoa(int(far.Hours()/24)) + " days"
	case far >= time.Hour:
		text = config.Short(far.Truncate(time.Minute))
	default:
		text = config.Short(far.Truncate(time.Second))
	}
	if d < 0 {
		return text + " ago"
	}
	return "in " + text
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
	label := c.Flags.String("label", "", "")
	if _, err := c.Parse(); err != nil {
		return err
	}
	if *ttl < time.Second {
		return cli.Usagef("token create: --ttl %v is shorter than a second", *ttl)
	}
	return c.do(ctx, func(ctx context.Context, o api.OperatorClient) error {
		resp, err := o.CreateJoinToken(ctx, &api.CreateJoinTokenRequest{Scope: c.scope(), Ttl: durationpb.New(*ttl), Label: *label})
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
