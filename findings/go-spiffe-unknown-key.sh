#!/usr/bin/env bash
# One key of an unknown type makes go-spiffe refuse a whole bundle; one with an unknown use does not.
#
# Seen with   go-spiffe v2.9.0 with go-jose v4.1.5
# Behaviour   In a SPIFFE bundle document spiffebundle.Parse leaves out a key with an unknown
#             "use". A key with an unknown "kty", or on an unknown curve, refuses the document.
# Operators   The specification asks to ignore either key alone (SPIFFE Trust Domain and Bundle,
#             4.2.1 and 4.2.2). The first partner that publishes a post-quantum key
#             ("kty":"AKP") beside its others ends the refresh of its whole bundle at every
#             relying party, and with it the news of each later revocation.
# renewd      leaves out the one key that it cannot use and follows the rest, with one log
#             line and a metric (tests of the bundle parser).
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
