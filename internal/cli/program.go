package cli

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"strings"
	"syscall"

	"github.com/renewd/renewd/internal/config"
)

// Main runs a program until it returns its exit status. SIGINT, SIGTERM and the signals
// in more end ctx; a second one ends the process at once.
func Main(run func(ctx context.Context) int, more ...os.Signal) {
	ctx, stop := signal.NotifyContext(context.Background(), append(more, os.Interrupt, syscall.SIGTERM)...)
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx))
}

// Program is a program with commands. Besides its own it has the commands help, version
// and man, which prints its manual page and is in no help.
type Program struct {
	Name     string
	Version  string // the linker's, or empty
	Usage    string
	Commands []Command
}

// Command is a command, or a group of commands: a group has no Run.
type Command struct {
	Name string
	Help func() string // of a group: also of its commands
	Run  func(context.Context, *Call) error
	Sub  []Command
}

// Text returns a Help function for a constant text.
func Text(text string) func() string { return func() string { return text } }

// Main runs the program's command line.
func (p *Program) Main() {
	Main(func(ctx context.Context) int {
		return p.Run(ctx, os.Args[1:], Env{Getenv: os.Getenv, Environ: os.Environ(), Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr})
	})
}

// Run runs a command line and returns the exit status.
func (p *Program) Run(ctx context.Context, args []string, e Env) int {
	return Report(p.Name, p.dispatch(ctx, args, e), e)
}

func (p *Program) dispatch(ctx context.Context, args []string, e Env) error {
	name, args := cut(args)
	switch name {
	case "-version", "--version":
		name = "version"
	case "-h", "-help", "--help", "help":
		return p.help(args, e)
	case "man":
		return p.man(e)
	case "":
		return Usagef("no command")
	}
	c := find(p.commands(), name)
	if c == nil {
		return Usagef("unknown command %q", name)
	}
	help := c.Help()
	if c.Run == nil {
		group := c
		name, args = cut(args)
		if c = find(group.Sub, name); c == nil {
			return group.usage(name, e)
		}
		name = group.Name + " " + name
	}
	return c.Run(ctx, &Call{Env: e, Flags: flag.NewFlagSet(name, flag.ContinueOnError), help: help, args: args})
}

// usage handles a group that is called without one of its commands.
func (c *Command) usage(name string, e Env) error {
	names := make([]string, len(c.Sub))
	for i, sub := range c.Sub {
		names[i] = sub.Name
	}
	switch {
	case isHelp(name):
		return Printf(e.Stdout, "%s", c.Help())
	case name == "":
		return Usagef("%s: say what to do: %s", c.Name, config.OneOf(names))
	}
	return Usagef("%s: unknown subcommand %q: use %s", c.Name, name, config.OneOf(names))
}

// help prints the help of the program, or of the command that args begin with.
func (p *Program) help(args []string, e Env) error {
	topic, _ := cut(args)
	if topic == "" {
		return Printf(e.Stdout, "%s", p.Usage)
	}
	c := find(p.commands(), topic)
	if c == nil {
		return Usagef("no help for %q", strings.Join(args, " "))
	}
	return Printf(e.Stdout, "%s", c.Help())
}

func (p *Program) commands() []Command { return append(p.Commands, p.version()) }

func find(commands []Command, name string) *Command {
	for i := range commands {
		if commands[i].Name == name {
			return &commands[i]
		}
	}
	return nil
}

// cut returns the first argument, or "", and the others.
func cut(args []string) (first string, rest []string) {
	if len(args) == 0 {
		return "", nil
	}
	return args[0], args[1:]
}

// isHelp reports whether an argument asks for help.
func isHelp(arg string) bool { return arg == "-h" || arg == "-help" || arg == "--help" }

// Call is the call of a command. The command adds its flags to Flags and calls Parse.
type Call struct {
	Env
	Flags  *flag.FlagSet
	help   string
	args   []string
	output string
	more   []string // outputs beside text and json
}

// Name returns the name of the command, with that of its group.
func (c *Call) Name() string { return c.Flags.Name() }

// Output adds the flag -o, for JSON instead of text, or for more formats.
func (c *Call) Output(more ...string) {
	c.more = more
	c.Flags.StringVar(&c.output, "o", "text", "")
}

