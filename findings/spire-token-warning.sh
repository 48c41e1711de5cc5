#!/usr/bin/env bash
# "spire-server token generate" prints a warning on standard output, with the token.
#
# Seen with   SPIRE 1.13.3
# Behaviour   Without "-spiffeID" the command prints "Warning: Missing SPIFFE ID." after the token.
#             The warning is on standard output, and "-output json" leaves it out.
# Operators   "token generate | awk '{print $2}'", a usual way to get the token, returns two words.
#             A quoted variable then holds both lines, and the server does not know such a
#             token. Use "-output json", or take the line that starts with "Token:".
# renewd      "server token create" prints nothing but the token on standard output (cmd/server).
#
# Output seen
#   awk with -spiffeID: 1 line
#   awk without: 2 lines, the second is "Missing"
#   standard error without: 0 bytes
#   -output json without: ['expires_at', 'value']
source "$(dirname "$0")/lib.sh"
spire 1.13.3
spire_server spire
{
	token=$(api spire token generate -spiffeID spiffe://example.org/node | awk '{print $2}')
	echo "awk with -spiffeID: $(wc -l <<<"$token") line"
	token=$(api spire token generate 2>err | awk '{print $2}')
	echo "awk without: $(wc -l <<<"$token") lines, the second is \"$(tail -n 1 <<<"$token")\""
	echo "standard error without: $(wc -c <err) bytes"
	echo "-output json without: $(api spire token generate -output json | json 'sorted(doc)')"
} >seen
expect <<'SEEN'
awk with -spiffeID: 1 line
awk without: 2 lines, the second is "Missing"
standard error without: 0 bytes
-output json without: ['expires_at', 'value']
SEEN
