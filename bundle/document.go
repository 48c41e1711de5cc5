package bundle

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// maxHint is the maximum refresh hint in seconds, so that no hint overflows a duration.
const maxHint = 365 * 24 * 3600

// Seconds returns a refresh hint in seconds as a duration within 0 and a year.
func Seconds(hint int64) time.Duration {
	return time.Duration(min(max(hint, 0), maxHint)) * time.Second
}

// Document is a trust bundle from a file or a bundle endpoint. It has each usable
// authority once.
type Document struct {
	Content
	// Numbered means that it has a sequence number, which may be zero.
	Numbered bool
}

// Read parses a trust bundle in SPIFFE's format or as PEM certificates. Neither has taint
// marks.
func Read(data []byte) (*Document, error) {
	data = bytes.TrimSpace(data)
	if bytes.HasPrefix(data, []byte("{")) {
		return ReadJSON(data)
	}
	return readPEM(data)
}

// ReadJSON parses a trust bundle in SPIFFE's format (SPIFFE Trust Domain and Bundle,
// section 4). Unusable authorities are left out, as the specification requires for
// unknown types (section 4.2).
//
// A document without X.509 authorities withdraws all of them. A document whose X.509
// authorities are all unusable does not, and is an error.
func ReadJSON(data []byte) (*Document, error) {
	var doc struct {
		Keys        *[]json.RawMessage `json:"keys"`
		Sequence    *uint64            `json:"spiffe_sequence"`
		RefreshHint *int64             `json:"spiffe_refresh_hint"`
	}
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, fmt.Errorf("not a bundle in SPIFFE's format: %w", err)
	}
	if doc.Keys == nil {
		return nil, errors.New(`not a bundle in SPIFFE's format: no "keys"`)
	}
	var d Document
	if doc.Sequence != nil {
		d.Sequence, d.Numbered = *doc.Sequence, true
	}
	if doc.RefreshHint != nil {
		d.RefreshHint = Seconds(*doc.RefreshHint)
	}
	for _, raw := range *doc.Keys {
		if l := d.addKey(raw); l != nil {
			d.leaveOut(*l)
		}
	}
	d.Content = d.usable()
	if len(d.X509) > 0 {
		return &d, nil
	}
	for _, l := range d.LeftOut {
		if l.Type == TypeX509 || l.Reason == notAnObject {
			return nil, fmt.Errorf("none of its X.509 authorities can be used, such as %v", l)
		}
	}
	return &d, nil
}

const notAnObject = "it is not a key"

// addKey adds one X.509 or JWT authority, or returns what is left out. The reason has no
// text of the key itself, which may be a private one.
func (c *Content) addKey(raw json.RawMessage) *LeftOut {
	var head struct {
		Use *string `json:"use"`
		ID  string  `json:"kid"`
	}
	if err := json.Unmarshal(raw, &head); err != nil || bytes.Equal(raw, []byte("null")) {
		return &LeftOut{Type: TypeUnknown, Reason: notAnObject}
	}
	typ := TypeUnknown
	switch {
	case head.Use == nil:
		return &LeftOut{Type: typ, ID: head.ID, Reason: "it has no use"}
	case *head.Use == "x509-svid":
		typ = TypeX509
	case *head.Use == "jwt-svid":
		typ = TypeJWT
	default:
		return &LeftOut{Type: typ, ID: head.ID, Reason: fmt.Sprintf("its use %.32q is not known", *head.Use)}
	}
	var key jose.JSONWebKey
	if err := json.Unmarshal(raw, &key); err != nil {
		return &LeftOut{Type: typ, ID: head.ID, Reason: err.Error()}
	}
	if !key.IsPublic() {
		return &LeftOut{Type: typ, ID: head.ID, Reason: "it is not a public key"}
	}
	if typ == TypeJWT {
		c.JWT = append(c.JWT, JWTAuthority{KeyID: key.KeyID, PublicKey: key.Key})
		return nil
	}
	if n := len(key.Certificates); n != 1 {
		return &LeftOut{Type: typ, ID: head.ID, Reason: fmt.Sprintf("its x5c has %d certificates instead of 1", n)}
	}
	c.X509 = append(c.X509, X509Authority{Certificate: key.Certificates[0]})
	return nil
}

// readPEM parses certificates, one authority each.
func readPEM(data []byte) (*Document, error) {
	var d Document
	for {
		block, rest := pem.Decode(data)
		if block == nil {
			break
		}
		data = rest
		if block.Type != "CERTIFICATE" {
			d.leaveOut(LeftOut{Type: TypeUnknown, Reason: fmt.Sprintf("a PEM block %.32q is not a CERTIFICATE", block.Type)})
			continue
		}
		d.AddX509(block.Bytes, false)
	}
	if len(d.X509)+len(d.LeftOut) == 0 {
		return nil, errors.New("neither PEM certificates nor a SPIFFE bundle in JSON")
	}
	d.Content = d.usable()
	if len(d.X509) == 0 {
		return nil, fmt.Errorf("none of its X.509 authorities can be used, such as %v", d.LeftOut[0])
	}
	return &d, nil
}
