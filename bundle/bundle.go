// Package bundle owns the node's trust bundles: which authorities are trusted, which of
// them are tainted, and which of them signed a chain.
//
// A [Bundle] is one trust domain's authorities at one moment. A [Snapshot] is the node's
// own bundle with the federated ones. Both are immutable; a change is a new value.
// [Refresher] polls the server through a [Fetcher] and publishes a new Snapshot
// whenever an answer differs from the current one. An invalid answer (another trust
// domain, or no usable X.509 authority) changes nothing. An older answer is applied
// only after a minute of such answers. An unusable authority is left out alone; see
// [New].
//
// The taint mark is SPIRE's and not part of the SPIFFE bundle format (SPIFFE Trust
// Domain and Bundle, section 4). A tainted authority is still trusted for verification,
// and everything it signed has to be replaced before it is removed.
package bundle

import (
	"crypto"
	"crypto/sha1"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// ErrNotFound is returned by a [Fetcher] if the server has no bundle for a federated
// trust domain.
var ErrNotFound = errors.New("no bundle for this trust domain")

// X509Authority is one trusted X.509 CA certificate.
type X509Authority struct {
	// ID is the subject key identifier in lower-case hex, which SPIRE and its
	// localauthority commands use. [New] derives it from Certificate if it is empty.
	ID          string
	Certificate *x509.Certificate
	// Tainted means that everything this authority signed must be replaced.
	Tainted bool
	// TaintedSince is when this node first saw the mark, in wall-clock time. The
	// node's random delay begins then, so it is carried from one snapshot to the
	// next and kept over a restart. Zero if not tainted.
	TaintedSince time.Time
}

// JWTAuthority is one trusted JWT verification key.
type JWTAuthority struct {
	KeyID     string
	PublicKey crypto.PublicKey
	// ExpiresAt is zero if the server gives no expiry.
	ExpiresAt time.Time
	Tainted   bool
}

// Bundle is one trust domain's authorities at one moment. It is immutable:
// callers must not modify the slices it returns.
type Bundle struct {
	td       spiffeid.TrustDomain
	content  Content
	x509DER  []byte
	jwks     []byte
	roots    *x509.CertPool
	jwtIndex map[string]int
}

// New returns the Bundle with the content of a server's answer, a file or a bundle
// endpoint. Duplicates become one authority. Unusable authorities are left out and
// listed by [Bundle.LeftOut]. New fails if the trust domain is missing or no X.509
// authority is left: such an answer is never a real trust bundle, and applying it would
// withdraw trust from everything.
func New(td spiffeid.TrustDomain, c Content) (*Bundle, error) {
	if td.IsZero() {
		return nil, errors.New("trust bundle has no trust domain")
	}
	c = c.usable()
	if len(c.X509) == 0 {
		err := fmt.Errorf("trust bundle of %q has no X.509 authority", td.Name())
		if len(c.LeftOut) > 0 {
			err = fmt.Errorf("%w that can be used: %v", err, c.LeftOut[0])
		}
		return nil, err
	}
	b := &Bundle{td: td, content: c, roots: x509.NewCertPool(), jwtIndex: make(map[string]int, len(c.JWT))}
	for _, a := range c.X509 {
		b.x509DER = append(b.x509DER, a.Certificate.Raw...)
		b.roots.AddCert(a.Certificate)
	}
	set := jose.JSONWebKeySet{Keys: make([]jose.JSONWebKey, 0, len(c.JWT))}
	for i, k := range c.JWT {
		b.jwtIndex[k.KeyID] = i
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: k.PublicKey, KeyID: k.KeyID})
	}
	jwks, err := json.Marshal(set)
	if err != nil {
		return nil, fmt.Errorf("trust bundle of %q: encode JWT keys: %w", td.Name(), err)
	}
	b.jwks = jwks
	return b, nil
}

// AuthorityID returns the ID of an X.509 authority: its subject key identifier in
// lower-case hex or, if the certificate has none, the SHA-1 of the bits of its public key
// (RFC 5280, section 4.2.1.2, method 1).
func AuthorityID(cert *x509.Certificate) string {
	if len(cert.SubjectKeyId) > 0 {
		return hex.EncodeToString(cert.SubjectKeyId)
	}
	var info struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}
	// It has been parsed before, with the certificate.
	_, _ = asn1.Unmarshal(cert.RawSubjectPublicKeyInfo, &info)
	sum := sha1.Sum(info.Key.Bytes)
	return hex.EncodeToString(sum[:])
}

// TrustDomain returns the trust domain whose bundle this is.
func (b *Bundle) TrustDomain() spiffeid.TrustDomain { return b.td }

// Sequence returns the server's sequence number; zero means unknown.
func (b *Bundle) Sequence() uint64 { return b.content.Sequence }

// RefreshHint returns the server's refresh hint; zero if there is none.
func (b *Bundle) RefreshHint() time.Duration { return b.content.RefreshHint }

// X509 returns the X.509 authorities in the server's order. Read only.
func (b *Bundle) X509() []X509Authority { return b.content.X509 }

// JWT returns the JWT keys in the server's order. Read only.
func (b *Bundle) JWT() []JWTAuthority { return b.content.JWT }

// LeftOut lists the unusable authorities of the content. Read only.
func (b *Bundle) LeftOut() []LeftOut { return b.content.LeftOut }

