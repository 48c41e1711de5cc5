package main

// offline marks a command that needs no server: its help leaves those flags
// out.
var offline = map[string]string{"offline": "true"}

// usageTemplate prints what follows a command's own text. Flags that say
// where the server is are shown with the commands that use them.
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

Which server, which deployment, what output:
{{.InheritedFlags.FlagUsages | trimTrailingWhitespaces}}
{{- end}}
`

const rootHelp = `keysetctl replaces the signing keys of a deployment, without taking a valid
identity from any workload. A planned rotation has five steps:

  1. keysetctl prepare        a new keyset is published; it does not sign yet
  2. keysetctl activate NEW   it signs from now on; the old one steps down
  3. keysetctl taint OLD      agents replace every X.509-SVID that OLD signed
  4. keysetctl wait OLD       ends when nothing hangs on OLD any more
  5. keysetctl remove OLD     OLD leaves the trust bundle, for good

"keysetctl list" shows where a deployment stands, before and between the steps.
"keysetctl rotate" walks through all of them and can be interrupted and run
again at any time. "keysetctl plan" says beforehand what step 3 will cost.

Every step returns when it is done, durable and published; none is ever retried
by itself. After an error run keysetctl list: the step may have happened.

The commands exist under "keysetctl trust-domain deployment keyset" as well.
The trust domain and the deployment come from TRUST_DOMAIN and DEPLOYMENT_NAME
where the flags are not given.

Exit status: 0 success; 1 failure; 2 wrong command line; 3 not safe: something
still hangs on the keyset, or whether anything does is not known.
`

const listHelp = `Shows the keysets of a deployment, two rows each: the X.509 key and the JWT key.

States: Prepared (published, does not sign), Active (signs), Tainted (published,
and what it signed is being replaced).
Live SVIDs: how many X.509-SVIDs that the key signed are still in use; of a JWT
key, for how long the last of its JWT-SVIDs is valid.
Safe to remove: whether removing the key takes no valid SVID from anybody. Only
a Tainted key can be. An agent that is silent counts as holding what it was
given, and what is not known is never safe.
`

const prepareHelp = `Makes a new keyset and publishes it in the trust bundle. It does not sign yet.
Prints its ID, which activate takes.
`

const activateHelp = `Makes a Prepared keyset the one that signs. The Active one steps down to Prepared:
what it signed stays valid.

Wait until the agents have applied the trust bundle with the new keyset before:
list says when some have not.
`

const taintHelp = `Marks a Prepared keyset as one to be retired. Agents see it at their next refresh,
wait a random delay of at most a minute and replace the X.509-SVIDs that it
signed. JWT-SVIDs stay valid until they expire. An Active keyset cannot be
tainted: activate its successor first.
`

const waitHelp = `Waits until a Tainted keyset is safe to remove, and shows how many SVIDs are left,
which agents hold them and why, and when it is expected to end.

A look at the server that fails is made again. An answer that is not known is
never safe: without --timeout it is waited for without end.

Exit status: 0 it is safe, or was removed meanwhile; 1 failure, as when there is
no such keyset or it is not tainted; 2 wrong command line; 3 not safe within
--timeout. With -o json the answer is printed in the cases 0 and 3.
`

const removeHelp = `Takes a Tainted keyset out of the trust bundle and deletes its keys. This is
permanent: what it signed fails verification from then on.

What is not safe is refused, with exit status 3, and it is said what still hangs
on it and until when. JWT-SVIDs that are still valid do not make it unsafe, but
relying parties reject them as soon as they fetch the trust bundle: "keysetctl
wait ID --for all" waits for them too.
`

const rotateHelp = `Walks through a rotation: prepare, activate, taint, wait, remove. It asks before
each step, waits until all agents have applied the trust bundle before activate
and taint, and until it is safe before remove.

It goes on from wherever the deployment stands, until one keyset is left, and
that is active:
  a Tainted keyset                        wait until it is safe, remove it
  a Prepared one that signed before, is
  older than the Active one, or expired   taint it
  any other Prepared one                  activate it
  only the Active one                     prepare the next, unless one was
                                          replaced by this very run
The first line that fits is the next step. Where it fits several keysets they
are named, and --keyset says which is meant.

So it can be interrupted at any time and run again. It stops at the first step
that fails or whose outcome is not known. --timeout bounds each of the waits.
`

const planHelp = `Computes what happens after a taint: when it starts, how many SVIDs the server has
to mint in the busiest second, and when 50, 99 and 100 % are renewed. It uses the
agents' own arithmetic and asks no server. Fleets are drawn at random; --seed
draws others. The server is taken to answer at once: with answers that take half
a second a wave takes half as long again, at a rate that is so much lower.
`
