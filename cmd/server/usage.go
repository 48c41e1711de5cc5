package main

import "github.com/renewd/renewd/internal/cli"

// version is set by the linker (-X main.version=...); see the Makefile.
var version string

var program = cli.Program{
	Name: "server", Version: version, Usage: usage,
	Commands: []cli.Command{
		{Name: "run", Help: cli.Text(runUsage), Run: runCommand},
		cli.ConfigCommand("server", &schema),
		{Name: "key", Help: cli.Text(keyUsage), Sub: []cli.Command{{Name: "new", Run: keyNewCommand}, {Name: "add", Run: keyAddCommand}}},
		{Name: "token", Help: cli.Text(tokenUsage), Sub: []cli.Command{{Name: "create", Run: tokenCommand}}},
		{Name: "entries", Help: entriesHelp, Sub: []cli.Command{{Name: "apply", Run: applyCommand}, {Name: "import", Run: importCommand}, {Name: "list", Run: entriesCommand}}},
		{Name: "agent", Help: cli.Text(agentUsage), Sub: []cli.Command{
			{Name: "list", Run: agentsCommand}, {Name: "ban", Run: banCommand}, {Name: "evict", Run: evictCommand},
		}},
		{Name: "clock", Help: cli.Text(clockUsage), Sub: []cli.Command{{Name: "show", Run: clockCommand}, {Name: "confirm", Run: confirmCommand}}},
		{Name: "backup", Help: cli.Text(backupUsage), Run: backupCommand},
		{Name: "audit", Help: cli.Text(auditUsage), Run: auditCommand},
		{Name: "bundle", Help: cli.Text(bundleUsage), Run: bundleCommand},
		{Name: "health", Help: cli.Text(healthUsage), Run: healthCommand},
	},
}

const usage = `server signs the workload identities of one trust domain.

Usage:
  server run --config FILE           run the server
  server config check --config FILE  check a configuration without starting the server
  server key new FILE                create the key that encrypts the signing keys
  server key add FILE                add a new key to a key file, to rotate the key

Commands for the running server, over its admin socket or, with --server, over the network:
  server token create [--ttl 10m] [--label TEXT]
                                     create a join token for one agent
  server entries apply FILE          replace all registration entries with those of a file
  server entries import FILE         convert the entries of a SPIRE server to such a file
  server entries list                list the registration entries, of all agents or of one
  server agent list                  list the agents
  server agent ban ID                reject an agent from now on
  server agent evict ID              delete an agent, so that it has to re-attest
  server clock show                  show whether the server's clock is in doubt
  server clock confirm TIME          confirm the server's clock with the time of another clock
  server backup FILE                 copy the store of the running server, and check the copy
  server audit                       list what was changed, when and by whom
  server bundle                      print the trust bundle (PEM) that agents start from
  server health                      exit 0 if the server can sign
  server version                     print the version

"server help COMMAND" describes one command, "server help config" every field of
the configuration, "server help entries" every field of an entry. Rotate keysets
with keysetctl.

Exit status: 0 success, and a stop by SIGTERM or SIGINT; 1 failure; 2 failure
that no restart mends: a wrong command line, configuration or entries file, a file
with the wrong content, owner or mode, or a store that is damaged, of another trust
domain or encrypted with another key.
`

const runUsage = `Usage: server run [--config FILE] [--FIELD VALUE]...

Runs until SIGTERM or SIGINT, then finishes calls in flight and exits 0. A second
signal ends it at once. SIGHUP reloads the configuration.

Every field can also be set by a flag or in the environment, except those below a name of
your choice, such as federation, which can be set in the file only: "server help config"
lists the fields.
`

const keyUsage = `Usage: server key new FILE
       server key add FILE

The signing keys in the store are encrypted with a key that is not in the store.
It is in a file of mode 0600 (key_file) or in the systemd credential renewd-store-key.
Keep a copy: a store cannot be read without its key.

new creates a key file and never overwrites one. With - as FILE it prints the key:
  server key new - | systemd-creds encrypt --name=renewd-store-key - /etc/renewd/store-key.cred
add adds a new key to the file and makes it the primary one. At its next start the
server encrypts everything with the new key; then you can remove the older ones.
`

const clientUsage = `
  --admin-socket PATH     the server's admin socket (default RENEWD_ADMIN_SOCKET or
                          RENEWD_SERVER_ADMIN_SOCKET, else /run/renewd-server/admin.sock). The command
                          waits for a starting server, for 5s or half of --timeout if that is less
  --server HOST:PORT      a remote server (operators.address), with the operator's X.509-SVID from
                          the Workload API at SPIFFE_ENDPOINT_SOCKET
  --trust-domain NAME     the trust domain (default TRUST_DOMAIN, else the server's own)
  --deployment-name NAME  the deployment (default DEPLOYMENT_NAME, else the only one)
  --timeout DURATION      how long to wait (default 1m)
  -o text|json            the output format (default text)
`

const tokenUsage = `Usage: server token create [--ttl DURATION] [--label TEXT]

Creates a join token. It attests one agent, once, within the given time (default
10m). Standard output has the token alone, standard error the time when it expires.
The label says which node the token is for, such as its name in your inventory: "server
agent list", keysetctl and the audit log show it beside the agent's ID.
` + clientUsage

