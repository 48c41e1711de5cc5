package federation

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/config"
)

// maxBytes bounds the bundle of an endpoint or a file. An authority takes 1 to 2 KiB.
const maxBytes = 1 << 20

// parse parses a bundle in SPIFFE's format. It also returns the authorities that cannot
// be used; see [bundle.ReadJSON]. A bundle without authorities is valid: the trust domain
// has withdrawn its keys.
func parse(td spiffeid.TrustDomain, data []byte) (*spiffebundle.Bundle, []bundle.LeftOut, error) {
	doc, err := bundle.ReadJSON(data)
	if err != nil {
		return nil, nil, err
	}
	return fromDocument(td, doc), doc.LeftOut, nil
}

func fromDocument(td spiffeid.TrustDomain, doc *bundle.Document) *spiffebundle.Bundle {
	b := spiffebundle.New(td)
	if doc.Numbered {
		b.SetSequenceNumber(doc.Sequence)
	}
	if doc.RefreshHint > 0 {
		b.SetRefreshHint(doc.RefreshHint)
	}
	certs := make([]*x509.Certificate, len(doc.X509))
	for i, a := range doc.X509 {
		certs[i] = a.Certificate
	}
	b.SetX509Authorities(certs)
	keys := make(map[string]crypto.PublicKey, len(doc.JWT))
	for _, k := range doc.JWT {
		keys[k.KeyID] = k.PublicKey
	}
	b.SetJWTAuthorities(keys)
	return b
}

// marshal is the inverse of parse. The library writes "keys":null for an empty bundle.
func marshal(b *spiffebundle.Bundle) ([]byte, error) {
	data, err := b.Marshal()
	if b.Empty() {
		data = bytes.Replace(data, []byte("null"), []byte("[]"), 1)
	}
	return data, err
}

// readFile reads the bundle of a trust domain from a file, in SPIFFE's format or as
// PEM certificates.
func readFile(path string) (*bundle.Document, error) {
	data, err := config.ReadFile(path, maxBytes)
	if err != nil {
		return nil, err
	}
	doc, err := bundle.Read(data)
	if err == nil && len(doc.X509) == 0 {
		err = errors.New("it has no X.509 authority")
	}
	if err != nil {
		return nil, config.Permanent(fmt.Errorf("%s: %w", path, err))
	}
	return doc, nil
}

// maxListed bounds the authorities that a log line lists.
const maxListed = 16

// names returns the authorities of a bundle for the log; none of a nil bundle.
func names(b *spiffebundle.Bundle) []string {
	if b == nil {
		return nil
	}
	var out []string
	for _, cert := range b.X509Authorities() {
		id := cert.SubjectKeyId
		if len(id) == 0 {
			sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
			id = sum[:]
		}
		out = append(out, fmt.Sprintf("x509:%x", id[:min(len(id), 32)]))
	}
	for _, id := range slices.Sorted(maps.Keys(b.JWTAuthorities())) {
		out = append(out, fmt.Sprintf("jwt:%.64s", id))
	}
	return out
}

// without returns the elements of list that other does not have, at most maxListed.
func without(list, other []string) []string {
	var out []string
	for _, name := range list {
		if len(out) < maxListed && !slices.Contains(other, name) {
			out = append(out, name)
		}
	}
	return out
}
