package workload

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
)

// tokenAlgorithms are those of the SPIFFE JWT-SVID specification, section 2.1.
var tokenAlgorithms = []jose.SignatureAlgorithm{
	jose.RS256, jose.RS384, jose.RS512, jose.ES256, jose.ES384, jose.ES512, jose.PS256, jose.PS384, jose.PS512,
}

// checkToken checks that a token, requested at asked, is a JWT-SVID for the entry
// and the audience, signed by a key of the bundle.
//
// It ignores the local clock. The server is authenticated and has just signed the
// token, so its iat is the current time, and verifiers have their own clocks.
// Rejecting the token here would cost the identity if this node's clock is a minute
// off, as go-spiffe's ParseAndValidate does.
func checkToken(token string, own *bundle.Bundle, e *cache.Entry, audience []string, asked time.Time) (cache.JWT, error) {
	t, err := jwt.ParseSigned(token, tokenAlgorithms)
	if err != nil {
		return cache.JWT{}, fmt.Errorf("parse: %w", err)
	}
	header := t.Headers[0] // the compact serialization has one
	if typ, ok := header.ExtraHeaders[jose.HeaderType]; ok && typ != "JWT" && typ != "JOSE" {
		return cache.JWT{}, fmt.Errorf("typ is %q instead of JWT or JOSE", typ)
	}
	key, ok := own.JWTKey(header.KeyID)
	if !ok {
		return cache.JWT{}, fmt.Errorf("key %q is not in the trust bundle", header.KeyID)
	}
	var claims jwt.Claims
	if err := t.Claims(key.PublicKey, &claims); err != nil {
		return cache.JWT{}, fmt.Errorf("verify with key %q: %w", header.KeyID, err)
	}
	if claims.Subject != e.SPIFFEID.String() {
		return cache.JWT{}, fmt.Errorf("sub is %q instead of %s", claims.Subject, e.SPIFFEID)
	}
	for _, a := range audience {
		if !slices.Contains(claims.Audience, a) {
			return cache.JWT{}, fmt.Errorf("aud does not contain %q", a)
		}
	}
	if claims.Expiry == nil {
		return cache.JWT{}, errors.New("exp missing")
	}
	out := cache.JWT{Token: token, KeyID: header.KeyID, IssuedAt: asked, ExpiresAt: claims.Expiry.Time(), AskedAt: asked}
	if claims.IssuedAt != nil { // optional in a JWT-SVID
		out.IssuedAt = claims.IssuedAt.Time()
	}
	if !out.ExpiresAt.After(out.IssuedAt) {
		return cache.JWT{}, fmt.Errorf("exp %s is not after iat %s",
			out.ExpiresAt.UTC().Format(time.RFC3339), out.IssuedAt.UTC().Format(time.RFC3339))
	}
	return out, nil
}
