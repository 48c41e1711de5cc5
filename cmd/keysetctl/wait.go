package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/operator/runbook"
)

// waitFlags are common to wait and rotate.
type waitFlags struct {
	scope string
	o     runbook.WaitOptions
}

func (w *waitFlags) flags(f *pflag.FlagSet, forHelp string) {
	f.StringVar(&w.scope, "for", string(runbook.X509), forHelp)
	f.DurationVar(&w.o.Timeout, "timeout", 0, "give up after this `DURATION`; 0 waits without a limit")
	f.DurationVar(&w.o.Interval, "interval", runbook.DefaultInterval, "`DURATION` between two polls of the server")
}

// options checks the flags' values.
func (w *waitFlags) options(p *program, values ...runbook.Scope) (runbook.WaitOptions, error) {
	var names []string
	for _, v := range values {
		names = append(names, string(v))
		if string(v) == w.scope {
			w.o.For = v
		}
	}
	switch {
	case w.o.For == "":
		return w.o, cli.Usagef("--for takes one of %s, and is %q", strings.Join(names, ", "), w.scope)
	case w.o.Timeout < 0:
		return w.o, cli.Usagef("--timeout must not be negative, and is %v: leave it out to wait without a limit", w.o.Timeout)
	case w.o.Interval <= 0:
		return w.o, cli.Usagef("--interval must be above 0, and is %v", w.o.Interval)
	}
	w.o.Progress = p.screen()
	return w.o, nil
}

// screen returns the screen of a wait.
func (p *program) screen() *runbook.Screen {
	return &runbook.Screen{W: p.stderr, Size: cli.TerminalSize(p.stderr, p.getenv), Plain: !cli.UTF8(p.getenv)}
}

// percentage is a flag's value such as 99%.
type percentage float64

// Set implements pflag.Value.
func (p *percentage) Set(text string) error {
	number, found := strings.CutSuffix(text, "%")
	value, err := strconv.ParseFloat(number, 64)
	if err != nil || !found || !(value > 0 && value <= 100) {
		return errors.New("not a percentage")
	}
	*p = percentage(value)
	return nil
}

// String implements pflag.Value.
func (p *percentage) String() string {
	if *p == 0 {
		return ""
	}
	return strconv.FormatFloat(float64(*p), 'f', -1, 64) + "%"
}

// Type implements pflag.Value.
func (*percentage) Type() string { return "percentage" }

func (p *program) wait() *cobra.Command {
	var w waitFlags
	var until percentage
	c := &cobra.Command{
		Use: "wait ID", Short: "4: wait until a tainted keyset is safe to remove",
		Long: waitHelp, Args: oneID, Example: "  keysetctl wait ks_abc1234xyz --timeout 10m && keysetctl remove ks_abc1234xyz",
		RunE: func(c *cobra.Command, args []string) error {
			o, err := w.options(p, runbook.X509, runbook.JWT, runbook.All)
			if err != nil {
				return err
			}
			if o.Until = float64(until); until > 0 && o.For != runbook.X509 {
				return cli.Usagef("--until is for X.509-SVIDs: leave out --for %s", o.For)
			}
			return p.with(c, func(ctx context.Context, b runbook.Backend) error {
				r, err := runbook.Wait(ctx, b, args[0], o)
				if p.output == "json" {
					if _, notSafe := errors.AsType[*runbook.NotSafeError](err); err == nil || notSafe {
						err = errors.Join(err, cli.PrintJSON(p.stdout, r))
					}
					return err
				}
				if err != nil {
					return err
				}
				if err := cli.Printf(p.stdout, "%s\n", r); err != nil {
					return err
				}
				p.remark(r.Remarks...)
				return nil
			})
		},
	}
	w.flags(c.Flags(), "`KEYS` that must be safe to remove: x509, jwt or all")
	c.Flags().Var(&until, "until", "end when this `SHARE` of the agents, such as 99%, no longer depends\non the keyset; remove then needs --force")
	return c
}

func (p *program) rotate() *cobra.Command {
	var w waitFlags
	var keysetID string
	var yes bool
	c := &cobra.Command{
		Use: "rotate", Short: "run all steps, or the steps that are left",
		Long: rotateHelp, Args: noArgs, Example: "  keysetctl rotate\n  keysetctl rotate --yes --timeout 30m",
		RunE: func(c *cobra.Command, _ []string) error {
			o, err := w.options(p, runbook.X509, runbook.All)
			if err != nil {
				return err
			}
			ro := runbook.RotateOptions{Wait: o, Keyset: keysetID}
			if !yes {
				if !cli.IsTerminal(p.stdin) || !cli.IsTerminal(p.stderr) {
					return cli.Usagef("rotate: cannot ask before each step without a terminal: give --yes")
				}
				ro.Ask = p.asker(c.Context(), o.Progress)
			}
			var outputErr error
			if p.output != "json" {
				ro.Report = func(d runbook.StepResult) {
					o.Progress.Clear()
					outputErr = errors.Join(outputErr, p.done(d))
				}
			}
			return p.with(c, func(ctx context.Context, b runbook.Backend) error {
				r, err := runbook.Rotate(ctx, b, ro)
				if p.output == "json" {
					return errors.Join(err, cli.PrintJSON(p.stdout, r))
				}
				if err = errors.Join(err, outputErr); err != nil {
					return err
				}
				return cli.Printf(p.stdout, "The rotation is complete: %s is active.\n", r.Active)
			})
		},
	}
	w.flags(c.Flags(), "`KEYS` that must be safe to remove: x509 or all")
	c.Flags().StringVar(&keysetID, "keyset", "", "`ID` of the keyset for the next step, if there are several")
	c.Flags().BoolVar(&yes, "yes", false, "do not ask before each step; the waits remain")
	return c
}

// asker returns a function that asks on the terminal. Only y and yes mean yes, and
// only if they are typed after the question.
func (p *program) asker(ctx context.Context, s *runbook.Screen) func(string) (bool, error) {
	type answer struct {
		text string
		err  error
	}
	lines := bufio.NewReader(p.stdin)
	return func(question string) (bool, error) {
		s.Clear()
		dropTyped(p.stdin)
		_, _ = fmt.Fprintf(p.stderr, "%s [y/N] ", cli.PrintableLines(question))
		got := make(chan answer, 1)
		// A read from a terminal has no deadline. After an interrupt this goroutine
		// lives until the program exits.
		go func() {
			text, err := lines.ReadString('\n')
			got <- answer{text, err}
		}()
		select {
		case <-ctx.Done():
			_, _ = fmt.Fprintln(p.stderr)
			return false, context.Cause(ctx)
		case a := <-got:
			if a.err != nil {
				_, _ = fmt.Fprintln(p.stderr)
				if errors.Is(a.err, io.EOF) {
					return false, nil // end of input means no
				}
				return false, a.err
			}
			text := strings.ToLower(strings.TrimSpace(a.text))
			return text == "y" || text == "yes", nil
		}
	}
}
