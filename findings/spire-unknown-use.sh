#!/usr/bin/env bash
# SPIRE rejects a document at a bundle endpoint that "spire-server bundle set" accepts.
#
# Seen with   SPIRE 1.13.3
# Behaviour   A SPIRE server that refreshes from a bundle endpoint rejects a whole document for one
#             key with an unknown "use". "bundle set -format spiffe" ignores that key of the
#             same document and applies the others.
# Operators   The specification requires to ignore the key (SPIFFE Trust Domain and Bundle, 4.2.2).
#             When a trust domain begins to publish keys for WIT-SVIDs, which are part of the
#             Workload API, SPIRE servers of this version stop to refresh its bundle. Apply its
#             other keys with "bundle set" until the server is upgraded.
# renewd      ignores the key, at endpoints and in files (internal/server/federation).
#
# Output seen
#   endpoint, two JWT keys: 2 keys
#   bundle set, two JWT keys and one for wit-svid: 2 keys
#   endpoint, the same document: unrecognized use "wit-svid" for key entry 2
source "$(dirname "$0")/lib.sh"
need openssl openssl
spire 1.13.3
point='"x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"'
key() { echo "{\"kty\":\"EC\",\"use\":\"$1\",\"kid\":\"$2\",\"crv\":\"P-256\",$point}"; }
mkdir site
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=DNS:localhost \
	-keyout tls.key -out tls.pem 2>/dev/null
cat >serve.py <<'PY'
import http.server, os, ssl

context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("tls.pem", "tls.key")
os.chdir("site")
server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
server.socket = context.wrap_socket(server.socket, server_side=True)
print(server.server_address[1], flush=True)
server.serve_forever()
PY
background endpoint.port python3 serve.py
until_true 10 test -s endpoint.port
export SSL_CERT_FILE=$work/tls.pem
spire_server spire
api spire federation create -trustDomain partner.example -bundleEndpointURL "https://localhost:$(head -n 1 endpoint.port)/bundle" -bundleEndpointProfile https_web >/dev/null
keys() { api spire bundle list -id spiffe://partner.example -format spiffe 2>/dev/null | grep -c kid || true; }
two="$(key jwt-svid a),$(key jwt-svid b)"
echo "{\"spiffe_sequence\":1,\"keys\":[$two]}" >site/bundle
api spire federation refresh -id spiffe://partner.example >/dev/null
echo "endpoint, two JWT keys: $(keys) keys" >seen
echo "{\"spiffe_sequence\":2,\"keys\":[$two,$(key wit-svid c)]}" >site/bundle
api spire bundle set -id spiffe://partner.example -format spiffe -path site/bundle >/dev/null
echo "bundle set, two JWT keys and one for wit-svid: $(keys) keys" >>seen
refused=$(api spire federation refresh -id spiffe://partner.example 2>&1 || true)
echo "endpoint, the same document: $(grep -o 'unrecognized use.*' <<<"$refused")" >>seen
expect <<'SEEN'
endpoint, two JWT keys: 2 keys
bundle set, two JWT keys and one for wit-svid: 2 keys
endpoint, the same document: unrecognized use "wit-svid" for key entry 2
SEEN
