#!/usr/bin/env bash
# SPIRE polls a bundle endpoint four times per refresh hint, and each time reports a refreshed bundle.
#
# Seen with   SPIRE 1.13.3 and 1.16.0-dev (commit ef8527ec)
# Behaviour   A server that federates with another trust domain polls its bundle endpoint after a
#             quarter of the refresh hint. A hint below a minute counts as a minute. After each
#             poll the server logs "Bundle refreshed", though the bundle is the same.
# Operators   An endpoint gets four times the load that its refresh_hint suggests. The log line does
#             not say that a partner has changed its keys: compare the bundles.
# renewd      polls at these times, too, but tells a changed bundle from an unchanged one
#             (internal/server/federation, TestInterval).
#
# Output seen
#   hint 10s: next poll after 15 s
#   hint 1m: next poll after 15 s
#   hint 1h: next poll after 900 s
#   polls of 10s.example: 3, refreshed: 3
source "$(dirname "$0")/lib.sh"
spire 1.13.3
need python3 python3
spire_conf spire
sed -i 's/"WARN"/"DEBUG"/' spire.conf
background spire.log spire-server run -config spire.conf
until_true 60 api spire healthcheck
for hint in 10s 1m 1h; do
	spire_conf $hint
	port=$(free_port)
	endpoint="bundle_endpoint { address = \"127.0.0.1\" port = $port refresh_hint = \"$hint\" profile \"https_spiffe\" {} }"
	sed -i "s/example.org/$hint.example/; s/log_level.*/&\n\tfederation { $endpoint }/" $hint.conf
	background $hint.log spire-server run -config $hint.conf
	until_true 60 api $hint healthcheck
	api $hint bundle show -format spiffe >bundle.json
	api spire federation create -bundleEndpointProfile https_spiffe -bundleEndpointURL "https://127.0.0.1:$port" \
		-trustDomain $hint.example -endpointSpiffeID spiffe://$hint.example/spire/server \
		-trustDomainBundleFormat spiffe -trustDomainBundlePath bundle.json >/dev/null
done
cat >read.py <<'PY'
import re
from datetime import datetime

next_polls, polls, refreshed = {}, 0, 0
for line in open("spire.log"):
    scheduled = re.match(r'time="(.*)Z" level=debug msg="Scheduling next bundle refresh" at="(.*)Z" .*trust_domain=(\w+)', line)
    if scheduled:
        start, end = map(datetime.fromisoformat, scheduled.groups()[:2])
        next_polls.setdefault(scheduled[3], (end - start).seconds)
    if "trust_domain=10s.example" in line:
        polls += scheduled is not None
        refreshed += "Bundle refreshed" in line
for hint, seconds in next_polls.items():
    print(f"hint {hint}: next poll after {seconds} s")
print(f"polls of 10s.example: {polls}, refreshed: {refreshed}")
PY
until_true 60 eval 'python3 read.py | grep "polls of 10s.example: 3,"'
python3 read.py >seen
expect <<'SEEN'
hint 10s: next poll after 15 s
hint 1m: next poll after 15 s
hint 1h: next poll after 900 s
polls of 10s.example: 3, refreshed: 3
SEEN
