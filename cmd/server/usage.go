package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"strings"

	"github.com/renewd/renewd/internal/cli"
)

// version is set by the linker (-X main.version=...); see the Makefile.
var version string

const usage = `server signs the workload identities of one trust domain.

Usage:
  server run -config FILE            run the server
  server config check -config FILE   say what is wrong with a configuration, and start nothing
  server key new FILE                make the key that signing keys are encrypted under
  server key add FILE                add a new one to a key file, in order to rotate it

Of the running server, over its admin socket or, with -server, from elsewhere:
  server token create [-ttl 10m]     make a join token that lets one agent in
  server entries apply FILE          make the entries of a file all there are
  server entries list                list the registration entries
  server agent list                  list the agents
  server agent ban ID                refuse an agent from now on
  server agent evict ID              forget an agent, so that it has to attest again
  server clock show                  whether the server's clock is believed
  server clock confirm TIME          say that it is right, by another clock
  server backup FILE                 a copy of the store, checked, while the server goes on
  server audit                       what was done to the keysets, and by whom
  server bundle                      the trust bundle (PEM) that agents start from
  server health                      exit 0 when the server can sign
  server version                     print the version

"server help COMMAND" describes one command, "server help config" every field of
the configuration, "server help entries" every field of an entry. Keysets are
rotated with keysetctl.

Exit status: 0 success, and a stop by SIGTERM or SIGINT; 1 failure; 2 wrong
command line, configuration or entries file; 3 the store is damaged or was
encrypted under another key: no restart will change that.
`

const runUsage = `Usage: server run [-config FILE] [-FIELD VALUE]...

Runs until SIGTERM or SIGINT, then lets calls in flight end and exits 0. A second
signal ends it at once. Every field of the configuration can be given as a flag
or in the environment too, except deployments and federation, which are in the
file alone: "server help config" lists them.
`

const checkUsage = `Usage: server config check -config FILE [-FIELD VALUE]...

Reads the configuration as "server run" would and prints every error with its
place and its remedy. Starts nothing and writes nothing.
`

const keyUsage = `Usage: server key new FILE
       server key add FILE

The signing keys in the store are encrypted under a key that lies elsewhere: in
a file of mode 0600 (key_file) or in the systemd credential renewd-store-key. Keep
a copy: a store cannot be read without it.

new makes a key file and never overwrites one. With - as FILE it prints the key:
  server key new - | systemd-creds encrypt --name=renewd-store-key - /etc/renewd/store-key.cred
add puts a new key before the ones that the file has. At its next start the
server encrypts everything under the new one; the older ones can go then.
`

const clientUsage = `
  -admin-socket PATH      the server's admin socket (default /run/renewd-server/admin.sock, or what
                          RENEWD_ADMIN_SOCKET or RENEWD_SERVER_ADMIN_SOCKET says). A server that is
                          starting is waited for, 5s and at most half of -timeout
  -server HOST:PORT       a server elsewhere (operators.address), with this operator's own SVID from
                          the Workload API at SPIFFE_ENDPOINT_SOCKET
  -trust-domain NAME      the trust domain (default TRUST_DOMAIN, else the server's own)
  -deployment-name NAME   the deployment (default DEPLOYMENT_NAME, else the only one)
  -timeout DURATION       how long to wait (default 1m)
  -o text|json            how to print (default text)
`

const tokenUsage = `Usage: server token create [-ttl DURATION]

Makes a join token that lets one agent in, once, within the time given (default
10m). The token alone is printed to standard output, when it ends to standard
error.
` + clientUsage

const entriesUsage = `Usage: server entries apply FILE [-dry-run] [-remove N]
       server entries list

apply makes the entries of a YAML file all that the deployment has, in one atomic
step, and prints what that changes: + added, ~ changed, - removed. With -dry-run
nothing is changed.

A file that removes all entries, more than 20, or more than 5 and more than a tenth
of them is refused unless -remove gives their number as the dry run prints it: a
file that was cut off looks like that. With -remove, another number is refused.
` + clientUsage

const agentUsage = `Usage: server agent list
       server agent ban ID
       server agent evict ID [-gone]

ID is the agent's SPIFFE ID as list shows it. A banned agent is refused and stops.
An evicted one is forgotten and has to attest again. What either was given
counts as held until it expires, unless -gone gives your word that the node no
longer exists. An ID that the server has never heard of is an error.
` + clientUsage

const clockUsage = `Usage: server clock show
       server clock confirm TIME

show prints what the server's clock shows and what time it is at least: what is valid
then counts as valid. A clock that went ahead of the last heartbeat and the uptime by
more than three days, or was set back by more than five minutes, is in doubt.
Automatic rotation waits then. It goes on when the clock has stayed there for an hour,
a day if it was set back, and that of an agent or a remote operator fits it.

confirm ends the doubt. TIME is what another clock shows that you trust, within five
minutes, such as 2026-01-02T15:04Z: that of this machine may be the one in doubt. It is
written in the audit log.
` + clientUsage

const auditUsage = `Usage: server audit [-after NUMBER]

Prints every mutation of the keysets, and every time that the clock was confirmed, oldest
first: who did what, when, and what it changed. With -after only the records after
that number.
` + clientUsage

