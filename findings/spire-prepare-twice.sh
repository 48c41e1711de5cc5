#!/usr/bin/env bash
# After two "localauthority x509 prepare" SPIRE publishes an authority that no command can change.
#
# Seen with   SPIRE 1.13.3
# Behaviour   A second prepare puts a new authority into the slot of the first. The first one stays
#             in the trust bundle. "show" does not list it; "taint" and "revoke" reject its ID.
# Operators   If you repeat a prepare that seemed to fail, a trusted key may remain until it
#             expires. Run "localauthority x509 show" before each prepare.
# renewd      keysetctl does not prepare while another authority is prepared, and recognizes
#             authorities that only the bundle has (internal/operator/spire, TestRotationOfSPIRE).
#
# Output seen, with the two IDs replaced
#   authorities in the bundle: 3
#   prepared: SECOND
#   old: None
#   Error: could not taint X.509 authority: rpc error: code = InvalidArgument desc = unexpected authority ID
#   Error: could not revoke X.509 authority: rpc error: code = InvalidArgument desc = invalid authority ID: only Old local authority can be revoked
source "$(dirname "$0")/lib.sh"
spire 1.13.3
spire_server spire
x509() { api spire localauthority x509 "$@" -output json; }
first=$(x509 prepare | json 'doc["prepared_authority"]["authority_id"]')
second=$(x509 prepare | json 'doc["prepared_authority"]["authority_id"]')
{
	echo "authorities in the bundle: $(api spire bundle show -format spiffe | grep -c x5c)"
	x509 show | json '"prepared: " + doc["prepared"]["authority_id"]'
	x509 show | json '"old: " + str(doc.get("old"))'
	x509 taint -authorityID "$first" 2>&1 || true
	x509 revoke -authorityID "$first" 2>&1 || true
} | sed "s/$first/FIRST/; s/$second/SECOND/" >seen
expect <<'SEEN'
authorities in the bundle: 3
prepared: SECOND
old: None
Error: could not taint X.509 authority: rpc error: code = InvalidArgument desc = unexpected authority ID
Error: could not revoke X.509 authority: rpc error: code = InvalidArgument desc = invalid authority ID: only Old local authority can be revoked
SEEN
