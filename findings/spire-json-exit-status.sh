#!/usr/bin/env bash
# With "-output json", spire-server exits with 0 although the command has failed.
#
# Seen with   SPIRE 1.13.3
# Behaviour   "entry create", "entry update", "entry delete" and "bundle delete" exit with 1 if the
#             server refuses the change. With "-output json" they exit with 0 and print
#             nothing on standard error; only the field "code" in the output differs from 0.
#             "agent evict" exits with 1 in both cases.
# Operators   A script with "set -e" that prints JSON for its log continues after a failed change,
#             such as an entry that has not been created. Check that each result's status has
#             the code 0.
# renewd      "server entries apply -o json" exits with 1 if a change fails (cmd/server).
#
# Output seen
#   entry create: exit status 1, with -output json 0 and the code 6
#   entry update: exit status 1, with -output json 0 and the code 5
#   entry delete: exit status 1, with -output json 0 and the code 5
#   bundle delete: exit status 1, with -output json 0 and the code 5
#   agent evict: exit status 1, with -output json 1 and no output
source "$(dirname "$0")/lib.sh"
spire 1.13.3
spire_server spire
entry="-parentID spiffe://example.org/node -spiffeID spiffe://example.org/web -selector unix:uid:1000"
api spire entry create $entry >/dev/null
try() {
	local plain=0 with_json=0 code="no output"
	api spire "$@" >/dev/null 2>&1 || plain=$?
	api spire "$@" -output json >out.json 2>/dev/null || with_json=$?
	if [ -s out.json ]; then code="the code $(json 'doc["results"][0]["status"]["code"]' <out.json)"; fi
	echo "$1 $2: exit status $plain, with -output json $with_json and $code" >>seen
}
try entry create $entry # exists
try entry update -entryID missing $entry
try entry delete -entryID missing
try bundle delete -id spiffe://missing.example
try agent evict -spiffeID spiffe://example.org/spire/agent/join_token/missing
expect <<'SEEN'
entry create: exit status 1, with -output json 0 and the code 6
entry update: exit status 1, with -output json 0 and the code 5
entry delete: exit status 1, with -output json 0 and the code 5
bundle delete: exit status 1, with -output json 0 and the code 5
agent evict: exit status 1, with -output json 1 and no output
SEEN
