#!/usr/bin/env bash
# A nested SPIRE server sends its agents one JWT key twice, once tainted and once not.
#
# Seen with   SPIRE 1.13.3
# Behaviour   When the root server taints a JWT key, the nested server adds the tainted key to its
#             bundle beside the same key without a taint, and sends both to its agents.
#             "bundle show -format spiffe" prints the key once.
# Operators   A program that reads the bundle from the Server API and expects unique key IDs may
#             reject the bundle, or use the state of the last copy.
# renewd      merges equal copies into one key, tainted if any copy is (TestNestedSPIRE in
#             test/system, tests of the bundle parser).
#
# Output seen
#   root: tainted
#   nested: not tainted, tainted
source "$(dirname "$0")/lib.sh"
spire 1.13.3
spire_server root
api root entry create -parentID spiffe://example.org/node -spiffeID spiffe://example.org/nested -selector unix:uid:"$(id -u)" -downstream >/dev/null
spire_agent root
spire_server nested "$(nested_under root)"
jwt() { api root localauthority jwt "$@" -output json; }
old=$(jwt show | json 'doc["active"]["authority_id"]')
new=$(jwt prepare | json 'doc["prepared_authority"]["authority_id"]')
jwt activate -authorityID "$new" >/dev/null
jwt taint -authorityID "$old" >/dev/null
# copies NAME prints the copies of the tainted key that a server has.
copies() {
	api "$1" bundle show -output json |
		json '", ".join("tainted" if k["tainted"] else "not tainted" for k in doc["jwt_authorities"] if k["key_id"] == "'"$old"'")'
}
followed() { [ "$(copies nested)" != "not tainted" ]; }
until_true 60 followed
{
	echo "root: $(copies root)"
	echo "nested: $(copies nested)"
} >seen
expect <<'SEEN'
root: tainted
nested: not tainted, tainted
SEEN
