// Package runbook carries out a keyset rotation for an operator: it runs the
// steps, prints their results and answers whether a keyset is safe to remove.
// It reaches a signing server only through a [Backend], so that the same commands
// work with renewd's server, with a SPIRE server and in the demo.
package runbook

import (
	"context"
	"time"
)

// State is the state of a keyset, as list prints it.
type State string

// The states.
const (
	Prepared State = "Prepared"
	Active   State = "Active"
	Tainted  State = "Tainted"
)

// Status describes one deployment at one moment.
type Status struct {
	TrustDomain string   `json:"trust_domain"`
	Deployment  string   `json:"deployment"`
	Keysets     []Keyset `json:"keysets"` // in order of issue
	// Sequence is the sequence number of the published bundle. Agents counts the agents
	// that are expected to apply it, AgentsBehind those that have not reported
	// that they did. A negative count is not known.
	Sequence     uint64 `json:"sequence"`
	Agents       int    `json:"agents"`
	AgentsBehind int    `json:"agents_behind"`
	// Duplicated are the SPIFFE IDs that two agents use, as on a node and its clone.
	// Their reports make no keyset safe to remove.
	Duplicated []string `json:"agents_duplicated,omitempty"`
	// Behind names agents that AgentsBehind counts, at most 100 of them.
	Behind []Holder `json:"behind,omitempty"`
	// ServerStartedAt is the start of the server, which keeps no reports over a restart.
	// It is zero if that is not known.
	ServerStartedAt time.Time `json:"server_started_at,omitzero"`
	// Evict is the command that evicts an agent, and EvictGone one whose node no longer
	// exists, with ID for the agent's ID.
	Evict, EvictGone string `json:"-"`
	// Automatic describes the next step of automatic rotation. It is empty if the
	// server has none.
	Automatic string `json:"automatic,omitempty"`
	// ClockDoubt says why the server's clock is in doubt and what follows. It is
	// empty if the clock is not in doubt, or if the server cannot know.
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
	// JWTState is set if the JWT key is in another state than the X.509 key.
	JWTState State `json:"jwt_state,omitempty"`
	// SteppedDown says that the keyset has signed, and that another was activated since.
	// It is false if that is not known.
	SteppedDown bool      `json:"stepped_down,omitempty"`
	TaintedAt   time.Time `json:"tainted_at,omitzero"`

	// X509SVIDs counts the X.509-SVIDs in use that it signed; negative: not known.
	X509SVIDs int       `json:"x509_svids"`
	JWTExpiry time.Time `json:"jwt_latest_expiry,omitzero"` // of the last JWT-SVID; zero: none or not known
	X509Safe  bool      `json:"x509_safe"`
	JWTSafe   bool      `json:"jwt_safe"`
	// Unknown says why the figures are not known. It is empty if they are.
	Unknown string `json:"unknown,omitempty"`
	// Unknowable says that no wait makes the figures known. Unknown has the remedy.
	Unknowable bool `json:"-"`
}

// Holder is an agent that may still hold X.509-SVIDs of a keyset.
type Holder struct {
	Agent        string    `json:"agent"` // SPIFFE ID, or another name; empty: not known
	Version      string    `json:"version,omitempty"`
	Hostname     string    `json:"hostname,omitempty"` // as the agent reports it
	Label        string    `json:"label,omitempty"`    // of its join token
	SVIDs        int       `json:"svids"`
	Streams      int       `json:"streams"`
	Reason       string    `json:"reason"` // silent, unidentified, duplicated, behind, waiting, renewing, streams, settling, signing, restored
	LatestExpiry time.Time `json:"latest_expiry,omitzero"`
	LastReport   time.Time `json:"last_report,omitzero"` // for the reason restored: the time of the backup
	BeginsAt     time.Time `json:"begins_at,omitzero"`
	Rate         float64   `json:"rate,omitempty"`
}

// Backend is one deployment of a signing server, as an operator uses it. A
// mutation returns when the new state is durable and published. Neither a Backend
// nor its callers retry a mutation. Callers repeat a read, unless its error is a
// [PermanentError].
type Backend interface {
	Status(ctx context.Context) (Status, error)
	// Holders returns the agents that may still depend on the keyset's X.509 key.
	Holders(ctx context.Context, id string) ([]Holder, error)
	Prepare(ctx context.Context) (Keyset, error)
	Activate(ctx context.Context, id string) error
	Taint(ctx context.Context, id string) error
	// Remove returns a [NotSafeError] if removal is not safe and force is not set.
	Remove(ctx context.Context, id string, force bool) error
}
