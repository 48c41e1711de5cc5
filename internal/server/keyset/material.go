package keyset

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// backdate is how far before now the NotBefore of a certificate is, so that a
// verifier whose clock is slightly behind accepts it at once.
const backdate = 10 * time.Second

// newRecord makes a new keyset with its keys, in state Prepared. Its CA certificate is
// valid from the given time on, or from the issue if that is earlier.
func newRecord(td spiffeid.TrustDomain, id string, from, now time.Time, lifetime time.Duration) (Record, error) {
	now = now.UTC().Truncate(time.Second)
	if from.After(now) {
		from = now
	}
	r := Record{ID: id, State: Prepared, IssuedAt: now, ExpiresAt: now.Add(lifetime), JWTKeyID: rand.Text()}

	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Record{}, fmt.Errorf("generate CA key: %w", err)
	}
	if r.CAKey, err = x509.MarshalPKCS8PrivateKey(caKey); err != nil {
		return Record{}, fmt.Errorf("encode CA key: %w", err)
	}
	if r.CA, err = newCA(td, r, from.Add(-backdate), caKey); err != nil {
		return Record{}, err
	}

	jwtKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Record{}, fmt.Errorf("generate JWT key: %w", err)
	}
	if r.JWTKey, err = x509.MarshalPKCS8PrivateKey(jwtKey); err != nil {
		return Record{}, fmt.Errorf("encode JWT key: %w", err)
	}
	return r, nil
}

// newCA makes the self-signed certificate of a signing authority by SPIFFE X.509-SVID
// (sections 3 and 4): the trust domain's ID as the only URI SAN, CA set, and only the
// key usages keyCertSign and cRLSign.
func newCA(td spiffeid.TrustDomain, r Record, notBefore time.Time, key *ecdsa.PrivateKey) ([]byte, error) {
	ski, err := subjectKeyID(key.Public())
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: newSerial(),
		// RFC 5280 (4.1.2.6) requires a CA to have a subject. The keyset's ID
		// makes it unique, so that verifiers that find issuers by name do not
		// confuse two keysets.
		Subject:               pkix.Name{Organization: []string{"renewd"}, CommonName: r.ID},
		NotBefore:             notBefore,
		NotAfter:              r.ExpiresAt,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true, // it signs leaves only
		SubjectKeyId:          ski,
		AuthorityKeyId:        ski,
		URIs:                  []*url.URL{td.ID().URL()},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("sign CA certificate: %w", err)
	}
	return der, nil
}

// newID returns a keyset ID: fifty random bits in the alphabet a-z2-7.
func newID() string { return "ks_" + strings.ToLower(rand.Text()[:10]) }

// newSerial returns a random certificate serial number: positive and at most twenty
// octets (RFC 5280, 4.1.2.2), with enough random bits never to repeat.
func newSerial() *big.Int {
	b := make([]byte, 16)
	_, _ = rand.Read(b)  // never fails (crypto/rand)
	b[0] = b[0]&0x7f | 1 // never zero
	return new(big.Int).SetBytes(b)
}

// subjectKeyID returns a key identifier by RFC 7093, section 2, method 1.
func subjectKeyID(pub crypto.PublicKey) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, fmt.Errorf("encode public key: %w", err)
	}
	var info struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}
	if _, err := asn1.Unmarshal(der, &info); err != nil {
		return nil, fmt.Errorf("read public key: %w", err)
	}
	sum := sha256.Sum256(info.Key.RightAlign())
	return sum[:20], nil
}

// snapshot is the parsed form of one Document. It is immutable.
type snapshot struct {
	version   uint64
	keysets   []Keyset
	rotatedAt time.Time
	active    *signer
	bundle    *Bundle
	replaced  chan struct{} // closed when it is replaced
}

// signer holds the active keyset's private keys.
type signer struct {
	keyset Keyset
	ca     *x509.Certificate
	caKey  crypto.Signer
	jwt    jose.Signer
}

