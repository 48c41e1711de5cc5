// Package keyset owns the signing keys of one deployment of one trust domain:
// which keysets exist, the state each is in, and what the active one signs.
//
// A keyset is one X.509 CA key and one JWT signing key that are rotated
// together. Its states and the legal steps are
//
//	Prepare            -> PREPARED   published, not signing
//	Activate PREPARED  -> ACTIVE     the old active one steps down to PREPARED
//	Taint    PREPARED  -> TAINTED    published with the taint mark
//	Remove   TAINTED   -> gone       no longer published
//
// Every other step is refused with a [refusal.Error], so exactly one keyset is
// active at any time. [Deployment] applies the steps; what it signs and
// publishes always follows from one committed [Document] in a [Storage].
// The package knows no wire protocol.
package keyset

import (
	"fmt"
	"time"

	"github.com/renewd/renewd/internal/refusal"
)

// Refusals beside those of package refusal.
const (
	ErrActivateExpired  refusal.Error = "cannot activate expired key set"
	ErrActivateEarly    refusal.Error = "cannot activate key set that is issued in the future: check the clock of the server"
	ErrSignExpired      refusal.Error = "cannot sign with expired key set"
	ErrSignForeign      refusal.Error = "cannot sign for a SPIFFE ID of another trust domain"
	ErrSignReserved     refusal.Error = "cannot sign for the trust domain itself"
	ErrSignNoAudience   refusal.Error = "cannot sign a JWT-SVID without audience"
	ErrSignLongAudience refusal.Error = "cannot sign a JWT-SVID with an audience of 64 KiB and more"
	ErrSignNegativeLife refusal.Error = "cannot sign for a negative lifetime"
)

// State is the state of a keyset.
type State int

// The states. The zero State is invalid.
const (
	Prepared State = iota + 1
	Active
	Tainted
)

var stateNames = map[State]string{Prepared: "PREPARED", Active: "ACTIVE", Tainted: "TAINTED"}

// String returns the state's name in upper case.
func (s State) String() string {
	if name, ok := stateNames[s]; ok {
		return name
	}
	return fmt.Sprintf("State(%d)", int(s))
}

// MarshalText returns the state's name; it fails for an invalid state.
func (s State) MarshalText() ([]byte, error) {
	if _, ok := stateNames[s]; !ok {
		return nil, fmt.Errorf("%v is not a keyset state", s)
	}
	return []byte(s.String()), nil
}

// UnmarshalText parses the result of MarshalText.
func (s *State) UnmarshalText(text []byte) error {
	for state, name := range stateNames {
		if name == string(text) {
			*s = state
			return nil
		}
	}
	return fmt.Errorf("%q is not a keyset state", text)
}

// Keyset describes one keyset, without its private keys.
type Keyset struct {
	ID    string `json:"id"` // ks_ and ten lower-case letters or digits
	State State  `json:"state"`
	// IssuedAt and ExpiresAt are UTC, in full seconds.
	IssuedAt  time.Time `json:"issued_at"`
	ExpiresAt time.Time `json:"expires_at"`
	// SteppedDownAt is when the keyset last stopped signing, because another
	// was activated by SteppedDownBy; zero and empty when it never signed, or
	// signs again.
	SteppedDownAt time.Time `json:"stepped_down_at,omitzero"`
	SteppedDownBy string    `json:"stepped_down_by,omitempty"`
	TaintedAt     time.Time `json:"tainted_at,omitzero"` // zero when it is not tainted
	// X509AuthorityID is the CA's subject key identifier in lower-case hex.
	X509AuthorityID string `json:"x509_authority_id"`
	// JWTKeyID is the key ID ("kid") of the JWT key.
	JWTKeyID string `json:"jwt_key_id"`
	// ValidFrom is the NotBefore of the CA certificate. It is not later than
	// IssuedAt: that of a successor is when its predecessor was issued, so that the
	// certificate is valid even if the clock was ahead when it was issued.
	ValidFrom time.Time `json:"valid_from"`
}
