package keyset

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// The lifetimes of SVIDs.
const (
	DefaultX509TTL = 24 * time.Hour
	MinX509TTL     = time.Hour
	MaxX509TTL     = 168 * time.Hour
	DefaultJWTTTL  = 24 * time.Hour
)

// The limits of the RSA keys that are signed. The upper limits bound the work that a
// caller's key can cause.
const (
	minRSABits     = 2048
	maxRSABits     = 4096
	maxRSAExponent = 65537
)

// maxAudience bounds the audience of a JWT-SVID, in bytes of its JSON.
const maxAudience = 64 << 10

// X509SVID is a signed X.509-SVID. The authority signs leaves directly, so the
// leaf is the whole chain.
type X509SVID struct {
	ID                  spiffeid.ID
	DER                 []byte
	Serial              string // decimal
	Authority           string // X.509 authority ID
	NotBefore, NotAfter time.Time
}

// JWTSVID is a signed JWT-SVID.
type JWTSVID struct {
	ID                  spiffeid.ID
	Token               string // compact serialization
	KeyID               string
	IssuedAt, ExpiresAt time.Time
}

// ParseCSR returns the public key of a PKCS#10 request in DER, after verifying its
// signature, which shows that the sender has the private key. The rest of the request
// is ignored. The supported keys are those that SPIRE's agents send, ECDSA P-256 and
// P-384 and RSA of 2048 to 4096 bits with an exponent of at most 65537, and P-521. Any
// other key is refused before its signature is verified.
func ParseCSR(der []byte) (crypto.PublicKey, error) {
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("malformed CSR: %w", err)
	}
	switch key := csr.PublicKey.(type) {
	case *ecdsa.PublicKey:
		if key.Curve == elliptic.P224() {
			return nil, errors.New("ECDSA key on P-224: use P-256, P-384 or P-521")
		}
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits < minRSABits || bits > maxRSABits {
			return nil, fmt.Errorf("RSA key of %d bits: must have %d to %d", bits, minRSABits, maxRSABits)
		}
		if key.E > maxRSAExponent {
			return nil, fmt.Errorf("RSA key with exponent %d: must be at most %d", key.E, maxRSAExponent)
		}
	default:
		return nil, errors.New("key type is not supported: use ECDSA or RSA")
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("invalid CSR signature: %w", err)
	}
	return csr.PublicKey, nil
}

// SignX509 signs an X.509-SVID for a key with the active keyset. It is valid from ten
// seconds ago until ttl (DefaultX509TTL when zero) is over or the keyset expires,
// whichever is first. dnsNames must be in lower case and pass [CheckDNSNames]; the
// first is also the common name if it is not too long.
func (d *Deployment) SignX509(id spiffeid.ID, key crypto.PublicKey, ttl time.Duration, dnsNames ...string) (X509SVID, error) {
	s := d.current.Load().active
	now := d.now()
	if err := d.checkSignable(s, id, now); err != nil {
		return X509SVID{}, err
	}
	notAfter, err := expiry(s, now, ttl, DefaultX509TTL)
	if err != nil {
		return X509SVID{}, err
	}
	ski, err := subjectKeyID(key)
	if err != nil {
		return X509SVID{}, fmt.Errorf("sign X.509-SVID: %w", err)
	}
	// SPIFFE X.509-SVID, sections 2, 4.3 and 4.4: one URI SAN and any DNS SANs,
	// critical if the subject is empty (RFC 5280, 4.2.1.6), not a CA, usable for both
	// ends of TLS.
	template := &x509.Certificate{
		SerialNumber:          newSerial(),
		Subject:               pkix.Name{CommonName: commonName(dnsNames)},
		NotBefore:             now.Add(-backdate).UTC().Truncate(time.Second),
		NotAfter:              notAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment | x509.KeyUsageKeyAgreement,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		SubjectKeyId:          ski,
		AuthorityKeyId:        s.ca.SubjectKeyId,
		URIs:                  []*url.URL{id.URL()},
		DNSNames:              dnsNames,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, s.ca, key, s.caKey)
	if err != nil {
		return X509SVID{}, fmt.Errorf("sign X.509-SVID: %w", err)
	}
	return X509SVID{
		ID: id, DER: der, Serial: template.SerialNumber.String(), Authority: s.keyset.X509AuthorityID,
		NotBefore: template.NotBefore, NotAfter: notAfter,
	}, nil
}