// newSnapshot parses a Document and checks its invariants: all keysets are of this
// trust domain, their IDs differ, and exactly one is active.
func newSnapshot(td spiffeid.TrustDomain, doc Document) (*snapshot, error) {
	s := &snapshot{
		version: doc.Version, rotatedAt: doc.RotatedAt, bundle: &Bundle{Sequence: doc.Sequence},
		replaced: make(chan struct{}),
	}
	seen := make(map[string]bool, len(doc.Records))
	for _, r := range doc.Records {
		if seen[r.ID] {
			return nil, fmt.Errorf("keyset %s is stored twice", r.ID)
		}
		seen[r.ID] = true
		if err := s.add(td, r); err != nil {
			return nil, fmt.Errorf("keyset %s: %w", r.ID, err)
		}
	}
	if s.active == nil {
		return nil, errors.New("no keyset is active")
	}
	return s, nil
}

func (s *snapshot) add(td spiffeid.TrustDomain, r Record) error {
	ca, err := x509.ParseCertificate(r.CA)
	if err != nil {
		return fmt.Errorf("parse CA certificate: %w", err)
	}
	if len(ca.URIs) != 1 || ca.URIs[0].String() != td.IDString() {
		return fmt.Errorf("CA certificate is not of trust domain %q", td.Name())
	}
	caKey, err := parseKey(r.CAKey)
	if err != nil {
		return fmt.Errorf("parse CA key: %w", err)
	}
	if !caKey.PublicKey.Equal(ca.PublicKey) {
		return errors.New("CA certificate and key do not match")
	}
	jwtKey, err := parseKey(r.JWTKey)
	if err != nil {
		return fmt.Errorf("parse JWT key: %w", err)
	}
	pkixKey, err := x509.MarshalPKIXPublicKey(jwtKey.Public())
	if err != nil {
		return fmt.Errorf("encode JWT key: %w", err)
	}
	k := Keyset{
		ID: r.ID, State: r.State, IssuedAt: r.IssuedAt, ExpiresAt: r.ExpiresAt,
		SteppedDownAt: r.SteppedDownAt, SteppedDownBy: r.SteppedDownBy, TaintedAt: r.TaintedAt,
		X509AuthorityID: hex.EncodeToString(ca.SubjectKeyId), JWTKeyID: r.JWTKeyID, ValidFrom: ca.NotBefore,
	}
	switch k.State {
	case Active:
		if s.active != nil {
			return fmt.Errorf("active in addition to %s", s.active.keyset.ID)
		}
		jwtSigner, err := newJWTSigner(jwtKey, k.JWTKeyID)
		if err != nil {
			return err
		}
		s.active = &signer{keyset: k, ca: ca, caKey: caKey, jwt: jwtSigner}
	case Prepared, Tainted:
	default:
		return fmt.Errorf("unknown state %v", k.State)
	}
	tainted := k.State == Tainted
	s.keysets = append(s.keysets, k)
	s.bundle.X509 = append(s.bundle.X509, X509Authority{ID: k.X509AuthorityID, Certificate: ca, Tainted: tainted})
	s.bundle.JWT = append(s.bundle.JWT, JWTAuthority{
		KeyID: k.JWTKeyID, PublicKey: jwtKey.Public(), PKIX: pkixKey, ExpiresAt: k.ExpiresAt, Tainted: tainted,
	})
	return nil
}

func newJWTSigner(key *ecdsa.PrivateKey, keyID string) (jose.Signer, error) {
	s, err := jose.NewSigner(
		jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: keyID}},
		(&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return nil, fmt.Errorf("make JWT signer: %w", err)
	}
	return s, nil
}

func parseKey(der []byte) (*ecdsa.PrivateKey, error) {
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		// The parser's error could reveal something about the private key.
		return nil, errors.New("malformed private key")
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok || ec.Curve != elliptic.P256() {
		return nil, errors.New("private key is not of type ec-p256")
	}
	return ec, nil
}
