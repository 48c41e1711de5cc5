#!/usr/bin/env bash
# "bundle delete -mode dissociate" changes entries without a new revision number.
#
# Seen with   SPIRE 1.13.3 and 1.16.0-dev (commit ef8527ec)
# Behaviour   Deleting the bundle of a federated trust domain in this mode removes the domain from
#             federates_with of each entry. The revision number of these entries does not change.
# Operators   A caller of SyncAuthorizedEntries detects changes by revision number if there is more
#             than a page of entries, so it keeps the old federation. If the bundle is set
#             again, such an agent trusts the domain for entries that no longer federate with
#             it. Update the entries as well, or restart the agents.
# renewd      compares federates_with whenever the server sends it, whatever the revision
#             (spire-bundle-set.txtar in test/system). A server that lists revisions in
#             pages does not send it.
#
# Output seen
#   before: revision 0, federates with ['partner.example']
#   after:  revision 0, federates with []
source "$(dirname "$0")/lib.sh"
spire 1.13.3
spire_server spire
api spire bundle show >bundle.pem
api spire bundle set -id spiffe://partner.example -path bundle.pem >/dev/null
api spire entry create -entryID web -parentID spiffe://example.org/node -spiffeID spiffe://example.org/web \
	-selector unix:uid:1000 -federatesWith spiffe://partner.example >/dev/null
show() {
	api spire entry show -entryID web -output json |
		json '"revision %s, federates with %s" % (doc["entries"][0]["revision_number"], doc["entries"][0]["federates_with"])'
}
echo "before: $(show)" >seen
api spire bundle delete -id spiffe://partner.example -mode dissociate >/dev/null
echo "after:  $(show)" >>seen
expect <<'SEEN'
before: revision 0, federates with ['partner.example']
after:  revision 0, federates with []
SEEN
