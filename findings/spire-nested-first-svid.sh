#!/usr/bin/env bash
# Whether a nested SPIRE server starts is a matter of the random IDs of entries.
#
# Seen with   SPIRE 1.13.3
# Behaviour   The plugin UpstreamAuthority "spire" asks the root server with the first SVID of its
#             Workload API. spire-agent orders them by entry ID, which is random unless given.
#             When another entry matches the nested server's process and comes first, the root
#             refuses, and the nested server does not start; the hint is not looked at.
# Operators   A new entry with a wide selector on the node of a nested server ends that server at
#             its next start, or its next CA rotation. Give the downstream entry a selector of
#             its own, and "-entryID" something that sorts first.
# renewd      also gives entries in the order of their IDs, so it is the same under its agents
#             (spire-nested.txtar in test/system names its IDs for that reason).
#
# Output seen
#   entries 1-nested, 2-web: the nested server starts
#   entries 2-nested, 1-web: PermissionDenied desc = authorization denied for method /spire.api.server.svid.v1.SVID/NewDownstreamX509CA
source "$(dirname "$0")/lib.sh"
spire 1.13.3
spire_server root
entries() {
	api root entry create -entryID "$1" -parentID spiffe://example.org/node -spiffeID spiffe://example.org/nested -selector unix:uid:"$(id -u)" -downstream
	api root entry create -entryID "$2" -parentID spiffe://example.org/node -spiffeID spiffe://example.org/web -selector unix:uid:"$(id -u)"
} >/dev/null
# synced ID: the first SVID that the agent gives is that of the entry for spiffe://example.org/ID.
synced() { spire-agent api fetch x509 -socketPath "$work/agent.sock" | grep -m 1 SPIFFE | grep -q "/$1\$"; }
entries 1-nested 2-web
spire_agent root
until_true 60 synced nested
spire_server first "$(nested_under root)"
echo "entries 1-nested, 2-web: the nested server starts" >seen

api root entry delete -entryID 1-nested >/dev/null
api root entry delete -entryID 2-web >/dev/null
entries 2-nested 1-web
until_true 60 synced web
spire_conf second "$(nested_under root)"
timeout 60 spire-server run -config second.conf >second.log 2>&1 || true
echo "entries 2-nested, 1-web: $(grep -m 1 -o 'PermissionDenied desc = [^"]*' second.log)" >>seen
expect <<'SEEN'
entries 1-nested, 2-web: the nested server starts
entries 2-nested, 1-web: PermissionDenied desc = authorization denied for method /spire.api.server.svid.v1.SVID/NewDownstreamX509CA
SEEN
