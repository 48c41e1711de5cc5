#!/usr/bin/env bash
# The parent of a SPIRE entry can be a workload, or an ID that nothing has: only some are served.
#
# Seen with   SPIRE 1.13.3
# Behaviour   "entry create" accepts any parent in the trust domain. If that is the SPIFFE ID of
#             another entry, each agent that serves that entry serves the new one too, at any
#             depth, although a workload is not a node. If no agent, alias or entry has the ID,
#             or the path is below /spire, which is reserved, no agent ever serves the entry.
#             Nothing warns of it, neither at "entry create" nor in the log.
# Operators   A typing error in a parent, such as /spire/agents, looks like a workload without entry.
#             And deleting or moving one entry takes those away whose parent has the same
#             SPIFFE ID: look for them with "entry show -parentID" before that.
# renewd      serves the same entries; its server refuses a reserved parent that is neither an
#             agent nor the server (docs/workloads.md, docs/spire.md).
#
# Output seen
#   served: below-below below-web web
#   accepted, not served: below-nobody below-spire
#   warnings: 0
#   web deleted, served: none
source "$(dirname "$0")/lib.sh"
spire 1.13.3
spire_server spire
entry() { # ID PARENT
	api spire entry create -entryID "$1" -spiffeID "spiffe://example.org/$1" -parentID "spiffe://example.org/$2" -selector "unix:uid:$(id -u)" >/dev/null
}
entry web node
entry below-web web
entry below-below below-web
entry below-nobody nobody
entry below-spire spire/agents/join_token/1
served() {
	spire-agent api fetch x509 -socketPath "$work/agent.sock" 2>/dev/null | sed -n 's|^SPIFFE ID:.*example.org/||p' | sort | xargs
}
serves_none() { [ -z "$(served)" ]; }
spire_agent spire
{
	echo "served: $(served)"
	echo "accepted, not served: $(api spire entry show -output json | json '"\n".join(sorted(e["id"] for e in doc["entries"] if e["id"].startswith("below")))' |
		grep -vxF "$(served | xargs -n 1)" | xargs)"
	echo "warnings: $(grep -c 'below-\|nobody\|agents/' spire.log || true)"
	api spire entry delete -entryID web >/dev/null
	until_true 30 serves_none
	echo "web deleted, served: $(served | grep . || echo none)"
} >seen
expect <<'SEEN'
served: below-below below-web web
accepted, not served: below-nobody below-spire
warnings: 0
web deleted, served: none
SEEN
