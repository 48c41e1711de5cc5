package main

import (
	"github.com/renewd/renewd/internal/cli"
)

// version is set by the linker (-X main.version=...); see the Makefile.
var version string

var program = cli.Program{
	Name: "agent", Version: version, Usage: usage,
	Commands: []cli.Command{
		{Name: "run", Help: cli.Text(runUsage), Run: runCommand},
		cli.ConfigCommand("agent", &schema),
		{Name: "healthcheck", Help: cli.Text(healthUsage), Run: healthCommand},
		{Name: "status", Help: cli.Text(statusUsage), Run: statusCommand},
		{Name: "attest", Help: cli.Text(attestUsage), Run: attestCommand},
		{Name: "fetch", Help: cli.Text(fetchUsage), Sub: []cli.Command{{Name: "x509", Run: fetchX509Command}, {Name: "jwt", Run: fetchJWTCommand}}},
	},
}

const usage = `agent keeps the workload identities of this node valid while signing keys change.

Usage:
  agent run --config FILE           run the daemon
  agent config check --config FILE  report every problem of a configuration, and start nothing
  agent healthcheck                 exit 0 if the running agent is ready
  agent status                      print what the running agent holds by signing authority
  agent attest PID                  print what the running agent finds out about a process
  agent fetch x509                  fetch X.509-SVIDs from the Workload API like a workload
  agent fetch jwt --audience NAME   fetch JWT-SVIDs
  agent version                     print the version

"agent help COMMAND" describes one command, "agent help config" every field of
the configuration.

Exit status: 0 success, and a stop by SIGTERM or SIGINT; 1 failure; 2 wrong
command line or configuration; 3 the server has banned this node.
`

const runUsage = `Usage: agent run [--config FILE] [--FIELD VALUE]...

Runs until SIGTERM or SIGINT, then closes all streams and exits 0. A second
signal ends it at once. A flag or a variable can set every field of the
configuration: "agent help config" lists them.
`

const httpUsage = `
  --url URL             metrics and health of the agent (default http://127.0.0.1:9090, or
                        the address in RENEWD_METRICS_ADDRESS)
  --ca FILE             CA certificates (PEM) that the agent's HTTPS certificate must chain to
  --user NAME           user for basic auth
  --password-file FILE  file with the password for basic auth
  --timeout DURATION    how long to wait (default 5s)
`

const healthUsage = `Usage: agent healthcheck [--url URL] [--socket PATH]

Exits 0 if /ready of the running agent succeeds and the Workload API answers. This
process needs no identity. Otherwise prints the reasons, one a line:

  starting    no trust bundle or no entries received yet
  agent_svid  the agent has no SVID that the server accepts
  socket      the Workload API socket is missing and cannot be recreated
  x509_svids  no entry has a valid X.509-SVID
  entries     no entry sync has succeeded for 5 minutes
  bundle      no bundle refresh has succeeded for 5 minutes
  data_dir    state for a restart not written
  runtime_dir workload SVIDs for a restart not written

The agent goes on serving SVIDs meanwhile. Use /live, not /ready, to decide about
restarts.

  --socket PATH         socket of the Workload API (default SPIFFE_ENDPOINT_SOCKET,
                        RENEWD_SOCKET_PATH or /run/renewd/agent.sock; "" to skip it)` + httpUsage

const statusUsage = `Usage: agent status [-o text|json] [--url URL]

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

  -o text|json          output format (default text)` + httpUsage

const attestUsage = `Usage: agent attest PID [--admin-socket PATH] [-o text|json] [--timeout DURATION]

Has the running agent attest a process of this node, and prints its selectors, the
attestor that found each, how long it took, and the entries that match. If none does,
it prints the entries that lack only one selector. Run it as root. Selectors may
contain secrets, such as the environment of a container.

Outcome: what the Workload API answers to the process.
  matched       the identities of the entries
  denied        PermissionDenied: no entry matches
  unavailable   Unavailable: an attestor failed, and an entry could match
  starting      Unavailable: the agent does not know the entries yet

  --admin-socket PATH   the agent's admin socket (default RENEWD_ADMIN_SOCKET_PATH, or the
                        one beside the socket of the Workload API: /run/renewd/agent-admin.sock)
  -o text|json          output format (default text)
  --timeout DURATION    how long to wait (default 30s)
`

const fetchUsage = `Usage: agent fetch x509 [--socket PATH] [-o text|json] [--write DIR] [--timeout DURATION]
       agent fetch jwt --audience NAME[,NAME] [--spiffe-id ID] [same flags]

Fetches the identities of the calling process from the Workload API. Private keys
are never printed.

  --socket PATH         socket of the Workload API (default SPIFFE_ENDPOINT_SOCKET,
                        RENEWD_SOCKET_PATH or /run/renewd/agent.sock)
  -o text|json          output format (default text)
  --write DIR           write SVIDs, keys (mode 0600) and bundles as files into DIR
  --timeout DURATION    how long to wait, also for an agent that is starting (default 5s)
  --audience NAME,NAME  audience of the JWT-SVIDs
  --spiffe-id ID        only this identity (default all)
`
