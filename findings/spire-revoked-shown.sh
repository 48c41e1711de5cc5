#!/usr/bin/env bash
# SPIRE shows an authority that has been revoked as the old one, until it restarts.
#
# Seen with   SPIRE 1.13.3 and 1.16.0-dev (commit ef8527ec)
# Behaviour   After "localauthority x509 revoke" the trust bundle no longer has the authority. But
#             "show" has it as old, with its expiry, as before. Another taint or revoke passes the
#             check that it is the old one, and fails with an internal error. After a
#             restart there is no old authority.
# Operators   "show" does not tell whether a revocation has succeeded, nor whether an authority is
#             tainted. Look for it in the bundle. An internal error of a repeated revoke means
#             that nothing is left to do.
# renewd      keysetctl reads the bundle, too, and takes an old authority that is not in it for
#             removed (internal/operator/spire, TestRotationOfSPIRE).
#
# Output seen
#   activated: old yes, authorities in the bundle 2
#   tainted: old yes, authorities in the bundle 2
#   revoked: old yes, authorities in the bundle 1
#   Error: could not taint X.509 authority: rpc error: code = Internal desc = failed to taint X.509 authority: no ca found with provided subject key ID
#   Error: could not revoke X.509 authority: rpc error: code = Internal desc = failed to revoke X.509 authority: no root CA found with provided subject key ID
#   restarted: old no, authorities in the bundle 1
source "$(dirname "$0")/lib.sh"
spire 1.13.3
spire_conf spire
# This server keeps its keys when it restarts.
sed -i "s|\"memory\" { plugin_data {} }|\"disk\" { plugin_data { keys_path = \"$work/keys.json\" } }|" spire.conf
start() {
	background spire.log spire-server run -config spire.conf
	until_true 60 api spire healthcheck
}
x509() { api spire localauthority x509 "$@"; }
state() {
	sleep 2 # The server caches the bundle for a second.
	echo "$1: $(x509 show -output json | json "'old ' + ('yes' if doc.get('old', {}).get('authority_id') == '$old' else 'no')")," \
		"authorities in the bundle $(api spire bundle show -format spiffe | grep -c x5c)"
}
start
old=$(x509 show -output json | json 'doc["active"]["authority_id"]')
x509 activate -authorityID "$(x509 prepare -output json | json 'doc["prepared_authority"]["authority_id"]')" >/dev/null
{
	state activated
	x509 taint -authorityID "$old" >/dev/null
	state tainted
	x509 revoke -authorityID "$old" >/dev/null
	state revoked
	x509 taint -authorityID "$old" || true
	x509 revoke -authorityID "$old" || true
} >seen 2>&1
server=$(cat pids)
kill "$server"
wait "$server"
rm pids
start
state restarted >>seen
expect <<'SEEN'
activated: old yes, authorities in the bundle 2
tainted: old yes, authorities in the bundle 2
revoked: old yes, authorities in the bundle 1
Error: could not taint X.509 authority: rpc error: code = Internal desc = failed to taint X.509 authority: no ca found with provided subject key ID
Error: could not revoke X.509 authority: rpc error: code = Internal desc = failed to revoke X.509 authority: no root CA found with provided subject key ID
restarted: old no, authorities in the bundle 1
SEEN