// SignJWT signs a JWT-SVID with the active keyset. It expires after ttl (DefaultJWTTTL
// when zero) or with the keyset, whichever is first. Empty audiences are dropped; at
// least one must remain, and all together must be below 64 KiB.
func (d *Deployment) SignJWT(id spiffeid.ID, audience []string, ttl time.Duration) (JWTSVID, error) {
	return d.signJWT(id, audience, ttl, "")
}

// SignJWTWithID is [Deployment.SignJWT] with a unique jti claim (RFC 7519, section
// 4.1.7).
func (d *Deployment) SignJWTWithID(id spiffeid.ID, audience []string, ttl time.Duration) (JWTSVID, error) {
	return d.signJWT(id, audience, ttl, rand.Text())
}

// jwtClaims are the claims of a JWT-SVID (SPIFFE JWT-SVID, section 3). The audience is
// always an array, as from a SPIRE server, because clients index it. [jwt.Audience]
// would write a single one as a string, which RFC 7519 allows.
type jwtClaims struct {
	Subject  string           `json:"sub"`
	Audience []string         `json:"aud"`
	IssuedAt *jwt.NumericDate `json:"iat"`
	Expiry   *jwt.NumericDate `json:"exp"`
	ID       string           `json:"jti,omitempty"`
}

func (d *Deployment) signJWT(id spiffeid.ID, audience []string, ttl time.Duration, tokenID string) (JWTSVID, error) {
	s := d.current.Load().active
	now := d.now()
	if err := d.checkSignable(s, id, now); err != nil {
		return JWTSVID{}, err
	}
	audience = slices.DeleteFunc(slices.Clone(audience), func(a string) bool { return a == "" })
	if len(audience) == 0 {
		return JWTSVID{}, ErrSignNoAudience
	}
	if data, err := json.Marshal(audience); err != nil || len(data) >= maxAudience {
		return JWTSVID{}, ErrSignLongAudience
	}
	expiresAt, err := expiry(s, now, ttl, DefaultJWTTTL)
	if err != nil {
		return JWTSVID{}, err
	}
	issuedAt := now.UTC().Truncate(time.Second)
	token, err := jwt.Signed(s.jwt).Claims(jwtClaims{
		Subject: id.String(), Audience: audience, IssuedAt: jwt.NewNumericDate(issuedAt), Expiry: jwt.NewNumericDate(expiresAt), ID: tokenID,
	}).Serialize()
	if err != nil {
		return JWTSVID{}, fmt.Errorf("sign JWT-SVID: %w", err)
	}
	return JWTSVID{ID: id, Token: token, KeyID: s.keyset.JWTKeyID, IssuedAt: issuedAt, ExpiresAt: expiresAt}, nil
}

func (d *Deployment) checkSignable(s *signer, id spiffeid.ID, now time.Time) error {
	switch {
	case !id.MemberOf(d.td):
		return ErrSignForeign
	case id.Path() == "":
		return ErrSignReserved
	case !now.Before(s.keyset.ExpiresAt):
		return ErrSignExpired
	}
	return nil
}

// expiry returns the expiry of an SVID that is signed now, in full seconds. It is
// never after that of the keyset, since a verifier would refuse the SVID from then on.
func expiry(s *signer, now time.Time, ttl, byDefault time.Duration) (time.Time, error) {
	if ttl < 0 {
		return time.Time{}, ErrSignNegativeLife
	}
	if ttl == 0 {
		ttl = byDefault
	}
	t := now.Add(ttl).UTC().Truncate(time.Second)
	if t.After(s.keyset.ExpiresAt) {
		t = s.keyset.ExpiresAt
	}
	return t, nil
}
