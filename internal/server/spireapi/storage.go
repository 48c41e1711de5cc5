package spireapi

import (
	"context"
	"errors"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/server/ledger"
)

// ErrNotFound is returned for an agent, token or entry that does not exist.
var ErrNotFound = errors.New("not found")

// Agent is an attested node.
type Agent struct {
	ID   spiffeid.ID
	Type string // attestation type, such as "join_token"
	// Selectors describe the node, as its verifier found it at the last attestation;
	// they are sorted and each is there once. A join token gives none.
	Selectors []Selector `json:",omitempty"`
	// Reattestable is set when the agent has to attest again instead of renewing.
	Reattestable bool `json:",omitempty"`
	// Serial is the serial number (decimal) of the active SVID.
	Serial    string
	ExpiresAt time.Time
	// NextSerial is that of the SVID that RenewAgent issued last, which becomes
	// active with its first use; empty when there is none.
	NextSerial    string
	NextExpiresAt time.Time
	Banned        bool
	Version       string // as in the agent's last PostStatus
}

// Token is a join token, valid for one agent.
type Token struct {
	Value     string
	ExpiresAt time.Time
}

// Admission is the change in storage for an agent SVID that was signed.
type Admission struct {
	// Token is the join token that is spent; none when empty.
	Token string
	// Change receives a copy of the agent with ID, nil if there is none, and
	// returns the new one. An error refuses the admission.
	ID     spiffeid.ID
	Change func(*Agent) (*Agent, error)
	// Row returns the SVID's row in the ledger, which the same storage keeps. It is
	// called once and last, when only a failure of storage can refuse the
	// admission; the row counts in the ledger from then on.
	Row func() ledger.Row
}

// Storage keeps agents, join tokens and entries. It must be safe for concurrent
// use. A write is durable if its method returns nil, and has not happened
// otherwise, unless the method says more.
type Storage interface {
	// PutToken adds a join token.
	PutToken(ctx context.Context, t Token) error
	// Token returns a join token; ErrNotFound when there is none.
	Token(ctx context.Context, value string) (Token, error)
	// TakeToken deletes a join token and returns it; ErrNotFound when there is
	// none. Of several callers at most one gets it.
	TakeToken(ctx context.Context, value string) (Token, error)
	// Tokens returns all join tokens, in any order.
	Tokens(ctx context.Context) ([]Token, error)

	// Agent returns a copy of an agent; nil when there is none.
	Agent(ctx context.Context, id spiffeid.ID) (*Agent, error)
	// UpdateAgent calls change with a copy of the agent (nil if there is none),
	// stores the result (nil deletes) and returns a copy of it. This is one atomic
	// step. An error of change is returned unwrapped, and nothing is stored.
	UpdateAgent(ctx context.Context, id spiffeid.ID, change func(*Agent) (*Agent, error)) (*Agent, error)
	// Admit carries out an admission in one atomic step: it spends the token and
	// stores the agent and the row. It returns ErrNotFound if there is no such
	// token, and an error of Change unwrapped; nothing is stored then. After any
	// other error the step may have happened, for example if the last sync failed.
	Admit(ctx context.Context, a Admission) error
	// Agents returns copies of all agents, in any order.
	Agents(ctx context.Context) ([]Agent, error)

	// Entries returns all entries, in any order.
	Entries(ctx context.Context) ([]StoredEntry, error)
	// PutEntries stores and deletes entries in one atomic step. After an error the
	// step may have happened, for example if the last sync failed; Entries returns
	// the outcome.
	PutEntries(ctx context.Context, put []StoredEntry, remove []string) error
}
