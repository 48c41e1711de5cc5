#!/usr/bin/env bash
# "bundle delete -mode dissociate" changes entries without a new revision number.
#
# Seen with   SPIRE 1.13.3 and 1.16.0-dev (commit ef8527ec)
# Behaviour   Deleting the bundle of another trust domain in this mode takes the domain out of the
#             federates_with of each entry. The revision number of these entries stays.
# Operators   Who follows entries by revision number, as SyncAuthorizedEntries asks its callers to
#             do when there are more than a page of them, goes on with the old federation; when
#             the bundle is set again, such an agent trusts the domain for entries that do not
#             federate with it any more. Update the entries as well, or restart the agents.
# renewd      compares what entries federate with wherever the server sends it, whatever their
#             revision is (spire-bundle-set.txtar in test/system). A server that lists
#             revisions in pages does not send it.
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
