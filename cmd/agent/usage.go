package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"runtime/debug"
	"strings"
	"text/tabwriter"
)

// version is set by the linker (-X main.version=...); see the Makefile.
var version string

// The exit codes. A service manager should not restart the agent after
// exitUsage or exitBanned: it would end the same way.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2 // wrong command line or configuration
	exitBanned = 3 // the server has banned this node
)

const usage = `agent keeps the workload identities of this node valid while signing keys change.

Usage:
  agent run -config FILE           run the daemon
  agent config check -config FILE  say what is wrong with a configuration, and start nothing
  agent healthcheck                exit 0 when the running agent is ready
  agent status                     what the running agent holds, by signing authority
  agent fetch x509                 fetch X.509-SVIDs from the Workload API as a workload would
  agent fetch jwt -audience NAME   fetch JWT-SVIDs
  agent version                    print the version

"agent help COMMAND" describes one command, "agent help config" every field of
the configuration.

Exit status: 0 success, and a stop by SIGTERM or SIGINT; 1 failure; 2 wrong
command line or configuration; 3 the server has banned this node.
`

const runUsage = `Usage: agent run [-config FILE] [-FIELD VALUE]...

Runs until SIGTERM or SIGINT, then closes all streams and exits 0. A second
signal ends it at once. Every field of the configuration can be given as a flag
or in the environment too: "agent help config" lists them.
`

const checkUsage = `Usage: agent config check [-config FILE] [-FIELD VALUE]...

Reads the configuration as "agent run" would and prints every error with its
place and its remedy. Starts nothing and writes nothing.
`

const httpUsage = `
  -url URL              where the agent serves metrics and health (default http://127.0.0.1:9090,
                        or the address in RENEWD_METRICS_ADDRESS)
  -ca FILE              CA certificates (PEM) that the agent's HTTPS certificate must chain to
  -user NAME            user for basic auth
  -password-file FILE   file with the password for it
  -timeout DURATION     how long to wait (default 5s)
`

const healthUsage = `Usage: agent healthcheck [-url URL] [-socket PATH]

Exits 0 when /ready of the running agent says so. With -socket, also asks the
Workload API there; an answer that this caller has no identity is fine.
` + httpUsage

const statusUsage = `Usage: agent status [-o text|json] [-url URL]

Prints, for each signing authority, how many SVIDs this node holds, how many
taint renewals wait, how many open streams have not been sent the replacement,
and whether the authority is safe to remove as far as this node goes.
` + httpUsage

const fetchUsage = `Usage: agent fetch x509 [-socket PATH] [-o text|json] [-write DIR] [-timeout DURATION]
       agent fetch jwt -audience NAME[,NAME] [-spiffe-id ID] [same flags]

Fetches the identities of the calling process from the Workload API. The socket
is SPIFFE_ENDPOINT_SOCKET or RENEWD_SOCKET_PATH when set, else
/run/renewd/agent.sock. -write stores SVIDs, keys (mode 0600) and bundles as
files in DIR. Private keys are never printed.
`

// usageError is a command line that cannot be carried out.
type usageError struct{ text string }

func (e usageError) Error() string { return e.text }

func usagef(format string, args ...any) error { return usageError{fmt.Sprintf(format, args...)} }

// env is what a command may use of the process it runs in.
type env struct {
	getenv         func(string) string
	stdout, stderr io.Writer
}

// run carries out one command line and returns the exit status.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) int {
	err := dispatch(ctx, args, env{getenv, stdout, stderr})
	var usageErr usageError
	var configErr configError
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return exitOK
	case errors.As(err, &configErr):
		_, _ = fmt.Fprintln(stderr, configErr.Error())
		return exitUsage
	case errors.As(err, &usageErr):
		_, _ = fmt.Fprintf(stderr, "agent: %s\nRun \"agent help\" for the usage.\n", usageErr)
		return exitUsage
	}
	_, _ = fmt.Fprintf(stderr, "agent: %v\n", err)
	return exitCode(err)
}

func dispatch(ctx context.Context, args []string, e env) error {
	name := ""
	if len(args) > 0 {
		name, args = args[0], args[1:]
	}
	switch name {
	case "run":
		return runCommand(ctx, args, e)
	case "config":
		return configCommand(args, e)
	case "healthcheck":
		return healthCommand(ctx, args, e)
	case "status":
		return statusCommand(ctx, args, e)
	case "fetch":
		return fetchCommand(ctx, args, e)
	case "version", "-version", "--version":
		if len(args) > 0 {
			return usagef("version takes no argument, and got %q", args[0])
		}
		return printf(e.stdout, "renewd agent %s\n", versionString())
	case "help", "-h", "-help", "--help":
		return help(args, e)
	case "":
		return usagef("no command")
	}
	return usagef("unknown command %q", name)
}

func help(args []string, e env) error {
	texts := map[string]string{
		"": usage, "run": runUsage, "healthcheck": healthUsage, "status": statusUsage, "fetch": fetchUsage,
		"version": "Usage: agent version\n",
	}
	topic := strings.Join(args, " ")
	if strings.HasPrefix(topic, "config") {
		return printf(e.stdout, "%s\n%s", checkUsage, fieldTable())
	}
	text, ok := texts[topic]
	if !ok {
		return usagef("no help for %q", topic)
	}
	return printf(e.stdout, "%s", text)
}

// fieldTable lists every field for a terminal.
func fieldTable() string {
	var b strings.Builder
	b.WriteString("A flag wins over the environment, the environment over the file, the file over\nthe default. In the file a dot is a section.\n\n")
	for i := range fields {
		f := &fields[i]
		name := f.env()
		if f.flag() != "" {
			name = "-" + f.flag() + ", " + name
		}
		def := ""
		if f.def != "" {
			def = ", default " + f.def
		}
		fmt.Fprintf(&b, "%s (%s%s)\n    %s\n    %s\n", f.path, f.kind(), def, name, f.doc)
	}
	return b.String()
}

// parseFlags parses args into fset and prints the help text when asked for it.
// Arguments that are not flags are an error.
func parseFlags(fset *flag.FlagSet, args []string, helpText string, e env) error {
	fset.SetOutput(io.Discard)
	fset.Usage = func() {}
	if err := fset.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			if err := printf(e.stdout, "%s", helpText); err != nil {
				return err
			}
			return flag.ErrHelp
		}
		return usagef("%s: %v", fset.Name(), err)
	}
	if fset.NArg() > 0 {
		return usagef("%s: unexpected argument %q", fset.Name(), fset.Arg(0))
	}
	return nil
}

// printf writes to a command's output. A broken pipe is an error like any
// other: what was asked for was not delivered.
func printf(w io.Writer, format string, args ...any) error {
	if _, err := fmt.Fprintf(w, format, args...); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

// newTable starts an aligned table; Flush it.
func newTable(w io.Writer) *tabwriter.Writer { return tabwriter.NewWriter(w, 0, 0, 2, ' ', 0) }

// versionString is the linker's version, else what the Go tool recorded.
func versionString() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(unknown)"
}
