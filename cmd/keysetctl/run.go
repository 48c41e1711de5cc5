package main

import (
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

// version is set by the linker (-X main.version=...); see the Makefile.
var version string

// exitNotSafe is the exit status if SVIDs depend on the keyset, or if that is not
// known.
const exitNotSafe = 3

func init() {
	cobra.EnableCommandSorting = false // keeps the order of the steps
}

// program holds what the commands share.
type program struct {
	getenv         func(string) string
	stdin          io.Reader
	stdout, stderr io.Writer
	connect        connector
	target         target
	output         string // text or json
}

// connector connects to the signing server of a target. The Closer closes the
// connection.
type connector func(ctx context.Context, t target) (runbook.Backend, io.Closer, error)

// run executes one command line and returns the exit status.
func run(ctx context.Context, args []string, getenv func(string) string, stdin io.Reader, stdout, stderr io.Writer, connect connector) int {
	p := &program{getenv: getenv, stdin: stdin, stdout: stdout, stderr: stderr, connect: connect}
	root := p.root()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	command, err := root.ExecuteContextC(ctx)
	if err == nil {
		return cli.ExitOK
	}
	_, _ = fmt.Fprintf(stderr, "%s %s\n", paint(stderr, getenv, red, "Error:"), cli.PrintableLines(err.Error()))
	if _, ok := errors.AsType[cli.UsageError](err); ok {
		_, _ = fmt.Fprintf(stderr, "%q shows the usage.\n", command.CommandPath()+" --help")
		return cli.ExitPermanent
	}
	remedy := runbook.Remedy(err)
	if name := command.Name(); remedy == "" && ctx.Err() != nil && (name == "wait" || name == "rotate") {
		remedy = "Run keysetctl " + name + " again to continue."
	}
	if remedy != "" {
		_, _ = fmt.Fprintln(stderr, remedy)
	}
	if _, ok := errors.AsType[*runbook.NotSafeError](err); ok {
		return exitNotSafe
	}
	return cli.ExitFailed
}

// root returns the command tree. The verbs exist twice: at the top and under the
// path "trust-domain deployment keyset".
func (p *program) root() *cobra.Command {
	root := group("keysetctl", "run a keyset rotation, step by step or as a whole")
	root.Long = rootHelp
	root.Version = cli.Version(version)
	root.SetVersionTemplate("renewd keysetctl {{.Version}}\n")
	root.SilenceErrors, root.SilenceUsage = true, true
	root.CompletionOptions.HiddenDefaultCmd = true
	root.SetFlagErrorFunc(flagError)
	root.SetUsageTemplate(usageTemplate)
	root.SetHelpTemplate("{{.Long}}{{.UsageString}}")
	root.SetHelpCommand(p.help())
	p.flags(root.PersistentFlags())
	root.PersistentPreRunE = func(*cobra.Command, []string) error { return p.check() }

	verbs := func() []*cobra.Command {
		return []*cobra.Command{p.list(), p.prepare(), p.activate(), p.taint(), p.wait(), p.remove(), p.rotate()}
	}
	root.AddCommand(verbs()...)
	root.AddCommand(p.plan(), p.version())

	long := []*cobra.Command{
		group("trust-domain", "the same commands under a longer path"),
		group("deployment", "the same commands under a longer path"),
		group("keyset", "the same commands as \"keysetctl COMMAND\""),
	}
	long[2].AddCommand(verbs()...)
	long[1].AddCommand(long[2])
	long[0].AddCommand(long[1])
	root.AddCommand(long[0])
	return root
}

// group returns a command that only has subcommands.
func group(name, short string) *cobra.Command {
	return &cobra.Command{
		Use: name, Short: short, Long: strings.ToUpper(short[:1]) + short[1:] + ".\n",
		DisableFlagsInUseLine: true,
		Args:                  cobra.ArbitraryArgs,
		RunE: func(c *cobra.Command, args []string) error {
			var names []string
			for _, sub := range c.Commands() {
				if sub.IsAvailableCommand() {
					names = append(names, sub.Name())
				}
			}
			have := "the commands are " + strings.Join(names, ", ")
			if len(args) > 0 {
				return cli.Usagef("unknown command %q: %s", args[0], have)
			}
			return cli.Usagef("no command: %s", have)
		},
	}
}

func (p *program) help() *cobra.Command {
	return &cobra.Command{
		Use: "help [COMMAND]", Short: "help about a command", Long: "Prints the help of a command.\n",
		PersistentPreRunE: func(*cobra.Command, []string) error { return nil },
		RunE: func(c *cobra.Command, args []string) error {
			topic, rest, err := c.Root().Find(args)
			if err != nil || len(rest) > 0 {
				return cli.Usagef("no help for %q", strings.Join(args, " "))
			}
			topic.InitDefaultHelpFlag()
			return topic.Help()
		},
	}
}

// oneID is the Args function of a command for one keyset.
func oneID(c *cobra.Command, args []string) error {
	switch {
	case len(args) == 0 || args[0] == "":
		return cli.Usagef("%s: give the keyset's ID, as in \"keysetctl %s ks_abc1234xyz\"; keysetctl list shows the IDs", c.Name(), c.Name())
	case len(args) > 1:
		return cli.Usagef("%s: takes one keyset ID, but also got %q", c.Name(), args[1])
	}
	return nil
}

// noArgs is the Args function of a command without arguments.
func noArgs(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return cli.Usagef("%s: takes no argument, but got %q", c.Name(), args[0])
	}
	return nil
}

// flagError returns a usage error that names the flag and its values.
func flagError(c *cobra.Command, err error) error {
	unknown, isUnknown := errors.AsType[*pflag.NotExistError](err)
	value, isValue := errors.AsType[*pflag.InvalidValueError](err)
	missing, isMissing := errors.AsType[*pflag.ValueRequiredError](err)
	switch {
	case isUnknown && c.Flag(unknown.GetSpecifiedShortnames()) != nil: // one dash works for agent and server
		return cli.Usagef("%s: write --%s with two dashes", c.Name(), unknown.GetSpecifiedShortnames())
	case isUnknown:
		return cli.Usagef("%s: there is no flag %s", c.Name(), dashed(unknown.GetSpecifiedName()))
	case isMissing:
		f := missing.GetFlag()
		return cli.Usagef("%s: --%s needs a value%s", c.Name(), f.Name, valueHint(f))
	case isValue:
		f := value.GetFlag()
		return cli.Usagef("%s: --%s does not take %q%s", c.Name(), f.Name, value.GetValue(), valueHint(f))
	}
	return cli.Usagef("%s: %v", c.Name(), err)
}

func dashed(name string) string {
	if len(name) == 1 {
		return "-" + name
	}
	return "--" + name
}

// valueHint returns an example of a flag's value by its type.
func valueHint(f *pflag.Flag) string {
	switch f.Value.Type() {
	case "duration":
		return ": give a duration such as 90s or 5m"
	case "int", "uint64", "float64":
		return ": give a number"
	case "bool":
		return ": give true, false, or no value"
	}
	return ""
}

// check rejects values of the common flags.
func (p *program) check() error {
	if p.output != "text" && p.output != "json" {
		return cli.Usagef("--output takes text or json, not %q", p.output)
	}
	return nil
}