const backupUsage = `Usage: server backup FILE [-key-file KEY] [-force]

Makes a copy of the running server's store, of all deployments, as it is at one
moment. It is written beside FILE, checked completely and then named FILE: a file
of that name is whole. One that exists is replaced with -force only. Who does it
must be in operators.managers. It may take two minutes (-timeout is 2m10s when not
given), and data_dir must have room for two of it.

The signing keys in it are encrypted, as in the store; the key that opens them is
not in it. With -key-file, that key, it is also checked that it does open them.

To restore, stop the server, put the file in the place of renewd.db in data_dir,
for the server's user, and start it. The server knows then that it does not know
what was signed since the copy was taken: no keyset in it is safe to remove before
all of that has expired, a week later at the latest for X.509-SVIDs. Join tokens
are gone. A file that was copied in another way tells the server nothing of this.
` + clientUsage

const bundleUsage = `Usage: server bundle

Prints the trust bundle as PEM certificates: what an agent's trust_bundle_file holds.
` + clientUsage

const healthUsage = `Usage: server health

Exits 0 when the server answers and every deployment has an active keyset that
can sign. Prints one line for each deployment. All deployments are looked at
unless one is named. A server that is not up yet is not waited for.
` + clientUsage

// run carries out one command line and returns the exit status.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) int {
	e := cli.Env{Getenv: getenv, Stdout: stdout, Stderr: stderr}
	err := dispatch(ctx, args, e)
	code := cli.Report("server", err, e)
	if code == cli.ExitFailed && hopeless(err) {
		return exitStore
	}
	return code
}

func dispatch(ctx context.Context, args []string, e cli.Env) error {
	name, sub, rest := "", "", []string(nil)
	if len(args) > 0 {
		name, args = args[0], args[1:]
	}
	if len(args) > 0 {
		sub, rest = args[0], args[1:]
	}
	switch name {
	case "run":
		return runCommand(ctx, args, e)
	case "config":
		return cli.ConfigCheck(&schema, args, checkUsage+"\n"+schema.Usage(), e)
	case "audit":
		return auditCommand(ctx, args, e)
	case "backup":
		return backupCommand(ctx, args, e)
	case "bundle":
		return bundleCommand(ctx, args, e)
	case "health":
		return healthCommand(ctx, args, e)
	case "version", "-version", "--version":
		return cli.PrintVersion("server", version, args, e)
	case "help", "-h", "-help", "--help":
		return help(args, e)
	case "":
		return cli.Usagef("no command")
	}
	commands, ok := subcommands[name]
	if !ok {
		return cli.Usagef("unknown command %q", name)
	}
	if command, ok := commands[sub]; ok {
		return command(ctx, rest, e)
	}
	switch {
	case cli.IsHelp(sub):
		return help([]string{name}, e)
	case sub == "":
		return cli.Usagef("%s: say what to do: %s", name, verbs[name])
	}
	return cli.Usagef("%s: unknown subcommand %q: use %s", name, sub, verbs[name])
}

type command func(ctx context.Context, args []string, e cli.Env) error

var subcommands = map[string]map[string]command{
	"key":     {"new": keyNewCommand, "add": keyAddCommand},
	"token":   {"create": tokenCommand},
	"entries": {"apply": applyCommand, "list": entriesCommand},
	"clock":   {"show": clockCommand, "confirm": confirmCommand},
	"agent":   {"list": agentsCommand, "ban": banCommand, "evict": evictCommand},
}

var verbs = map[string]string{"key": "new or add", "token": "create", "entries": "apply or list", "agent": "list, ban or evict", "clock": "show or confirm"}

func help(args []string, e cli.Env) error {
	texts := map[string]string{
		"": usage, "run": runUsage, "config": checkUsage + "\n" + schema.Usage(), "key": keyUsage, "token": tokenUsage,
		"entries": entriesUsage + "\nThe fields of an entry, below entries:\n\n" + entrySchema.FieldList(),
		"agent":   agentUsage, "clock": clockUsage, "audit": auditUsage, "backup": backupUsage, "bundle": bundleUsage, "health": healthUsage,
		"version": "Usage: server version\n",
	}
	topic := ""
	if len(args) > 0 {
		topic = args[0] // "help agent ban" is the help of agent
	}
	text, ok := texts[topic]
	if !ok {
		return cli.Usagef("no help for %q", strings.Join(args, " "))
	}
	return cli.Printf(e.Stdout, "%s", text)
}

// parse reads flags that may stand before and after the arguments, of which
// there must be as many as names. It returns the arguments.
func parse(fset *flag.FlagSet, args []string, helpText string, e cli.Env, names ...string) ([]string, error) {
	var have []string
	for {
		rest, err := cli.ParseFlags(fset, args, helpText, e)
		if err != nil {
			return nil, err
		}
		if len(rest) == 0 {
			break
		}
		have, args = append(have, rest[0]), rest[1:]
	}
	switch {
	case len(have) < len(names):
		return nil, cli.Usagef("%s: give the %s", fset.Name(), names[len(have)])
	case len(have) > len(names):
		return nil, cli.Usagef("%s: unexpected argument %q", fset.Name(), have[len(names)])
	}
	return have, nil
}

// flushed ends a table.
func flushed(table interface{ Flush() error }) error {
	if err := table.Flush(); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}
