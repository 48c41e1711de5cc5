package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/operator/runbook"
)

// waitFlags are common to wait and rotate.
type waitFlags struct {
	what string
	o    runbook.WaitOptions
}

func (w *waitFlags) flags(f *pflag.FlagSet, forHelp string) {
	f.StringVar(&w.what, "for", string(runbook.X509), forHelp)
	f.DurationVar(&w.o.Timeout, "timeout", 0, "give up after this `DURATION`; 0 waits without a limit")
	f.DurationVar(&w.o.Interval, "interval", runbook.DefaultInterval, "`DURATION` between two looks at the server")
}

// options checks the flags' values.
func (w *waitFlags) options(p *program, values ...runbook.For) (runbook.WaitOptions, error) {
	var names []string
	for _, v := range values {
		names = append(names, string(v))
		if string(v) == w.what {
			w.o.For = v
		}
	}
	switch {
	case w.o.For == "":
		return w.o, cli.Usagef("--for takes one of %s, and is %q", strings.Join(names, ", "), w.what)
	case w.o.Timeout < 0:
		return w.o, cli.Usagef("--timeout must not be negative, and is %v: leave it out to wait without a limit", w.o.Timeout)
	case w.o.Interval <= 0:
		return w.o, cli.Usagef("--interval must be above 0, and is %v", w.o.Interval)
	}
	w.o.Progress = &runbook.Screen{W: p.stderr, Width: terminalWidth(p.stderr, p.getenv)}
	return w.o, nil
}

func (p *program) wait() *cobra.Command {
	var w waitFlags
	c := &cobra.Command{
		Use: "wait ID", Short: "4: wait until a tainted keyset is safe to remove",
		Long: waitHelp, Args: oneID, Example: "  keysetctl wait ks_abc1234xyz --timeout 10m && keysetctl remove ks_abc1234xyz",
		RunE: func(c *cobra.Command, args []string) error {
			o, err := w.options(p, runbook.X509, runbook.JWT, runbook.All)
			if err != nil {
				return err
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
	w.flags(c.Flags(), "`WHAT` is to be safe: x509, jwt or all")
	return c
}

func (p *program) rotate() *cobra.Command {
	var w waitFlags
	var keysetID string
	var yes bool
	c := &cobra.Command{
		Use: "rotate", Short: "all steps in a row, from wherever the deployment stands",
		Long: rotateHelp, Args: noArgs, Example: "  keysetctl rotate\n  keysetctl rotate --yes --timeout 30m",
		RunE: func(c *cobra.Command, _ []string) error {
			o, err := w.options(p, runbook.X509, runbook.All)
			if err != nil {
				return err
			}
			ro := runbook.RotateOptions{Wait: o, Keyset: keysetID}
			if !yes {
				if !isTerminal(p.stdin) || !isTerminal(p.stderr) {
					return cli.Usagef("rotate: asks before each step, and this is no terminal: give --yes")
				}
				ro.Ask = p.asker(c.Context(), o.Progress)
			}
			var failed error // of the output
			if p.output != "json" {
				ro.Report = func(d runbook.Done) {
					o.Progress.Clear()
					failed = errors.Join(failed, p.done(d))
				}
			}
			return p.with(c, func(ctx context.Context, b runbook.Backend) error {
				r, err := runbook.Rotate(ctx, b, ro)
				if p.output == "json" {
					return errors.Join(err, cli.PrintJSON(p.stdout, r))
				}
				if err = errors.Join(err, failed); err != nil {
					return err
				}
				return cli.Printf(p.stdout, "The rotation is complete: %s is active.\n", r.Active)
			})
		},
	}
	w.flags(c.Flags(), "`WHAT` is to be safe before removing: x509, or all with JWT-SVIDs")
	c.Flags().StringVar(&keysetID, "keyset", "", "`ID` of the keyset that is meant, where the next step could be about several")
	c.Flags().BoolVar(&yes, "yes", false, "do not ask before each step; waiting until it is safe stays")
	return c
}

// asker asks on the terminal. Only y or yes is a yes, and only when it is typed
// after the question is there.
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
		// A terminal cannot be read with a deadline: after an interrupt this
		// goroutine ends with the program, which is then about to end.
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
					return false, nil // no answer is no
				}
				return false, a.err
			}
			text := strings.ToLower(strings.TrimSpace(a.text))
			return text == "y" || text == "yes", nil
		}
	}
}
