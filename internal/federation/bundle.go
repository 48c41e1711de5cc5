package federation

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/config"
)

// maxBytes bounds a bundle as an endpoint or a file has it. An authority takes 1
// to 2 KiB.
const maxBytes = 1 << 20

// maxHint keeps nonsense from overflowing a duration, in seconds.
const maxHint = 365 * 24 * 3600

// parse reads a bundle in SPIFFE's format (SPIFFE Trust Domain and Bundle, section
// 4). Authorities of kinds that this program does not know are left out, as the
// specification demands and the library does not do; a part that is wrong makes
// the whole an error, because to leave out an authority withdraws trust from all
// that it signed. There may be none at all: all trust is withdrawn then.
func parse(td spiffeid.TrustDomain, data []byte) (*spiffebundle.Bundle, error) {
	var doc struct {
		Keys        *[]json.RawMessage `json:"keys"`
		Sequence    *uint64            `json:"spiffe_sequence"`
		RefreshHint *int64             `json:"spiffe_refresh_hint"`
	}
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, err
	}
	if doc.Keys == nil {
		return nil, errors.New(`it has no "keys"`)
	}
	b := spiffebundle.New(td)
	if doc.Sequence != nil {
		b.SetSequenceNumber(*doc.Sequence)
	}
	if doc.RefreshHint != nil {
		b.SetRefreshHint(time.Duration(min(max(*doc.RefreshHint, 0), maxHint)) * time.Second)
	}
	for i, raw := range *doc.Keys {
		if err := add(b, raw); err != nil {
			return nil, fmt.Errorf("key %d: %w", i+1, err)
		}
	}
	return b, nil
}

// add adds one authority of the two kinds that there are.
func add(b *spiffebundle.Bundle, raw json.RawMessage) error {
	var kind struct {
		Use string `json:"use"`
	}
	if err := json.Unmarshal(raw, &kind); err != nil {
		return err
	}
	if kind.Use != "x509-svid" && kind.Use != "jwt-svid" {
		return nil
	}
	var key jose.JSONWebKey
	switch err := json.Unmarshal(raw, &key); {
	case errors.Is(err, jose.ErrUnsupportedKeyType):
		return nil
	case err != nil:
		return err
	case !key.IsPublic():
		return errors.New("it is not a public key")
	}
	if kind.Use == "x509-svid" {
		if len(key.Certificates) != 1 {
			return fmt.Errorf("an X.509 authority has %d certificates", len(key.Certificates))
		}
		b.AddX509Authority(key.Certificates[0])
		return nil
	}
	if _, err := x509.MarshalPKIXPublicKey(key.Key); err != nil {
		return nil // a kind of key that agents could not be told
	}
	if b.HasJWTAuthority(key.KeyID) {
		return fmt.Errorf("two JWT keys have the ID %q", key.KeyID)
	}
	return b.AddJWTAuthority(key.KeyID, key.Key)
}

// marshal is the reverse of parse. The library writes "keys":null where there are
// none.
func marshal(b *spiffebundle.Bundle) ([]byte, error) {
	data, err := b.Marshal()
	if b.Empty() {
		data = bytes.Replace(data, []byte("null"), []byte("[]"), 1)
	}
	return data, err
}

// ReadFile reads the bundle of a trust domain from a file, in SPIFFE's format or as
// PEM certificates.
func ReadFile(td spiffeid.TrustDomain, path string) (*spiffebundle.Bundle, error) {
	data, err := config.ReadFile(path, maxBytes)
	if err != nil {
		return nil, err
	}
	data = bytes.TrimSpace(data)
	var b *spiffebundle.Bundle
	if bytes.HasPrefix(data, []byte("{")) {
		if b, err = parse(td, data); err != nil {
			err = fmt.Errorf("it is not a bundle in SPIFFE's format: %w", err)
		}
	} else {
		b, err = parsePEM(td, data)
	}
	switch {
	case err != nil:
		return nil, fmt.Errorf("%s: %w", path, err)
	case len(b.X509Authorities()) == 0:
		return nil, fmt.Errorf("%s: it has no X.509 authority", path)
	}
	return b, nil
}

func parsePEM(td spiffeid.TrustDomain, data []byte) (*spiffebundle.Bundle, error) {
	b := spiffebundle.New(td)
	for {
		block, rest := pem.Decode(data)
		if block == nil {
			break
		}
		data = rest
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("it holds a PEM block %q: only CERTIFICATE belongs into a bundle", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(b.X509Authorities())+1, err)
		}
		b.AddX509Authority(cert)
	}
	return b, nil
}

// digest names the authorities of a bundle, in whatever order and form they are.
func digest(b *spiffebundle.Bundle) string {
	var all []string
	for _, cert := range b.X509Authorities() {
		all = append(all, "x509\x00"+string(cert.Raw))
	}
	for id, key := range b.JWTAuthorities() {
		der, _ := x509.MarshalPKIXPublicKey(key) // could be when it was added
		all = append(all, "jwt\x00"+id+"\x00"+string(der))
	}
	slices.Sort(all)
	sum := sha256.New()
	for _, a := range all {
		fmt.Fprintf(sum, "%d\x00%s", len(a), a)
	}
	return hex.EncodeToString(sum.Sum(nil))
}

// maxListed is how many authorities a line of the log names.
const maxListed = 16

// names lists the authorities of a bundle, as logs name them; nil has none.
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

// without returns what one list has and the other has not, at most maxListed.
func without(list, other []string) []string {
	var out []string
	for _, name := range list {
		if len(out) < maxListed && !slices.Contains(other, name) {
			out = append(out, name)
		}
	}
	return out
}
