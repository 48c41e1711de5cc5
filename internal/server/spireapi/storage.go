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

// ErrNotFound is returned for an agent, token or entry that is not there.
var ErrNotFound = errors.New("not found")

// Agent is an attested node.
type Agent struct {
	ID   spiffeid.ID
	Type string // how it proved itself: "join_token"
	// Serial is the serial number (decimal) of the SVID that is accepted.
	Serial    string
	ExpiresAt time.Time
	// NextSerial is that of the SVID given out last by RenewAgent, which takes
	// over with its first use; empty when there is none.
	NextSerial    string
	NextExpiresAt time.Time
	Banned        bool
	Version       string // as the agent posted it
}

// Token is a join token, good for one agent.
type Token struct {
	Value     string
	ExpiresAt time.Time
}

// Admission is what an agent's own SVID changes in storage.
type Admission struct {
	// Token is the join token that is spent with it; none when empty.
	Token string
	// Change is called with a copy of the agent of ID (nil when there is none) and
	// returns what it is from now on. An error refuses the admission.
	ID     spiffeid.ID
	Change func(*Agent) (*Agent, error)
	// Row returns the SVID's row in the ledger, which the same storage keeps. It is
	// called once, last, when nothing speaks against the admission any more; the
	// ledger knows of the row from then on.
	Row func() ledger.Row
}

// Storage keeps what must outlive the process. It must be safe for concurrent
// use. A write has happened, durably, when its method returns nil, and has not
// otherwise.
type Storage interface {
	// PutToken adds a join token.
	PutToken(ctx context.Context, t Token) error
	// Token returns a join token; ErrNotFound when there is none.
	Token(ctx context.Context, value string) (Token, error)
	// TakeToken deletes a join token and returns it; ErrNotFound when there is
	// none. Of several callers one at most gets it.
	TakeToken(ctx context.Context, value string) (Token, error)
	// Tokens returns all join tokens, in any order.
	Tokens(ctx context.Context) ([]Token, error)

	// Agent returns a copy of an agent; nil when there is none.
	Agent(ctx context.Context, id spiffeid.ID) (*Agent, error)
	// UpdateAgent hands change a copy of the agent (nil when there is none),
	// stores what it returns (nil deletes) and returns a copy of that. Read
	// and write are one atomic step. An error of change is returned as it is,
	// with nothing stored.
	UpdateAgent(ctx context.Context, id spiffeid.ID, change func(*Agent) (*Agent, error)) (*Agent, error)
	// Admit stores an admission in one atomic step: spends the token, stores the
	// agent and the row. It returns ErrNotFound when there is no such token, and an
	// error of Change as it is, with nothing stored. With any other error the step
	// may have happened all the same, as after the last sync of a disk failed.
	Admit(ctx context.Context, a Admission) error
	// Agents returns copies of all agents, in any order.
	Agents(ctx context.Context) ([]Agent, error)

	// Entries returns all entries, in any order.
	Entries(ctx context.Context) ([]StoredEntry, error)
	// PutEntries stores and deletes entries in one atomic step. When it fails the
	// step may have happened all the same, as after the last sync of a disk
	// failed: Entries tells.
	PutEntries(ctx context.Context, put []StoredEntry, gone []string) error
}

// Memory is a Storage that ends with the process.
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
	return m.agent(id), nil
}

// UpdateAgent implements Storage.
func (m *Memory) UpdateAgent(_ context.Context, id spiffeid.ID, change func(*Agent) (*Agent, error)) (*Agent, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	a, err := change(m.agent(id))
	if err != nil {
		return nil, err
	}
	m.putAgent(id, a)
	return m.agent(id), nil
}

// Admit implements Storage. The row is the ledger's to remember.
func (m *Memory) Admit(_ context.Context, a Admission) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.tokens[a.Token]; !ok && a.Token != "" {
		return ErrNotFound
	}
	agent, err := a.Change(m.agent(a.ID))
	if err != nil {
		return err
	}
	a.Row()
	delete(m.tokens, a.Token)
	m.putAgent(a.ID, agent)
	return nil
}

// Agents implements Storage.
func (m *Memory) Agents(context.Context) ([]Agent, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Collect(maps.Values(m.agents)), nil
}

func (m *Memory) putAgent(id spiffeid.ID, a *Agent) {
	if a == nil {
		delete(m.agents, id)
		return
	}
	m.agents[id] = *a
}

func (m *Memory) agent(id spiffeid.ID) *Agent {
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
func (m *Memory) PutEntries(_ context.Context, put []StoredEntry, gone []string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, e := range put {
		m.entries[e.ID] = e
	}
	for _, id := range gone {
		delete(m.entries, id)
	}
	return nil
}
