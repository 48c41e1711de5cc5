// Package runbook is the operator's side of a keyset rotation: the steps, what
// they print, and the true answer to "is it safe to remove now?". It knows a
// signing server only as a [Backend], so that the same commands work on
// renewd's own server, on a SPIRE server, and in the demo.
package runbook

import (
	"context"
	"time"
)

// State of a keyset, as the runbook's list prints it.
type State string

// The states.
const (
	Prepared State = "Prepared"
	Active   State = "Active"
	Tainted  State = "Tainted"
)

// Status is one deployment at one moment.
type Status struct {
	TrustDomain string   `json:"trust_domain"`
	Deployment  string   `json:"deployment"`
	Keysets     []Keyset `json:"keysets"` // in order of issue
	// Sequence is the number of the published bundle; Agents are those that are
	// expected to apply it and AgentsBehind those that have not said so. A
	// negative number is not known.
	Sequence     uint64 `json:"sequence"`
	Agents       int    `json:"agents"`
	AgentsBehind int    `json:"agents_behind"`
	// Duplicated are the IDs of agents whose identity two processes use, such as those
	// of a node and its clone: what they say frees no keyset.
	Duplicated []string `json:"agents_duplicated,omitempty"`
	// Automatic says what automatic rotation is about to do; empty where there
	// is none.
	Automatic string `json:"automatic,omitempty"`
	// ClockDoubt says why the server's clock is in doubt and what follows from that;
	// empty where it is not, or where that is not known.
	ClockDoubt string `json:"clock_doubt,omitempty"`
}

// Keyset is one X.509 and one JWT key, rotated together.
type Keyset struct {
	ID              string    `json:"id"`
	State           State     `json:"state"`
	IssuedAt        time.Time `json:"issued_at,omitzero"` // zero: not known
	ExpiresAt       time.Time `json:"expires_at,omitzero"`
	X509AuthorityID string    `json:"x509_authority_id"` // empty: the X.509 key is missing
	JWTKeyID        string    `json:"jwt_key_id"`        // empty: the JWT key is missing
	// JWTState differs from State where the two keys could be moved one without
	// the other and were; empty otherwise.
	JWTState State `json:"jwt_state,omitempty"`
	// SteppedDown: it has signed, and another was activated after it; false
	// where that is not known.
	SteppedDown bool      `json:"stepped_down,omitempty"`
	TaintedAt   time.Time `json:"tainted_at,omitzero"`

	// X509SVIDs counts the live X.509-SVIDs that it signed; negative: not known.
	X509SVIDs int       `json:"x509_svids"`
	JWTExpiry time.Time `json:"jwt_latest_expiry,omitzero"` // of the last JWT-SVID; zero: none or not known
	X509Safe  bool      `json:"x509_safe"`
	JWTSafe   bool      `json:"jwt_safe"`
	// Unknown says why the figures are not to be had; empty when they are.
	Unknown string `json:"unknown,omitempty"`
}

// Holder is an agent that could still hold X.509-SVIDs of a keyset.
type Holder struct {
	Agent        string    `json:"agent"` // SPIFFE ID, or what else names it; empty where it is not known
	Version      string    `json:"version,omitempty"`
	SVIDs        int       `json:"svids"`
	Streams      int       `json:"streams"`
	Reason       string    `json:"reason"` // silent, unidentified, duplicated, behind, waiting, renewing, streams, signing, restored
	LatestExpiry time.Time `json:"latest_expiry,omitzero"`
	LastReport   time.Time `json:"last_report,omitzero"` // of "restored": when the copy was taken
	BeginsAt     time.Time `json:"begins_at,omitzero"`
	Rate         float64   `json:"rate,omitempty"`
}

// Backend is a signing server as an operator uses it, for one deployment. The
// mutations return when the new state is durable and published, and are never
// retried by anybody.
type Backend interface {
	Status(ctx context.Context) (Status, error)
	// Holders returns who still hangs on the keyset's X.509 key.
	Holders(ctx context.Context, id string) ([]Holder, error)
	Prepare(ctx context.Context) (Keyset, error)
	Activate(ctx context.Context, id string) error
	Taint(ctx context.Context, id string) error
	// Remove refuses what is not safe, with a [NotSafeError], unless force is set.
	Remove(ctx context.Context, id string, force bool) error
}
