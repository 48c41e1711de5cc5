package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/operator/runbook"
)

// readTimeout limits a read-only call.
const readTimeout = 30 * time.Second

func (p *program) with(c *cobra.Command, f func(ctx context.Context, b runbook.Backend) error) (err error) {
	if err := p.checkTarget(c.Flags()); err != nil {
		return err
	}
	b, closer, err := p.connect(c.Context(), p.target)
	if _, ok := errors.AsType[cli.UsageError](err); ok {
		return err
	}
	if err != nil {
		return fmt.Errorf("connect to the server: %w", err)
	}
	defer func() {
		_ = closer.Close() // the result of f does not depend on it
	}()
	return f(c.Context(), b)
}

// remark prints sentences for the operator to stderr, because scripts read stdout.
func (p *program) remark(lines ...string) {
	for _, l := range lines {
		_, _ = fmt.Fprintln(p.stderr, cli.PrintableLines(l))
	}
}

// done prints the result of a step.
func (p *program) done(d runbook.StepResult) error {
	var err error
	if p.output == "json" {
		err = cli.PrintJSON(p.stdout, d)
	} else {
		err = cli.Printf(p.stdout, "%s\n", d)
		p.remark(d.Remarks...)
	}
	if err != nil {
		return fmt.Errorf("keyset %s is %s, but printing the result failed: %w", d.Keyset, d.Done, err)
	}
	return nil
}

func (p *program) list() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "show the keysets of a deployment, and which are safe to remove",
		Long: listHelp, Args: noArgs, Example: "  keysetctl list --trust-domain example.org --deployment-name default",
		RunE: func(c *cobra.Command, _ []string) error {
			return p.with(c, func(ctx context.Context, b runbook.Backend) error {
				ctx, cancel := context.WithTimeout(ctx, readTimeout)
				defer cancel()
				s, err := b.Status(ctx)
				if err != nil {
					return fmt.Errorf("list keysets: %w", err)
				}
				if p.output == "json" {
					if s.Keysets == nil {
						s.Keysets = []runbook.Keyset{}
					}
					return cli.PrintJSON(p.stdout, s)
				}
				if err := runbook.List(p.stdout, s, time.Now()); err != nil {
					return err
				}
				p.remark(runbook.Remarks(s, time.Now())...)
				return nil
			})
		},
	}
}

func (p *program) prepare() *cobra.Command {
	return &cobra.Command{
		Use: "prepare", Short: "1: make and publish a new keyset; it does not sign",
		Long: prepareHelp, Args: noArgs, Example: "  keysetctl prepare",
		RunE: func(c *cobra.Command, _ []string) error {
			return p.with(c, func(ctx context.Context, b runbook.Backend) error {
				d, err := runbook.Prepare(ctx, b)
				if err != nil {
					return err
				}
				return p.done(d)
			})
		},
	}
}

func (p *program) activate() *cobra.Command {
	return p.step(runbook.ActActivate, "2: let a prepared keyset sign instead of the active one", activateHelp, runbook.Activate)
}

func (p *program) taint() *cobra.Command {
	return p.step(runbook.ActTaint, "3: let agents replace the X.509-SVIDs of a prepared keyset", taintHelp, runbook.Taint)
}

func (p *program) step(action runbook.Action, short, long string, act func(context.Context, runbook.Backend, string) (runbook.StepResult, error)) *cobra.Command {
	var force bool
	name := string(action)
	c := &cobra.Command{
		Use: name + " ID", Short: short, Long: long, Args: oneID, Example: "  keysetctl " + name + " ks_abc1234xyz",
		RunE: func(c *cobra.Command, args []string) error {
			return p.with(c, func(ctx context.Context, b runbook.Backend) error {
				var remarks []string
				if !force {
					var err error
					if remarks, err = runbook.Gate(ctx, b, runbook.Step{Action: action, Keyset: args[0]}, runbook.WaitOptions{Progress: p.screen()}); err != nil {
						return err
					}
				}
				d, err := act(ctx, b, args[0])
				if err != nil {
					return err
				}
				d.Remarks = append(remarks, d.Remarks...)
				return p.done(d)
			})
		},
	}
	c.Flags().BoolVar(&force, "force", false, "do not wait for agents that have not applied the trust bundle")
	return c
}

func (p *program) remove() *cobra.Command {
	var force bool
	c := &cobra.Command{
		Use: "remove ID", Short: "5: delete a tainted keyset",
		Long: removeHelp, Args: oneID, Example: "  keysetctl remove ks_abc1234xyz",
		RunE: func(c *cobra.Command, args []string) error {
			return p.with(c, func(ctx context.Context, b runbook.Backend) error {
				d, err := runbook.Remove(ctx, b, args[0], force, time.Now())
				if err != nil {
					return err
				}
				return p.done(d)
			})
		},
	}
	c.Flags().BoolVar(&force, "force", false, "remove it even if it is not safe: SVIDs that depend on it are rejected")
	return c
}

func (p *program) plan() *cobra.Command {
	o := runbook.PlanOptions{}
	c := &cobra.Command{
		Use: "plan --agents N --svids M", Short: "predict the load and the duration of a taint wave",
		Long: planHelp, Args: noArgs, Example: "  keysetctl plan --agents 200 --svids 50",
		Annotations: offline,
		RunE: func(c *cobra.Command, _ []string) error {
			for _, name := range []string{"agents", "svids"} {
				if !c.Flags().Changed(name) {
					return cli.Usagef("plan: give --agents N and --svids M, as in \"keysetctl plan --agents 200 --svids 50\"")
				}
			}
			if c.Flags().Changed("rate") && o.Rate == 0 {
				return cli.Usagef("plan: --rate must be above 0")
			}
			plan, err := runbook.NewPlan(o)
			if wrong, ok := errors.AsType[*runbook.OptionError](err); ok {
				return cli.Usagef("plan: --%s %s", wrong.Option, wrong.Message)
			}
			if err != nil {
				return err
			}
			if p.output == "json" {
				return cli.PrintJSON(p.stdout, plan)
			}
			return plan.Print(p.stdout)
		},
	}
	f := c.Flags()
	f.SortFlags = false
	f.IntVar(&o.Agents, "agents", 0, "`N` agents in the fleet")
	f.IntVar(&o.SVIDs, "svids", 0, "`M` X.509-SVIDs of workloads on each agent")
	f.DurationVar(&o.MaxDelay, "max-delay", runbook.DefaultPlanDelay, "longest random delay of an agent, a `DURATION`")
	f.Float64Var(&o.Rate, "rate", runbook.DefaultPlanRate, "renewals per second of one agent, a `NUMBER`")
	f.DurationVar(&o.Refresh, "refresh", runbook.DefaultPlanRefresh, "`DURATION` between two bundle refreshes of an agent")
	f.Uint64Var(&o.Seed, "seed", 1, "`NUMBER` that the random fleets are drawn from")
	f.StringVarP(&p.output, "output", "o", "text", "output `FORMAT`: text or json")
	return c
}

func (p *program) version() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "print the version", Long: "Prints the version.\n", Args: noArgs,
		Annotations: offline,
		RunE: func(*cobra.Command, []string) error {
			return cli.ReadBuild("keysetctl", version).Print(p.stdout, p.output)
		},
	}
}
