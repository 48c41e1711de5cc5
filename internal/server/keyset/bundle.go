package keyset

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"time"
)

// X509Authority is a published CA certificate.
type X509Authority struct {
	ID          string // subject key identifier, lower-case hex
	Certificate *x509.Certificate
	Tainted     bool
}

// JWTAuthority is a published JWT verification key.
type JWTAuthority struct {
	KeyID     string
	PublicKey crypto.PublicKey
	PKIX      []byte // the public key as SubjectPublicKeyInfo, DER
	ExpiresAt time.Time
	Tainted   bool
}

// Bundle is a published trust bundle: the authorities of every keyset, whatever its
// state, in order of issue. It is immutable; callers must not modify it.
type Bundle struct {
	// Sequence grows with every change of the authorities or their taint marks.
	Sequence uint64
	X509     []X509Authority
	JWT      []JWTAuthority
}

// Union returns the bundle of a trust domain with several deployments: the
// authorities of all bundles, in the order given. Its sequence number is the sum of
// theirs, so it grows when one of them does.
func Union(bundles ...*Bundle) *Bundle {
	out := new(Bundle)
	for _, b := range bundles {
		out.Sequence += b.Sequence
		out.X509 = append(out.X509, b.X509...)
		out.JWT = append(out.JWT, b.JWT...)
	}
	return out
}

// Certificates returns the X.509 authorities' certificates in a new slice.
func (b *Bundle) Certificates() []*x509.Certificate {
	certs := make([]*x509.Certificate, len(b.X509))
	for i, a := range b.X509 {
		certs[i] = a.Certificate
	}
	return certs
}

// PEM returns the X.509 authorities as PEM certificates, the format of an agent's
// bootstrap bundle file.
func (b *Bundle) PEM() []byte {
	var out bytes.Buffer
	for _, a := range b.X509 {
		// A bytes.Buffer accepts every write, and a block without headers is valid.
		_ = pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: a.Certificate.Raw})
	}
	return out.Bytes()
}
