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
	// Hostname is that of the node, as the agent last reported it, and Label that of the
	// join token: by these operators recognize the node. Either may be empty.
	Hostname string `json:",omitempty"`
	Label    string `json:",omitempty"`
}

// Token is a join token, valid for one agent. It is kept for some time after it was spent
// or has expired, so that the refusal of another use says why.
type Token struct {
	Value     string
	ExpiresAt time.Time
	SpentAt   time.Time `json:",omitzero"` // zero: not spent
	// Label is what operators call the node; may be empty.
	Label string `json:",omitempty"`
}

// AuditRecord is a record of the audit log about one entry, join token or agent. Exactly
// one of Entry, Token and Agent is set.
type AuditRecord struct {
	At        time.Time
	Actor     string // see [keyset.WithActor]
	Operation string // one of the constants
	Note      string // see [keyset.WithNote]; often empty
	Entry     *EntryChange
	Token     *AuditToken
	Agent     *AgentChange
}

// The operations of an [AuditRecord].
const (
	AddEntry    = "add entry"
	ChangeEntry = "change entry"
	RemoveEntry = "remove entry"
	CreateToken = "create token"
	BanAgent    = "ban agent"
	EvictAgent  = "evict agent"
)

// AuditToken is a join token that was created, without the token itself.
type AuditToken struct {
	Label     string `json:",omitempty"`
	ExpiresAt time.Time
}

// AgentChange is an agent that was banned or evicted. The states are attested and banned;
// they are empty if there was or is no such agent.
type AgentChange struct {
	ID       string
	Hostname string `json:",omitempty"`
	Label    string `json:",omitempty"`
	Before   string `json:",omitempty"`
	After    string `json:",omitempty"`
	// Gone says that the operator has confirmed that the node no longer exists.
	Gone bool `json:",omitempty"`
}

// Admission is the change in storage for an agent SVID that was signed.
type Admission struct {
	// Token is the join token that is spent, at SpentAt; none when empty.
	Token   string
	SpentAt time.Time
	// Change receives a copy of the agent with ID, nil if there is none, and
	// returns the new one. An error refuses the admission.
	ID     spiffeid.ID
	Change func(*Agent) (*Agent, error)
	// Row returns the SVID's row in the ledger, which the same storage keeps. It is
	// called once and last, when only a failure of storage can refuse the
	// admission; the row counts in the ledger from then on.
	Row func() ledger.Row
}

// Storage keeps agents, join tokens, entries and the audit log. It must be safe for
// concurrent use. A write is durable if its method returns nil, and has not happened
// otherwise, unless the method says more. The records that a method is given are added to
// the audit log in the same step.
type Storage interface {
	// PutToken adds a join token.
	PutToken(ctx context.Context, t Token, audit ...*AuditRecord) error
	// Token returns a join token, spent or not; ErrNotFound when there is none.
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
	// step. An error of change is returned unwrapped, and nothing is stored. change may
	// complete the records, which are added even if the agent stays the same.
	UpdateAgent(ctx context.Context, id spiffeid.ID, change func(*Agent) (*Agent, error), audit ...*AuditRecord) (*Agent, error)
	// Admit carries out an admission in one atomic step: it spends the token and
	// stores the agent and the row. It returns ErrNotFound if there is no such
	// token or it is spent, and an error of Change unwrapped; nothing is stored then. After any
	// other error the step may have happened, for example if the last sync failed.
	Admit(ctx context.Context, a Admission) error
	// Agents returns copies of all agents, in any order.
	Agents(ctx context.Context) ([]Agent, error)

	// Entries returns all entries, in any order.
	Entries(ctx context.Context) ([]StoredEntry, error)
	// PutEntries stores and deletes entries in one atomic step. After an error the
	// step may have happened, for example if the last sync failed; Entries returns
	// the outcome.
	PutEntries(ctx context.Context, put []StoredEntry, remove []string, audit ...*AuditRecord) error
}
