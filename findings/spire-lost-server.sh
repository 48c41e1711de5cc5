#!/usr/bin/env bash
# No command removes the authorities of a SPIRE server that has left its cluster.
#
# Seen with   SPIRE 1.13.3 and 1.16.0-dev (commit ef8527ec)
# Behaviour   The servers of a cluster share a database and a trust bundle, but each has keys of its
#             own, and "localauthority show" has those of one server only. If a server is gone,
#             its authorities stay in the bundle. The other servers refuse to taint or revoke
#             them, and to set the bundle.
# Operators   The keys of a lost server stay trusted until they expire (ca_ttl). If a key has
#             leaked, rotate at the server that has it, before you stop that server.
# renewd      keysetctl takes all servers of a cluster, and shows what the bundle has of no given
#             server (internal/operator/spire, TestReplacedServer).
#
# Output seen
#   authorities in the bundle: 2 for X.509, 2 for JWT
#   authorities that the first server shows: 1 for X.509, 1 for JWT
#   Error: could not taint X.509 authority: rpc error: code = InvalidArgument desc = unexpected authority ID
#   Error: could not revoke X.509 authority: rpc error: code = InvalidArgument desc = invalid authority ID: only Old local authority can be revoked
#   Error: could not taint JWT authority: rpc error: code = InvalidArgument desc = unexpected authority ID
#   Error: could not revoke JWT authority: rpc error: code = Internal desc = failed to revoke JWT authority: it is not possible to revoke an untainted key
#   Error: failed to set federated bundle: setting a federated bundle for the server's own trust domain is not allowed
#   authorities in the bundle: 2 for X.509, 2 for JWT
source "$(dirname "$0")/lib.sh"
spire 1.13.3
spire_server first
spire_conf second
sed -i "s|$work/second.sqlite3|$work/first.sqlite3|" second.conf
background second.log spire-server run -config second.conf
until_true 60 api second healthcheck
active() { api second localauthority "$1" show -output json | json 'doc["active"]["authority_id"]'; }
x509=$(active x509)
jwt=$(active jwt)
second=$(tail -n 1 pids)
kill "$second"
wait "$second"
sed -i '$d' pids
sleep 2 # The first server caches the bundle for a second.
published() {
	api first bundle show -format spiffe |
		json '"authorities in the bundle: %d for X.509, %d for JWT" % tuple(sum(k["use"] == use for k in doc["keys"]) for use in ("x509-svid", "jwt-svid"))'
}
shown() { api first localauthority "$1" show | grep -c 'Authority ID: '; }
{
	published
	echo "authorities that the first server shows: $(shown x509) for X.509, $(shown jwt) for JWT"
	for command in taint revoke; do
		api first localauthority x509 $command -authorityID "$x509" || true
	done
	for command in taint revoke; do
		api first localauthority jwt $command -authorityID "$jwt" || true
	done
	api first bundle show >bundle.pem
	api first bundle set -id spiffe://example.org -path bundle.pem || true
	sleep 2
	published
} >seen 2>&1
expect <<'SEEN'
authorities in the bundle: 2 for X.509, 2 for JWT
authorities that the first server shows: 1 for X.509, 1 for JWT
Error: could not taint X.509 authority: rpc error: code = InvalidArgument desc = unexpected authority ID
Error: could not revoke X.509 authority: rpc error: code = InvalidArgument desc = invalid authority ID: only Old local authority can be revoked
Error: could not taint JWT authority: rpc error: code = InvalidArgument desc = unexpected authority ID
Error: could not revoke JWT authority: rpc error: code = Internal desc = failed to revoke JWT authority: it is not possible to revoke an untainted key
Error: failed to set federated bundle: setting a federated bundle for the server's own trust domain is not allowed
authorities in the bundle: 2 for X.509, 2 for JWT
SEEN
