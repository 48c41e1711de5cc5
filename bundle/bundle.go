// Package bundle owns what this node knows of trust bundles: which authorities
// are trusted, which of them are tainted, and which of them signed a chain.
//
// A [Bundle] is one trust domain's authorities at one moment and a [Snapshot]
// is the node's own bundle with the federated ones. Both are immutable and may
// be shared freely; a change is a new value. [Refresher] polls the server
// through a [Fetcher] and publishes a new Snapshot whenever an answer differs
// from what is held. An answer that cannot be right (unparsable, of another
// trust domain, without any X.509 authority, older than what is held) changes
// nothing.
//
// The taint mark is SPIRE's and is not part of the SPIFFE bundle format
// (SPIFFE Trust Domain and Bundle, section 4): a tainted authority is still
// trusted for verification, and everything it signed has to be replaced
// before it is removed.
package bundle

import (
	"crypto"
	"crypto/sha1"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// ErrNotFound is returned by a [Fetcher] when the server has no bundle for a
// federated trust domain.
var ErrNotFound = errors.New("no bundle for this trust domain")

// X509Authority is one trusted X.509 CA certificate.
type X509Authority struct {
	// ID is the subject key identifier in lower-case hex, the name that SPIRE
	// and its localauthority commands use. [New] derives it from Certificate
	// when it is empty.
	ID          string
	Certificate *x509.Certificate
	// Tainted says that what this authority signed must be replaced.
	Tainted bool
	// TaintedSince is when this node first saw the mark, in wall-clock time.
	// It is the start of the node's random delay, so it is carried from one
	// snapshot to the next and kept over a restart. Zero when not tainted.
	TaintedSince time.Time
}

// JWTAuthority is one trusted JWT verification key.
type JWTAuthority struct {
	KeyID     string
	PublicKey crypto.PublicKey
	// ExpiresAt is zero when the server gives no expiry.
	ExpiresAt time.Time
	Tainted   bool
}

// Content is what a [Bundle] is made of.
type Content struct {
	// Sequence grows with every change of the bundle; zero means unknown.
	Sequence uint64
	// RefreshHint is how often the server would like to be asked; zero means
	// no wish.
	RefreshHint time.Duration
	X509        []X509Authority
	JWT         []JWTAuthority
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

// New makes a Bundle from what a server answered. It fails when the trust
// domain is missing, when there is no X.509 authority, or when an authority
// lacks its certificate, key or key ID: such an answer is never a real trust
// bundle, and applying it would withdraw trust from everything.
// New takes ownership of the slices in c.
func New(td spiffeid.TrustDomain, c Content) (*Bundle, error) {
	if td.IsZero() {
		return nil, errors.New("trust bundle has no trust domain")
	}
	if len(c.X509) == 0 {
		return nil, fmt.Errorf("trust bundle of %q has no X.509 authority", td.Name())
	}
	b := &Bundle{td: td, content: c, roots: x509.NewCertPool(), jwtIndex: make(map[string]int, len(c.JWT))}
	for i := range c.X509 {
		a := &c.X509[i]
		if a.Certificate == nil {
			return nil, fmt.Errorf("trust bundle of %q: X.509 authority %d has no certificate", td.Name(), i)
		}
		if a.ID == "" {
			a.ID = AuthorityID(a.Certificate)
		}
		b.x509DER = append(b.x509DER, a.Certificate.Raw...)
		b.roots.AddCert(a.Certificate)
	}
	set := jose.JSONWebKeySet{Keys: make([]jose.JSONWebKey, 0, len(c.JWT))}
	for i, k := range c.JWT {
		switch {
		case k.KeyID == "":
			return nil, fmt.Errorf("trust bundle of %q: JWT key %d has no key ID", td.Name(), i)
		case k.PublicKey == nil:
			return nil, fmt.Errorf("trust bundle of %q: JWT key %q has no public key", td.Name(), k.KeyID)
		}
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

// AuthorityID names an X.509 authority: its subject key identifier in
// lower-case hex or, where the certificate has none, the SHA-1 of its public
// key, which is how RFC 5280 (4.2.1.2, method 1) would have made it.
func AuthorityID(cert *x509.Certificate) string {
	if len(cert.SubjectKeyId) > 0 {
		return hex.EncodeToString(cert.SubjectKeyId)
	}
	sum := sha1.Sum(cert.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}

// TrustDomain is the trust domain whose bundle this is.
func (b *Bundle) TrustDomain() spiffeid.TrustDomain { return b.td }

// Sequence is the server's sequence number; zero means unknown.
func (b *Bundle) Sequence() uint64 { return b.content.Sequence }

// RefreshHint is how often the server would like to be asked; zero when it
// has no wish.
func (b *Bundle) RefreshHint() time.Duration { return b.content.RefreshHint }

// X509 returns the X.509 authorities in the server's order. Read only.
func (b *Bundle) X509() []X509Authority { return b.content.X509 }

// JWT returns the JWT keys in the server's order. Read only.
func (b *Bundle) JWT() []JWTAuthority { return b.content.JWT }

// X509DER returns the X.509 authorities as concatenated DER, the form of the
// Workload API (SPIFFE Workload API, section 5.2.1). Read only.
func (b *Bundle) X509DER() []byte { return b.x509DER }

// JWKS returns the JWT keys, and only those, as a JWK set (RFC 7517), the form
// of the Workload API's JWT bundles. Read only.
func (b *Bundle) JWKS() []byte { return b.jwks }

// X509Authority finds an X.509 authority by its ID. When a key is published
// under several certificates the mark of any of them counts for the key.
func (b *Bundle) X509Authority(id string) (X509Authority, bool) {
	var found X509Authority
	ok := false
	for _, a := range b.content.X509 {
		if a.ID == id && (!ok || a.Tainted) {
			found, ok = a, true
		}
	}
	return found, ok
}

// JWTKey finds a JWT key by its key ID.
func (b *Bundle) JWTKey(keyID string) (JWTAuthority, bool) {
	i, ok := b.jwtIndex[keyID]
	if !ok {
		return JWTAuthority{}, false
	}
	return b.content.JWT[i], true
}

// Verify checks that the chain leads from leaf over intermediates to one of
// this bundle's X.509 authorities at the time now, and returns the ID of the
// authority that it ends in. When it can end in several, an authority that is
// not tainted is preferred.
func (b *Bundle) Verify(leaf *x509.Certificate, intermediates []*x509.Certificate, now time.Time) (string, error) {
	opts := x509.VerifyOptions{
		Roots:       b.roots,
		CurrentTime: now,
		KeyUsages:   []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}
	if len(intermediates) > 0 {
		opts.Intermediates = x509.NewCertPool()
		for _, c := range intermediates {
			opts.Intermediates.AddCert(c)
		}
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

// Equal reports whether both bundles say the same: the same authorities with
// the same marks under the same sequence number.
func (b *Bundle) Equal(o *Bundle) bool {
	if b == nil || o == nil {
		return b == o
	}
	if b.td != o.td || b.content.Sequence != o.content.Sequence || b.content.RefreshHint != o.content.RefreshHint ||
		len(b.content.X509) != len(o.content.X509) || len(b.content.JWT) != len(o.content.JWT) {
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
		key, ok := x.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
		if x.KeyID != y.KeyID || x.Tainted != y.Tainted || !x.ExpiresAt.Equal(y.ExpiresAt) || !ok || !key.Equal(y.PublicKey) {
			return false
		}
	}
	return true
}

// since returns b with TaintedSince set on every tainted authority: the time
// prev knows for it, or now for a mark that is new.
func (b *Bundle) since(prev *Bundle, now time.Time) *Bundle {
	out := *b
	out.content.X509 = make([]X509Authority, len(b.content.X509))
	copy(out.content.X509, b.content.X509)
	for i := range out.content.X509 {
		a := &out.content.X509[i]
		if !a.Tainted {
			a.TaintedSince = time.Time{}
			continue
		}
		// Cut the monotonic reading: the mark is compared with certificates
		// and outlives the process, so only the wall clock counts.
		a.TaintedSince = now.Round(0)
		if prev != nil {
			if p, ok := prev.X509Authority(a.ID); ok && p.Tainted && !p.TaintedSince.IsZero() {
				a.TaintedSince = p.TaintedSince
			}
		}
	}
	return &out
}

// State is what a bundle says of one authority.
type State int

// The states of an authority as an agent can tell them. A prepared authority
// cannot be told from an active one by the bundle alone.
const (
	Removed State = iota // not in the bundle: nothing it signed verifies
	Trusted
	Tainted
)

// Snapshot is the node's own bundle and those of the trust domains that its
// entries federate with. It is immutable.
type Snapshot struct {
	Own       *Bundle
	Federated map[spiffeid.TrustDomain]*Bundle
	// Absent are the trust domains that the server has said to have no bundle of.
	// What is in neither of the two has not been heard of yet.
	Absent map[spiffeid.TrustDomain]bool
}

// Knows reports whether it has been heard what the bundle of a federated trust domain
// is, or that there is none.
func (s *Snapshot) Knows(td spiffeid.TrustDomain) bool {
	return s.Federated[td] != nil || s.Absent[td] || td == s.Own.TrustDomain()
}

// State says what the own bundle makes of the X.509 authority with this ID
// and, when it is tainted, since when this node knows.
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
