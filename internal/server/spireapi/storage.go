package spireapi

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/server/ledger"
)

// ErrNotFound is returned for an agent, token or entry that does not exist.
var ErrNotFound = errors.New("not found")

// Agent is an attested node.
type Agent struct {
	ID   spiffeid.ID
	Type string // attestation type: "join_token"
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

// Memory is a Storage in memory.
type Memory struct {
	mu      sync.Mutex
	tokens  map[string]Token
	agents  map[spiffeid.ID]Agent
	entries map[string]StoredEntry
}

// NewMemory makes an empty Memory.
func NewMemory() *Memory {
	return &Memory{
		tokens:  make(map[string]Token),
		agents:  make(map[spiffeid.ID]Agent),
		entries: make(map[string]StoredEntry),
	}
}

// PutToken implements Storage.
func (m *Memory) PutToken(_ context.Context, t Token) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.tokens[t.Value] = t
	return nil
}

// Token implements Storage.
func (m *Memory) Token(_ context.Context, value string) (Token, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	t, ok := m.tokens[value]
	if !ok {
		return Token{}, ErrNotFound
	}
	return t, nil
}

// TakeToken implements Storage.
func (m *Memory) TakeToken(_ context.Context, value string) (Token, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	t, ok := m.tokens[value]
	if !ok {
		return Token{}, ErrNotFound
	}
	delete(m.tokens, value)
	return t, nil
}

// Tokens implements Storage.
func (m *Memory) Tokens(context.Context) ([]Token, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Collect(maps.Values(m.tokens)), nil
}

// Agent implements Storage.
func (m *Memory) Agent(_ context.Context, id spiffeid.ID) (*Agent, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.agentLocked(id), nil
}

// UpdateAgent implements Storage.
func (m *Memory) UpdateAgent(_ context.Context, id spiffeid.ID, change func(*Agent) (*Agent, error)) (*Agent, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	a, err := change(m.agentLocked(id))
	if err != nil {
		return nil, err
	}
	m.putAgentLocked(id, a)
	return m.agentLocked(id), nil
}

// Admit implements Storage. The ledger keeps the row.
func (m *Memory) Admit(_ context.Context, a Admission) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.tokens[a.Token]; !ok && a.Token != "" {
		return ErrNotFound
	}
	agent, err := a.Change(m.agentLocked(a.ID))
	if err != nil {
		return err
	}
	a.Row()
	delete(m.tokens, a.Token)
	m.putAgentLocked(a.ID, agent)
	return nil
}

// Agents implements Storage.
func (m *Memory) Agents(context.Context) ([]Agent, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Collect(maps.Values(m.agents)), nil
}

func (m *Memory) putAgentLocked(id spiffeid.ID, a *Agent) {
	if a == nil {
		delete(m.agents, id)
		return
	}
	m.agents[id] = *a
}

func (m *Memory) agentLocked(id spiffeid.ID) *Agent {
	a, ok := m.agents[id]
	if !ok {
		return nil
	}
	return &a
}

// Entries implements Storage.
func (m *Memory) Entries(context.Context) ([]StoredEntry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Collect(maps.Values(m.entries)), nil
}

// PutEntries implements Storage.
func (m *Memory) PutEntries(_ context.Context, put []StoredEntry, remove []string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, e := range put {
		m.entries[e.ID] = e
	}
	for _, id := range remove {
		delete(m.entries, id)
	}
	return nil
}
