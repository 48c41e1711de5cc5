#!/usr/bin/env bash
# spire-agent returns one token with a jti to several callers.
#
# Seen with   SPIRE 1.15.3, and 1.16.0-dev (commit ef8527ec)
# Behaviour   An entry with jwt_svid_include_jti should get a new JWT-SVID for each request, as
#             "entry create -help" says: "-jwtSVIDIncludeJTI ... bypasses the agent JWT-SVID
#             cache". The server adds the claim. The agent loses the attribute when it reads the
#             entry, so it caches the token and returns it until half of its life is over.
# Operators   A relying party with replay protection rejects a jti that it has seen, and so all but
#             the first request that a node makes with its token. "spire-server jwt mint" and the
#             first token for an audience do not show the problem.
# renewd      agents do not cache or share such a token (spire-attribute-jti.txtar in
#             test/system), and the file of entries has the attribute.
#
# Output seen
#   the server keeps jwt_svid_include_jti: True
#   5 calls: 1 token, 1 jti
source "$(dirname "$0")/lib.sh"
spire 1.15.3
spire_server spire
api spire entry create -entryID web -parentID spiffe://example.org/node -spiffeID spiffe://example.org/web \
	-selector unix:uid:"$(id -u)" -jwtSVIDIncludeJTI >/dev/null
spire_agent spire
echo "the server keeps jwt_svid_include_jti: $(api spire entry show -entryID web -output json |
	json 'doc["entries"][0]["additional_attributes"]["jwt_svid_include_jti"]')" >seen
for _ in 1 2 3 4 5; do
	spire-agent api fetch jwt -audience api -socketPath "$work/agent.sock" -output json |
		json 'next(a["svids"][0]["svid"] for a in doc if "svids" in a)'
done >tokens
# Parts in base64url without padding.
python3 - >>seen <<'COUNT'
import base64, json
tokens = set(open("tokens").read().split())
claims = [json.loads(base64.urlsafe_b64decode(t.split(".")[1] + "==")) for t in tokens]
print("5 calls: %d token, %d jti" % (len(tokens), len({c["jti"] for c in claims})))
COUNT
expect <<'SEEN'
the server keeps jwt_svid_include_jti: True
5 calls: 1 token, 1 jti
SEEN