// X509DER returns the X.509 authorities as concatenated DER, the form of the
// Workload API (SPIFFE Workload API, section 5.2.1). Read only.
func (b *Bundle) X509DER() []byte { return b.x509DER }

// JWKS returns the JWT keys, and only those, as a JWK set (RFC 7517), the form
// of the Workload API's JWT bundles. Read only.
func (b *Bundle) JWKS() []byte { return b.jwks }

// X509Authority returns the X.509 authority with the ID: the first of several
// certificates, which all have the same mark.
func (b *Bundle) X509Authority(id string) (X509Authority, bool) {
	for _, a := range b.content.X509 {
		if a.ID == id {
			return a, true
		}
	}
	return X509Authority{}, false
}

// JWTKey returns the JWT key with the key ID.
func (b *Bundle) JWTKey(keyID string) (JWTAuthority, bool) {
	i, ok := b.jwtIndex[keyID]
	if !ok {
		return JWTAuthority{}, false
	}
	return b.content.JWT[i], true
}

// Verify checks that the chain leads from leaf over intermediates to an X.509 authority
// of this bundle at the time now, and returns that authority's ID. If it leads to
// several, an authority that is not tainted is preferred.
func (b *Bundle) Verify(leaf *x509.Certificate, intermediates []*x509.Certificate, now time.Time) (string, error) {
	opts := x509.VerifyOptions{
		Roots:         b.roots,
		Intermediates: x509.NewCertPool(),
		CurrentTime:   now,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}
	for _, c := range intermediates {
		opts.Intermediates.AddCert(c)
	}
	chains, err := leaf.Verify(opts)
	if err != nil {
		return "", fmt.Errorf("chain does not lead to an authority of %q: %w", b.td.Name(), err)
	}
	var id string
	for _, chain := range chains {
		id = AuthorityID(chain[len(chain)-1])
		if a, ok := b.X509Authority(id); ok && !a.Tainted {
			return id, nil
		}
	}
	return id, nil
}

// Equal reports whether both bundles have the same sequence number, the same
// authorities with the same marks, and the same ones left out.
func (b *Bundle) Equal(o *Bundle) bool {
	if b == nil || o == nil {
		return b == o
	}
	if b.td != o.td || b.content.Sequence != o.content.Sequence || b.content.RefreshHint != o.content.RefreshHint ||
		len(b.content.X509) != len(o.content.X509) || len(b.content.JWT) != len(o.content.JWT) ||
		!slices.Equal(b.content.LeftOut, o.content.LeftOut) {
		return false
	}
	for i, x := range b.content.X509 {
		y := o.content.X509[i]
		if x.ID != y.ID || x.Tainted != y.Tainted || !x.Certificate.Equal(y.Certificate) {
			return false
		}
	}
	for i, x := range b.content.JWT {
		y := o.content.JWT[i]
		if x.KeyID != y.KeyID || x.Tainted != y.Tainted || !x.ExpiresAt.Equal(y.ExpiresAt) || !SameKey(x.PublicKey, y.PublicKey) {
			return false
		}
	}
	return true
}

// since returns b with TaintedSince set for every tainted authority: the time in prev,
// or now for a new mark.
func (b *Bundle) since(prev *Bundle, now time.Time) *Bundle {
	out := *b
	out.content.X509 = make([]X509Authority, len(b.content.X509))
	copy(out.content.X509, b.content.X509)
	for i := range out.content.X509 {
		a := &out.content.X509[i]
		if !a.Tainted {
			continue
		}
		// Without the monotonic reading: the time is kept over a restart, so only
		// the wall clock counts.
		a.TaintedSince = now.Round(0)
		if prev != nil {
			if p, _ := prev.X509Authority(a.ID); !p.TaintedSince.IsZero() {
				a.TaintedSince = p.TaintedSince
			}
		}
	}
	return &out
}

// State is the state of an authority in a bundle.
type State int

// The states of an authority. A bundle does not tell a prepared authority from an
// active one.
const (
	Removed State = iota // not in the bundle: nothing that it signed verifies
	Trusted              // in the bundle without a taint mark: prepared or active
	Tainted              // in the bundle with a taint mark: what it signed verifies, and has to be replaced
)

// String returns the state's name.
func (s State) String() string { return [...]string{"removed", "trusted", "tainted"}[s] }

// Snapshot is the node's own bundle and those of the trust domains that its
// entries federate with. It is immutable.
type Snapshot struct {
	Own       *Bundle
	Federated map[spiffeid.TrustDomain]*Bundle
	// NotFound are the federated trust domains for which the server has no bundle.
	NotFound map[spiffeid.TrustDomain]bool
}

// Pending reports whether the server has not answered yet for a federated trust domain.
func (s *Snapshot) Pending(td spiffeid.TrustDomain) bool {
	return s.Federated[td] == nil && !s.NotFound[td] && td != s.Own.TrustDomain()
}

// State returns the state of the X.509 authority with this ID in the own bundle and, if
// it is tainted, since when this node has known.
func (s *Snapshot) State(id string) (State, time.Time) {
	a, ok := s.Own.X509Authority(id)
	switch {
	case !ok:
		return Removed, time.Time{}
	case a.Tainted:
		return Tainted, a.TaintedSince
	}
	return Trusted, time.Time{}
}
