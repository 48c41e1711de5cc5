#!/usr/bin/env bash
# Each "token generate -spiffeID" leaves an entry that neither the token's end nor an eviction removes.
#
# Seen with   SPIRE 1.13.3
# Behaviour   With -spiffeID the command creates an entry whose parent is the agent that the token will
#             attest, and does not mention it. The entry has no expiry, also if the token has a TTL of
#             a second and is never used. "agent evict" leaves it, too.
# Operators   A fleet that joins by tokens gains an entry with each attempt to join, and every server keeps
#             all of them in memory. "entry count" counts them. Delete those whose parent is not in
#             "agent list": the parent contains the token.
# renewd      "server token create" creates no entry. Under a SPIRE server delete the entry with the agent
#             (docs/spire.md).
#
# Output seen
#   entries before: 1
#   a token that is not used, and one of an agent: 3
#   the first has ended, the agent is evicted: 0 agents, 3 entries
#   expires_at of the two: ['0', '0']
source "$(dirname "$0")/lib.sh"
spire 1.13.3
spire_server spire
api spire entry create -parentID spiffe://example.org/node -spiffeID spiffe://example.org/web -selector "unix:uid:$(id -u)" >/dev/null
entries() { api spire entry count -output json | json 'doc["count"]'; }
agents() { api spire agent list -output json | json "$1"; }
echo "entries before: $(entries)" >seen
api spire token generate -spiffeID spiffe://example.org/node -ttl 1 >/dev/null
spire_agent spire
echo "a token that is not used, and one of an agent: $(entries)" >>seen
api spire agent evict -spiffeID "spiffe://example.org$(agents 'doc["agents"][0]["id"]["path"]')" >/dev/null
sleep 2 # the token's TTL
{
	echo "the first has ended, the agent is evicted: $(agents 'len(doc["agents"])') agents, $(entries) entries"
	echo "expires_at of the two: $(api spire entry show -spiffeID spiffe://example.org/node -output json | json '[e["expires_at"] for e in doc["entries"]]')"
} >>seen
expect <<'SEEN'
entries before: 1
a token that is not used, and one of an agent: 3
the first has ended, the agent is evicted: 0 agents, 3 entries
expires_at of the two: ['0', '0']
SEEN