// JSON reports whether -o asks for JSON.
func (c *Call) JSON() bool { return c.output == "json" }

// Format returns the format that -o asks for.
func (c *Call) Format() string { return c.output }

// Parse parses flags before, between and after the arguments, and returns the arguments.
// There must be as many as names. If help is asked for, Parse prints it and returns
// [flag.ErrHelp].
func (c *Call) Parse(names ...string) ([]string, error) {
	have, err := ParseFlags(c.Flags, c.args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return nil, cmp.Or(Printf(c.Stdout, "%s", c.help), err)
	case err != nil:
		return nil, Usagef("%s: %v", c.Name(), err)
	case len(have) < len(names):
		return nil, Usagef("%s: give the %s", c.Name(), names[len(have)])
	case len(have) > len(names):
		return nil, Usagef("%s: unexpected argument %q", c.Name(), have[len(names)])
	case slices.Contains(have, ""): // such as a variable of a script that is not set
		return nil, Usagef("%s: give the %s", c.Name(), names[slices.Index(have, "")])
	case c.output != "" && c.output != "text" && c.output != "json" && !slices.Contains(c.more, c.output):
		return nil, Usagef("%s: -o takes %s, not %q", c.Name(), config.OneOf(append([]string{"text", "json"}, c.more...)), c.output)
	}
	return have, nil
}

// oneDash is the start of an error of package flag, which writes flags with one dash.
var oneDash = regexp.MustCompile(`^(flag [a-z ]+: |invalid (?:boolean )?value "(?:[^"\\]|\\.)*" for (?:flag )?)(-[\w-]{2,})`)

// ParseFlags parses flags before, between and after the arguments, and returns the
// arguments. One dash is accepted; help and errors have two.
func ParseFlags(fset *flag.FlagSet, args []string) (have []string, err error) {
	fset.SetOutput(io.Discard)
	fset.Usage = func() {}
	for {
		err := fset.Parse(args)
		switch {
		case errors.Is(err, flag.ErrHelp):
			return nil, err
		case err != nil:
			return nil, errors.New(oneDash.ReplaceAllString(err.Error(), "$1-$2"))
		}
		if fset.NArg() == 0 {
			return have, nil
		}
		have, args = append(have, fset.Arg(0)), fset.Args()[1:]
	}
}

// WarnVariables logs the variables of the environment that look like those of a field and
// are none.
func WarnVariables[C any](e Env, s *config.Schema[C], log *slog.Logger) {
	for _, p := range s.UnknownVariables(e.Environ) {
		log.Warn("environment variable ignored, it belongs to no field", "variable", p.Where, "error", p.What+"; "+p.Remedy)
	}
}

// ConfigCommand returns the command config. Its one subcommand, check, loads the
// configuration and reports what is wrong with it, and as warnings what may be right on
// another machine.
func ConfigCommand[C any](program string, s *config.Schema[C]) Command {
	check := func(ctx context.Context, c *Call) error {
		load := s.CheckFlags(c.Flags, c.Getenv)
		if _, err := c.Parse(); err != nil {
			return err
		}
		file := c.Flags.Lookup("config").Value.String()
		if file == "" {
			return Usagef("config check: give the file with --config")
		}
		warnings, err := load(ctx)
		for _, line := range config.Lines(append(s.UnknownVariables(c.Environ), warnings...)) {
			if err := Printf(c.Stderr, "warning: %s\n", line); err != nil {
				return err
			}
		}
		if err != nil {
			return err
		}
		return Printf(c.Stdout, "%s: ok\n", file)
	}
	help := func() string {
		return "Usage: " + program + ` config check --config FILE [--FIELD VALUE]...

Loads the configuration like "` + program + ` run", looks at the files and addresses that it
names, and prints every problem with its place and its remedy, at most 20 at a time. It
starts nothing and writes nothing. The exit status is 2 if something is wrong on every
machine, such as a field or the content of a file. What may be right on another machine or
at another time is a warning: a file that is missing or that this user may not read, an
address in use, a certificate out of date, an unknown ` + s.Env + `* variable. With nothing
but warnings the exit status is 0. Run it as the user that the service runs as.

` + s.Usage()
	}
	return Command{Name: "config", Help: help, Sub: []Command{{Name: "check", Run: check}}}
}
