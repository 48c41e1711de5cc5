package main

import (
	"context"
	"errors"
	"io"
	"strings"

	"github.com/renewd/renewd/internal/agent/upstream"
	"github.com/renewd/renewd/internal/cli"
)

// version is set by the linker (-X main.version=...); see the Makefile.
var version string

// exitBanned is the exit status of an agent whose node the server has banned: a
// restart would end the same way.
const exitBanned = 3

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

const checkUsage = `Usage: agent config check -config FILE [-FIELD VALUE]...

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

Exits 0 when /ready of the running agent says so and the Workload API answers; an
answer that this caller has no identity is fine. Otherwise prints the reasons, one
a line, each with its name:

  starting    the trust bundle and the entries have not arrived yet
  agent_svid  the agent has no SVID that the server accepts
  socket      the Workload API's socket file is gone and could not be made again
  x509_svids  no entry has a valid X.509-SVID
  entries     no entry sync has succeeded for 5 minutes
  bundle      no bundle refresh has succeeded for 5 minutes
  data_dir    what a restart needs could not be written
  runtime_dir the same of workload SVIDs

The agent serves what it holds all the while. /live is what a restart is decided by.

  -socket PATH          socket of the Workload API (default /run/renewd/agent.sock, or what
                        SPIFFE_ENDPOINT_SOCKET or RENEWD_SOCKET_PATH says; "" to leave it out)` + httpUsage

const statusUsage = `Usage: agent status [-o text|json] [-url URL]

Prints how many X.509-SVIDs of workloads are in each state and, for each signing
authority, how many SVIDs this node holds, how many taint renewals wait, how many
workloads have not read the replacement, and whether the authority is safe to remove
as far as this node goes. The agent SVID counts as a renewal that waits, and not as
held.

States of an X.509-SVID ("svids" in JSON):
  waiting       none is held yet
  minting       the server has been asked for it
  fresh         valid, renewal not due
  due           valid, renewal waits for its turn
  backing_off   the last attempt failed, or came back tainted; the next one waits
  stale         its authority is tainted, renewal waits for this node's delay
  expired       expired and not replaced

States of an authority, as far as this node knows: active (it signed the newest
SVID), prepared (it signs nothing yet or no longer), tainted, removed.

  -o text|json          how to print (default text)` + httpUsage

const fetchUsage = `Usage: agent fetch x509 [-socket PATH] [-o text|json] [-write DIR] [-timeout DURATION]
       agent fetch jwt -audience NAME[,NAME] [-spiffe-id ID] [same flags]

Fetches the identities of the calling process from the Workload API. Private keys
are never printed.

  -socket PATH          socket of the Workload API (default /run/renewd/agent.sock, or what
                        SPIFFE_ENDPOINT_SOCKET or RENEWD_SOCKET_PATH says)
  -o text|json          how to print (default text)
  -write DIR            store SVIDs, keys (mode 0600) and bundles as files in DIR
  -timeout DURATION     how long to wait, also for an agent that is starting (default 5s)
  -audience NAME,NAME   for whom the JWT-SVIDs are
  -spiffe-id ID         one of several identities (default all)
`

// run carries out one command line and returns the exit status.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) int {
	e := cli.Env{Getenv: getenv, Stdout: stdout, Stderr: stderr}
	err := dispatch(ctx, args, e)
	code := cli.Report("agent", err, e)
	if errors.Is(err, upstream.ErrBanned) {
		return exitBanned
	}
	return code
}

func dispatch(ctx context.Context, args []string, e cli.Env) error {
	name := ""
	if len(args) > 0 {
		name, args = args[0], args[1:]
	}
	switch name {
	case "run":
		return runCommand(ctx, args, e)
	case "config":
		return cli.ConfigCheck(&schema, args, checkUsage+"\n"+schema.Usage(), e)
	case "healthcheck":
		return healthCommand(ctx, args, e)
	case "status":
		return statusCommand(ctx, args, e)
	case "fetch":
		return fetchCommand(ctx, args, e)
	case "version", "-version", "--version":
		return cli.PrintVersion("agent", version, args, e)
	case "help", "-h", "-help", "--help":
		return help(args, e)
	case "":
		return cli.Usagef("no command")
	}
	return cli.Usagef("unknown command %q", name)
}

func help(args []string, e cli.Env) error {
	texts := map[string]string{
		"": usage, "run": runUsage, "healthcheck": healthUsage, "status": statusUsage, "fetch": fetchUsage,
		"config": checkUsage + "\n" + schema.Usage(), "version": cli.VersionUsage("agent"),
	}
	topic := ""
	if len(args) > 0 {
		topic = args[0] // "help fetch jwt" is the help of fetch
	}
	text, ok := texts[topic]
	if !ok {
		return cli.Usagef("no help for %q", strings.Join(args, " "))
	}
	return cli.Printf(e.Stdout, "%s", text)
}
