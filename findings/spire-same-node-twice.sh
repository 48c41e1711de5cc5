#!/usr/bin/env bash
# Two SPIRE agents with one node certificate keep evicting each other, and no log says that there are two.
#
# Seen with   SPIRE 1.13.3
# Behaviour   Two agents with the same x509pop certificate, such as those of a copied machine, have one
#             SPIFFE ID, and the attestation of one ends the agent SVID of the other. An agent is
#             denied at its sync, attests again, and its new agent SVID has ended before the next
#             sync. While the syncs of the two alternate, neither gets an entry that was created
#             later. Each logs "Successfully reattested node" every five seconds. No
#             message of agents or server mentions another agent, and "agent list" shows one agent,
#             with an SVID that has just been issued.
# Operators   New workloads get no SVID on that node, and the agent's log says that each attempt to
#             repair it succeeds. Look for "Agent SVID is not active" in the server's log; the
#             addresses in "Agent attestation request completed" (level info) tell the
#             machines apart. The same happens while a node and its replacement both run.
# renewd      logs at each agent that another attestation revoked its agent SVID, and what to do
#             (docs/troubleshooting.md).
#
# Output seen
#   entry created before: agent one has it, agent two has it
#   entry created after: agent one has not, agent two has not
#   agent one: Agent needs to re-attest; will attempt to re-attest; Failed to fetch authorized entries; Successfully reattested node; Synchronize failed
#   agent two: Agent needs to re-attest; will attempt to re-attest; Failed to fetch authorized entries; Successfully reattested node; Synchronize failed
#   server: Agent SVID is not active; Agent attestation request completed; Failed to authenticate caller
#   agents in the list: 1
source "$(dirname "$0")/lib.sh"
need openssl openssl
spire 1.13.3
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout node.key -out node.pem -subj /CN=node -days 2 -addext keyUsage=digitalSignature,keyCertSign 2>/dev/null
spire_conf spire "NodeAttestor \"x509pop\" { plugin_data { ca_bundle_path = \"$work/node.pem\" } }"
sed -i 's/"WARN"/"INFO"/' spire.conf
background spire.log spire-server run -config spire.conf
until_true 60 spire-server healthcheck -socketPath "$work/spire.sock"
api spire bundle show >bundle.pem
entry() { # ID
	api spire entry create -entryID "$1" -spiffeID "spiffe://example.org/$1" -selector "unix:uid:$(id -u)" \
		-parentID "$(api spire agent list -output json | json '"spiffe://example.org" + doc["agents"][0]["id"]["path"]')" >/dev/null
}
has() { # AGENT ID
	spire-agent api fetch x509 -socketPath "$work/$1.sock" 2>/dev/null | grep "example.org/$2\$" >/dev/null
}
answer() { if has "$1" "$2"; then echo "has it"; else echo "has not"; fi; }
agent() { # NAME
	cat >"$1.conf" <<CONF
agent {
	trust_domain = "example.org"
	server_address = "127.0.0.1"
	server_port = "$(cat spire.port)"
	data_dir = "$work/$1"
	socket_path = "$work/$1.sock"
	trust_bundle_path = "$work/bundle.pem"
}
plugins {
	KeyManager "memory" { plugin_data {} }
	NodeAttestor "x509pop" { plugin_data { private_key_path = "$work/node.key" certificate_path = "$work/node.pem" } }
	WorkloadAttestor "unix" { plugin_data {} }
}
CONF
	background "$1.log" spire-agent run -config "$1.conf"
}
agent one
until_true 60 grep -q 'Starting Workload' one.log
entry before
until_true 60 has one before
sleep 2 # between two syncs of the first agent, which come every five seconds
agent two
until_true 60 has two before
# messages LOG prints the messages about attestation, without what is logged at a start.
messages() { sed -n 's/.*msg="\([^"]*\)".*/\1/p' "$1" | grep -v '^SVID is not found\|^Node attestation was' | grep -i 'attest\|authorized\|authenticate\|sync\|active\|duplicate\|twice\|another' | sort -u | paste -sd ';' | sed 's/;\([^ ]\)/; \1/g'; }
denied() { [ "$(grep -c 'Successfully reattested' one.log)" -ge 2 ] && [ "$(grep -c 'Successfully reattested' two.log)" -ge 2 ]; }
until_true 60 denied
echo "entry created before: agent one $(answer one before), agent two $(answer two before)" >seen
entry after
sleep 12 # two syncs of each
{
	echo "entry created after: agent one $(answer one after), agent two $(answer two after)"
	echo "agent one: $(messages one.log)"
	echo "agent two: $(messages two.log)"
	echo "server: $(messages spire.log)"
	echo "agents in the list: $(api spire agent list -output json | json 'len(doc["agents"])')"
} >>seen
expect <<'SEEN'
entry created before: agent one has it, agent two has it
entry created after: agent one has not, agent two has not
agent one: Agent needs to re-attest; will attempt to re-attest; Failed to fetch authorized entries; Successfully reattested node; Synchronize failed
agent two: Agent needs to re-attest; will attempt to re-attest; Failed to fetch authorized entries; Successfully reattested node; Synchronize failed
server: Agent SVID is not active; Agent attestation request completed; Failed to authenticate caller
agents in the list: 1
SEEN
