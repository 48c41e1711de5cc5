package endpoint

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	"github.com/renewd/renewd/internal/server/keyset"
)

// documents are the published documents of one bundle with a refresh hint. They are
// immutable.
type documents struct {
	of           *keyset.Bundle
	hint         time.Duration
	bundle, keys document
}

type document struct {
	body []byte
	tag  string // ETag: quoted, a hash of the body
}

// documents returns the documents of the published bundle. It renders a new bundle once;
// concurrent requests may render it, too.
func (s *Server) documents() (*documents, error) {
	now, hint := s.config.Bundle(), s.reloaded.Load().hint
	if d := s.rendered.Load(); d != nil && d.of == now && d.hint == hint {
		return d, nil
	}
	d, err := s.render(now, hint)
	if err != nil {
		return nil, err
	}
	s.rendered.Store(d)
	return d, nil
}

func (s *Server) render(b *keyset.Bundle, hint time.Duration) (*documents, error) {
	bundle := spiffebundle.New(s.config.TrustDomain)
	bundle.SetSequenceNumber(b.Sequence)
	if hint > 0 {
		bundle.SetRefreshHint(hint)
	}
	bundle.SetX509Authorities(b.Certificates())
	keys := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{}}
	for _, a := range b.JWT {
		key := jose.JSONWebKey{Key: a.PublicKey, KeyID: a.KeyID, Use: "sig", Algorithm: algorithm(a.PublicKey)}
		// The encoder would write a private key as well.
		if !key.IsPublic() || !key.Valid() {
			return nil, fmt.Errorf("JWT key %s is not a public key", a.KeyID)
		}
		keys.Keys = append(keys.Keys, key)
		if err := bundle.AddJWTAuthority(a.KeyID, a.PublicKey); err != nil {
			return nil, err
		}
	}
	body, err := bundle.Marshal()
	if err != nil {
		return nil, fmt.Errorf("encode bundle: %w", err)
	}
	jwks, err := json.Marshal(keys)
	if err != nil {
		return nil, fmt.Errorf("encode keys: %w", err)
	}
	return &documents{of: b, hint: hint, bundle: newDocument(body), keys: newDocument(jwks)}, nil
}

func newDocument(body []byte) document {
	sum := sha256.Sum256(body)
	return document{body: body, tag: `"` + hex.EncodeToString(sum[:16]) + `"`}
}

// algorithm returns the algorithm of a key (RFC 7518, section 3.1); empty if the key
// does not determine it.
func algorithm(key crypto.PublicKey) string {
	if k, ok := key.(*ecdsa.PublicKey); ok {
		switch k.Curve.Params().BitSize {
		case 256:
			return string(jose.ES256)
		case 384:
			return string(jose.ES384)
		case 521:
			return string(jose.ES512)
		}
	}
	return ""
}
