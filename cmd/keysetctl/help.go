package main

// offline marks a command that needs no server: its help omits the flags of one.
var offline = map[string]string{"offline": "true"}

// usageTemplate follows the description in the help of each command.
const usageTemplate = `
Usage:
  {{if .HasAvailableSubCommands}}{{.CommandPath}} COMMAND [ID] [FLAGS]{{else}}{{.UseLine}}{{end}}
{{- if .HasExample}}

Example:
{{.Example}}
{{- end}}
{{- if .HasAvailableSubCommands}}

Commands:
{{- range .Commands}}{{if .IsAvailableCommand}}
  {{rpad .Name .NamePadding}} {{.Short}}{{end}}{{end}}
{{- end}}
{{- if .HasAvailableLocalFlags}}

Flags:
{{.LocalFlags.FlagUsages | trimTrailingWhitespaces}}
{{- end}}
{{- if and .HasAvailableInheritedFlags (not (index .Annotations "offline"))}}

Server, deployment and output:
{{.InheritedFlags.FlagUsages | trimTrailingWhitespaces}}
{{- end}}
`

const rootHelp = `keysetctl replaces the signing keys of a deployment while all workloads keep a
valid identity. A planned rotation has five steps:

  1. keysetctl prepare        publishes a new keyset, NEW
  2. keysetctl activate NEW   lets NEW sign instead of OLD
  3. keysetctl taint OLD      lets agents replace the X.509-SVIDs that OLD signed
  4. keysetctl wait OLD       ends when no X.509-SVID depends on OLD
  5. keysetctl remove OLD     deletes OLD

"keysetctl list" shows the state before and between the steps. "keysetctl rotate"
runs all of them; you can interrupt it and run it again. "keysetctl plan" predicts
the load of step 3.

A step returns when its result is stored and published. keysetctl repeats no step.
After an error run "keysetctl list" to see whether the step was made.

All commands are also available under "keysetctl trust-domain deployment keyset".
Without flags, TRUST_DOMAIN and DEPLOYMENT_NAME choose the deployment.

Exit status: 0 success; 1 failure; 2 wrong command line; 3 not safe: SVIDs depend
on the keyset, or it is not known whether any do.
`

const listHelp = `Shows the keysets of a deployment. Each has a row for its X.509 key and one for its
JWT key.

State: Prepared (published, does not sign), Active (signs) or Tainted (published,
its X.509-SVIDs are being replaced).
Live SVIDs: the number of X.509-SVIDs in use that the key signed. For a JWT key: how
long the last of its JWT-SVIDs is valid.
Safe to remove: yes if no valid SVID depends on a Tainted key. A silent agent counts
with all SVIDs that it was given. An unknown figure is never safe.
`

const prepareHelp = `Makes a new keyset and publishes it in the trust bundle. The keyset does not sign.
Prints the ID for activate.
`

const activateHelp = `Lets a Prepared keyset sign. The Active keyset becomes Prepared, and its SVIDs stay
valid.

activate waits up to a minute until all agents have applied the trust bundle with the
new keyset, because the workloads of others could not verify its SVIDs. Then it names
those that have not, changes nothing and exits with status 3. --force does not wait.
Under a SPIRE server without --prometheus this is not known: activate says so and goes on.

Exit status: 0 success; 1 failure; 2 wrong command line; 3 agents are behind.
`

const taintHelp = `Lets agents replace the X.509-SVIDs of a Prepared keyset. An agent learns of the
taint at its next bundle refresh and starts after a random delay of at most a
minute. JWT-SVIDs are not replaced. The server rejects the taint of an Active
keyset: activate another one before.

taint waits for agents that have not applied the trust bundle, as activate does, and
exits with status 3 if they do not in a minute. --force does not wait.

Exit status: 0 success; 1 failure; 2 wrong command line; 3 agents are behind.
`

const waitHelp = `Waits until a Tainted keyset is safe to remove. Shows how many SVIDs are left, the
expected end, and the agents that hold them: grouped by reason, the worst by name, and
what to do next. On a terminal of 24 lines or more it also draws what is left by time,
beside the curve that plan predicts.

--until 99% ends the wait when at least 99 % of the deployment's agents no longer depend
on the keyset, and names the others. The keyset is not safe then: remove needs --force.
It does not end while the number of agents that depend on it is not known.

A failed poll of the server is repeated. Unknown figures are not safe: without
--timeout, wait may not end. It ends at once if nothing can make them known, as under a
SPIRE server without --prometheus.

Exit status: 0 the keyset is safe or was removed, or --until is reached; 1 failure, for
example no such keyset or not tainted; 2 wrong command line; 3 not safe within
--timeout, or it cannot be known. With -o json, the result is printed for 0 and 3.
`

const removeHelp = `Deletes a Tainted keyset. This cannot be undone: relying parties reject all SVIDs of
the keyset that are still in use.

If that is not safe, remove exits with status 3 and shows which agents depend on the
keyset and until when. Only X.509-SVIDs count. To wait for JWT-SVIDs as well, run
"keysetctl wait ID --for all" before.
`

const rotateHelp = `Runs all steps of a rotation: prepare, activate, taint, wait, remove. It asks before
each step. It waits until all agents have applied the trust bundle before activate
and taint, and until it is safe before remove. It never forces a step.

It continues from the current state until only the Active keyset is left. The first
line that fits decides the next step:
  a Tainted keyset                        wait until it is safe, remove it
  a Prepared one that signed before, is
  older than the Active one, or expired   taint it
  any other Prepared one                  activate it
  only the Active one                     prepare another, unless this run
                                          has replaced one
If a line fits several keysets, rotate names them. Choose one with --keyset.

You can interrupt rotate and run it again. It stops at the first step that fails or
whose outcome is not known. --timeout limits each wait.
`

const planHelp = `Predicts a taint wave: its start, the mints in the busiest second at the server, and
the times at which 50, 99 and 100 % of the SVIDs are renewed. It needs no server; it
draws random fleets and uses the arithmetic of the agents. --seed draws other fleets.
The plan assumes that the server answers at once. If answers take half a second, the
wave takes half as long again at two thirds of the rate.
`
