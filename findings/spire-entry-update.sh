#!/usr/bin/env bash
# "spire-server entry update" resets every field that is not given again.
#
# Seen with   SPIRE 1.13.3
# Behaviour   "entry update" requires the entry's ID, parent, SPIFFE ID and selectors, and replaces
#             all other fields as well: federation, DNS names, TTL, hint, and the downstream and
#             storeSVID marks are reset unless they are given. Its output does not mention that.
# Operators   If you add a selector to an entry, its workloads lose federated bundles and the DNS
#             names in the next certificate, and peers that verify by name reject them. Give
#             every flag again, and compare "entry show" before and after.
# renewd      "server entries apply" takes whole entries and shows every changed field before the
#             change (cmd/server). An agent applies such an update at the next sync.
#
# Output seen
#   before: {'federates_with': ['partner.example'], 'dns_names': ['web.example.org'], 'x509_svid_ttl': 600, 'hint': 'front', 'downstream': True}
#   after:  {'federates_with': [], 'dns_names': [], 'x509_svid_ttl': 0, 'hint': '', 'downstream': False}
source "$(dirname "$0")/lib.sh"
spire 1.13.3
spire_server spire
api spire bundle show >bundle.pem
api spire bundle set -id spiffe://partner.example -path bundle.pem >/dev/null
show() {
	api spire entry show -entryID web -output json |
		json '{k: doc["entries"][0][k] for k in ("federates_with", "dns_names", "x509_svid_ttl", "hint", "downstream")}'
}
same="-entryID web -parentID spiffe://example.org/node -spiffeID spiffe://example.org/web -selector unix:uid:1000"
api spire entry create $same -federatesWith spiffe://partner.example -dns web.example.org -x509SVIDTTL 600 -hint front -downstream >/dev/null
echo "before: $(show)" >seen
api spire entry update $same -selector unix:gid:1000 >/dev/null
echo "after:  $(show)" >>seen
expect <<'SEEN'
before: {'federates_with': ['partner.example'], 'dns_names': ['web.example.org'], 'x509_svid_ttl': 600, 'hint': 'front', 'downstream': True}
after:  {'federates_with': [], 'dns_names': [], 'x509_svid_ttl': 0, 'hint': '', 'downstream': False}
SEEN
