#!/usr/bin/env bash
# go-spiffe rejects a whole bundle for one key of an unknown type, but not for an unknown use.
#
# Seen with   go-spiffe v2.9.0 with go-jose v4.1.5
# Behaviour   spiffebundle.Parse ignores a key with an unknown "use" in a SPIFFE bundle document.
#             For a key with an unknown "kty", or on an unknown curve, it rejects the document.
# Operators   The specification requires to ignore only that key (SPIFFE Trust Domain and Bundle,
#             4.2.1 and 4.2.2). As soon as a trust domain adds a post-quantum key
#             ("kty":"AKP"), relying parties stop to refresh its bundle, and miss every later
#             revocation.
# renewd      ignores a key that it cannot use and applies the others, with a log line and a
#             metric (tests of the bundle parser).
#
# Output seen
#   a key with use wit-svid: 1 JWT key
#   a key with kty AKP: refused: spiffebundle: unable to parse JWKS: go-jose/go-jose: unsupported key type/format
#   a key with crv secp256k1: refused: spiffebundle: unable to parse JWKS: go-jose/go-jose: unsupported elliptic curve 'secp256k1'
source "$(dirname "$0")/lib.sh"
go_module github.com/spiffe/go-spiffe/v2@v2.9.0 github.com/go-jose/go-jose/v4@v4.1.5
cat >main.go <<'GO'
package main

import (
	"fmt"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// The point is that of RFC 7515, appendix A.3.
const point = `"x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"`

func main() {
	for _, c := range []struct{ what, key string }{
		{"use wit-svid", `{"kty":"EC","use":"wit-svid","kid":"b","crv":"P-256",` + point + `}`},
		{"kty AKP", `{"kty":"AKP","use":"jwt-svid","kid":"b","alg":"ML-DSA-44","pub":"AAAA"}`},
		{"crv secp256k1", `{"kty":"EC","use":"jwt-svid","kid":"b","crv":"secp256k1",` + point + `}`},
	} {
		doc := `{"keys":[{"kty":"EC","use":"jwt-svid","kid":"a","crv":"P-256",` + point + `},` + c.key + `]}`
		b, err := spiffebundle.Parse(spiffeid.RequireTrustDomainFromString("example.org"), []byte(doc))
		if err != nil {
			fmt.Printf("a key with %s: refused: %v\n", c.what, err)
			continue
		}
		fmt.Printf("a key with %s: %d JWT key\n", c.what, len(b.JWTAuthorities()))
	}
}
GO
go run . >seen
expect <<'SEEN'
a key with use wit-svid: 1 JWT key
a key with kty AKP: refused: spiffebundle: unable to parse JWKS: go-jose/go-jose: unsupported key type/format
a key with crv secp256k1: refused: spiffebundle: unable to parse JWKS: go-jose/go-jose: unsupported elliptic curve 'secp256k1'
SEEN