const entriesUsage = `Usage: server entries apply FILE [--dry-run] [--remove N]
       server entries import FILE [--trust-domain NAME]
       server entries list [--agent ID]

list prints all registration entries of the deployment, or with --agent those that this
agent serves: the entries below its SPIFFE ID and below the aliases of its node, and
those without a parent. With -o yaml it prints a file for apply.

apply replaces all registration entries of the deployment with those of a YAML file,
atomically, and prints the changes: + added, ~ changed, - removed. With --dry-run it
changes nothing. FILE may be -, standard input.

An entry needs no id. Without one it is the stored entry with the same parent_id,
spiffe_id and selectors, or else one with two of the three: an edit, which keeps the ID.
A new one gets "entry-" and 16 hex digits: the start of the SHA-256 of parent_id,
spiffe_id and the sorted selectors, each with a newline behind it.

apply rejects a file that removes all entries, more than 20, or more than 5 and more
than a tenth of them, because a truncated file looks like that. To apply it, give the
number that the dry run prints with --remove. Any other number is rejected, too.

import prints the entries of a SPIRE server as a file for apply. It reads what
"spire-server entry show -output json" prints, and needs no server. Standard error names
every entry with admin, downstream or store_svid, which are never carried over, and all
else that has no counterpart here. With --trust-domain the entries of others are left out.
` + clientUsage

const agentUsage = `Usage: server agent list
       server agent ban ID
       server agent evict ID [--gone]

list prints a row for each agent and its SPIFFE ID below. NODE is the hostname that the
agent reports, and in parentheses the label of its join token; BUNDLE is the sequence
number of the trust bundle that the agent applies.

ID is the agent's SPIFFE ID as list shows it. The server rejects a banned agent, and
the agent stops. It deletes an evicted agent, which has to re-attest. The SVIDs of
either count as held until they expire. With --gone you confirm that the node no longer
exists, and they stop counting at once. An unknown ID is an error.
` + clientUsage

const clockUsage = `Usage: server clock show
       server clock confirm TIME

show prints the time of the server's clock and the time that has certainly passed. An
SVID that is valid at the latter counts as valid. A clock is in doubt if it is ahead of
the last heartbeat and the uptime by more than three days, or was set back by more than
five minutes. Automatic rotation waits then. It continues when the clock has been steady
for an hour (a day if it was set back) and agrees with that of an agent or a remote operator.

confirm ends the doubt. TIME is the time of another clock that you trust, such as
2026-01-02T15:04Z, within five minutes. The clock of this machine may be the one in
doubt. The audit log records the confirmation.
` + clientUsage

const auditUsage = `Usage: server audit [--kind KIND[,KIND]...] [--after NUMBER]

Lists what was changed, oldest first: the time, the operator, the operation and what was
before and after. --kind lists only records of these kinds:
  keysets  every step of a rotation, by operators and by the server
  entries  every entry that was added, changed or removed
  tokens   join tokens that were created, with label and expiry, never the token
  agents   bans and evictions
  backups  copies of the store, and restores
  clock    confirmations of the clock
With --after it lists only the records after that number. -o json prints everything that
a record has; docs/operations.md describes each field.

A dry run is not recorded. Records of entries, tokens and agents are deleted when there
are 200,000 later records; all others stay.
` + clientUsage

const backupUsage = `Usage: server backup FILE [--key-file KEY] [--force]
       server backup - [--key-file KEY]

Writes a consistent copy of the running server's store, with all deployments, to FILE.
The copy is checked before it is renamed to FILE, so FILE is always complete. An existing
file is replaced only with --force, and only if it is empty or an older backup that no
server has open. You must be in operators.managers. A backup can take
two minutes (--timeout is 2m10s by default), and data_dir needs room for two copies.
The audit log records the backup before the copy is made.

With - as FILE the copy goes to standard output, which must not be a terminal, and the
result lines, with -o json, too, go to standard error. The copy is checked first, in the
folder TMPDIR (default /tmp), so nothing incomplete is written. What is not a regular file,
such as a device, a FIFO or a link, is never replaced:
  server backup - | ssh backups 'cat > renewd.db'

The signing keys in the copy are encrypted, as in the store. The encryption key is not
in the copy. With --key-file the command also checks that this key decrypts them.

To restore, stop the server, replace renewd.db in data_dir with the file, owned by
the server's user, and start the server. It detects the restore. It does not know the
SVIDs that were signed after the copy, so no keyset of the copy is safe to remove before
they have expired: X.509-SVIDs within a week, JWT-SVIDs with the keyset. Join tokens are
deleted. The server does not detect a restore of a file that was copied in another way.
` + clientUsage

const bundleUsage = `Usage: server bundle

Prints the trust bundle as PEM certificates, for an agent's trust_bundle_file.
` + clientUsage

const healthUsage = `Usage: server health

Exits 0 if the server answers and every deployment has an active keyset that can
sign. Prints one line for each deployment, or for the named one only. It does not
wait for a starting server.
` + clientUsage

func entriesHelp() string {
	return entriesUsage + "\nThe fields of an entry, below entries:\n\n" + entrySchema.FieldList()
}
