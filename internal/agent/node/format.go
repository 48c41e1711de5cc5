package node

import (
	"cmp"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
)

// formatVersion is raised when earlier versions of the agent cannot read a file.
const formatVersion = 1

type identityJSON struct {
	Version      int      `json:"version"`
	Reattestable bool     `json:"reattestable"`
	Key          []byte   `json:"key"`   // PKCS #8
	Chain        [][]byte `json:"chain"` // DER, leaf first
}

func encodeIdentity(id *Identity) ([]byte, error) {
	key, err := x509.MarshalPKCS8PrivateKey(id.Key)
	if err != nil {
		return nil, err
	}
	out := identityJSON{Version: formatVersion, Reattestable: id.Reattestable, Key: key}
	for _, c := range id.Chain {
		out.Chain = append(out.Chain, c.Raw)
	}
	return json.Marshal(out)
}

// decodeIdentity omits the error texts of the key's decoder, so that no part of the
// key can reach a log.
func decodeIdentity(b []byte) (*Identity, error) {
	var in identityJSON
	if err := decode(b, &in); err != nil {
		return nil, err
	}
	if err := checkVersion(in.Version); err != nil {
		return nil, err
	}
	parsed, err := x509.ParsePKCS8PrivateKey(in.Key)
	if err != nil {
		return nil, errors.New("the private key cannot be parsed")
	}
	key, ok := parsed.(crypto.Signer)
	if !ok {
		return nil, errors.New("the private key cannot sign")
	}
	return newIdentity(key, in.Chain, in.Reattestable)
}

type bundleJSON struct {
	Version     int           `json:"version"`
	TrustDomain string        `json:"trust_domain"`
	Sequence    uint64        `json:"sequence"`
	RefreshHint time.Duration `json:"refresh_hint_ns"`
	X509        []x509JSON    `json:"x509_authorities"`
	JWT         []jwtJSON     `json:"jwt_authorities"`
	// Adopted has the fingerprints of the authorities of trust_bundle_file that the
	// agent already knows. Only bundle.json has it.
	Adopted []string `json:"adopted,omitzero"`
}

type x509JSON struct {
	ID           string    `json:"id"` // for people: decoding ignores it
	Certificate  []byte    `json:"certificate"`
	Tainted      bool      `json:"tainted,omitempty"`
	TaintedSince time.Time `json:"tainted_since,omitzero"`
}

type jwtJSON struct {
	KeyID     string `json:"key_id"`
	PublicKey []byte `json:"public_key"`           // PKIX
	ExpiresAt int64  `json:"expires_at,omitempty"` // Unix seconds
	Tainted   bool   `json:"tainted,omitempty"`
}

func encodeBundle(b *bundle.Bundle, adopted []string) ([]byte, error) {
	out, err := newBundleJSON(b)
	if err != nil {
		return nil, err
	}
	out.Adopted = adopted
	return json.Marshal(out)
}

func encodeBundles(bundles map[spiffeid.TrustDomain]*bundle.Bundle) ([]byte, error) {
	out := make([]bundleJSON, 0, len(bundles))
	for _, b := range bundles {
		j, err := newBundleJSON(b)
		if err != nil {
			return nil, fmt.Errorf("bundle of %q: %w", b.TrustDomain().Name(), err)
		}
		out = append(out, j)
	}
	slices.SortFunc(out, func(a, b bundleJSON) int { return cmp.Compare(a.TrustDomain, b.TrustDomain) })
	return json.Marshal(out)
}

func newBundleJSON(b *bundle.Bundle) (bundleJSON, error) {
	out := bundleJSON{
		Version:     formatVersion,
		TrustDomain: b.TrustDomain().Name(),
		Sequence:    b.Sequence(),
		RefreshHint: b.RefreshHint(),
	}
	for _, a := range b.X509() {
		out.X509 = append(out.X509, x509JSON{a.ID, a.Certificate.Raw, a.Tainted, a.TaintedSince})
	}
	for _, k := range b.JWT() {
		der, err := x509.MarshalPKIXPublicKey(k.PublicKey)
		if err != nil {
			return bundleJSON{}, fmt.Errorf("JWT key %q: %w", k.KeyID, err)
		}
		j := jwtJSON{KeyID: k.KeyID, PublicKey: der, Tainted: k.Tainted}
		if !k.ExpiresAt.IsZero() {
			j.ExpiresAt = k.ExpiresAt.Unix()
		}
		out.JWT = append(out.JWT, j)
	}
	return out, nil
}

func decodeBundle(raw []byte) (b *bundle.Bundle, adopted []string, err error) {
	var in bundleJSON
	if err := decode(raw, &in); err != nil {
		return nil, nil, err
	}
	b, err = in.bundle()
	return b, in.Adopted, err
}

func decodeBundles(b []byte) (map[spiffeid.TrustDomain]*bundle.Bundle, error) {
	var in []bundleJSON
	if err := decode(b, &in); err != nil {
		return nil, err
	}
	out := make(map[spiffeid.TrustDomain]*bundle.Bundle, len(in))
	for _, j := range in {
		b, err := j.bundle()
		if err != nil {
			return nil, fmt.Errorf("bundle of %q: %w", j.TrustDomain, err)
		}
		out[b.TrustDomain()] = b
	}
	return out, nil
}

func (in *bundleJSON) bundle() (*bundle.Bundle, error) {
	if err := checkVersion(in.Version); err != nil {
		return nil, err
	}
	td, err := spiffeid.TrustDomainFromString(in.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("trust domain: %w", err)
	}
	c := bundle.Content{Sequence: in.Sequence, RefreshHint: in.RefreshHint}
	for i, a := range in.X509 {
		cert, err := x509.ParseCertificate(a.Certificate)
		if err != nil {
			return nil, fmt.Errorf("X.509 authority %d: %w", i, err)
		}
		c.X509 = append(c.X509, bundle.X509Authority{Certificate: cert, Tainted: a.Tainted, TaintedSince: a.TaintedSince})
	}
	for _, k := range in.JWT {
		pub, err := x509.ParsePKIXPublicKey(k.PublicKey)
		if err != nil {
			return nil, fmt.Errorf("JWT key %q: %w", k.KeyID, err)
		}
		j := bundle.JWTAuthority{KeyID: k.KeyID, PublicKey: pub, Tainted: k.Tainted}
		if k.ExpiresAt != 0 {
			j.ExpiresAt = time.Unix(k.ExpiresAt, 0).UTC()
		}
		c.JWT = append(c.JWT, j)
	}
	return bundle.New(td, c)
}

func checkVersion(v int) error {
	switch {
	case v > formatVersion:
		return fmt.Errorf("it has format %d, this agent reads %d: %w", v, formatVersion, errNewer)
	case v != formatVersion:
		return fmt.Errorf("it has format %d, this agent reads %d", v, formatVersion)
	}
	return nil
}

// decode is json.Unmarshal with errors that do not quote the file.
func decode(b []byte, into any) error {
	err := json.Unmarshal(b, into)
	var syntax *json.SyntaxError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &syntax):
		return fmt.Errorf("it is not JSON from byte %d on", syntax.Offset)
	}
	var head struct {
		Version int `json:"version"`
	}
	if json.Unmarshal(b, &head) == nil {
		if err := checkVersion(head.Version); err != nil {
			return err
		}
	}
	return errors.New("its fields are not those that the agent writes")
}
