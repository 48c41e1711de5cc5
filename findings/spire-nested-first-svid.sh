#!/usr/bin/env bash
# The random IDs of entries decide whether a nested SPIRE server starts.
#
# Seen with   SPIRE 1.13.3
# Behaviour   The plugin UpstreamAuthority "spire" uses the first SVID of its Workload API for the
#             root server. spire-agent sorts SVIDs by entry ID, which is random unless given. If
#             another entry matches the nested server's process and sorts first, the root server
#             rejects the call, and the nested server does not start. The hint is ignored.
# Operators   A new entry with broad selectors on the node of a nested server stops that server at
#             its next start or CA rotation. Give the downstream entry a unique selector, and an
#             "-entryID" that sorts first.
# renewd      also sorts entries by ID, so its agents behave the same way (spire-nested.txtar in
#             test/system sets IDs for that reason).
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
# synced ID succeeds if the agent's first SVID is spiffe://example.org/ID.
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
