package memory

import (
	"context"
	"maps"
	"slices"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/server/spireapi"
)

// Server is a [spireapi.Storage].
type Server struct {
	mu      sync.Mutex
	tokens  map[string]spireapi.Token
	agents  map[spiffeid.ID]spireapi.Agent
	entries map[string]spireapi.StoredEntry
	audit   []spireapi.AuditRecord
}

// Audit returns the records of the audit log, in order.
func (m *Server) Audit() []spireapi.AuditRecord {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.audit)
}

func (m *Server) addAuditLocked(records []*spireapi.AuditRecord) {
	for _, r := range records {
		m.audit = append(m.audit, *r)
	}
}

// NewServer makes an empty Server.
func NewServer() *Server {
	return &Server{
		tokens:  make(map[string]spireapi.Token),
		agents:  make(map[spiffeid.ID]spireapi.Agent),
		entries: make(map[string]spireapi.StoredEntry),
	}
}

// PutToken implements [spireapi.Storage].
func (m *Server) PutToken(_ context.Context, t spireapi.Token, audit ...*spireapi.AuditRecord) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.tokens[t.Value] = t
	m.addAuditLocked(audit)
	return nil
}

// Token implements [spireapi.Storage].
func (m *Server) Token(_ context.Context, value string) (spireapi.Token, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	t, ok := m.tokens[value]
	if !ok {
		return spireapi.Token{}, spireapi.ErrNotFound
	}
	return t, nil
}

// TakeToken implements [spireapi.Storage].
func (m *Server) TakeToken(_ context.Context, value string) (spireapi.Token, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	t, ok := m.tokens[value]
	if !ok {
		return spireapi.Token{}, spireapi.ErrNotFound
	}
	delete(m.tokens, value)
	return t, nil
}

// Tokens implements [spireapi.Storage].
func (m *Server) Tokens(context.Context) ([]spireapi.Token, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Collect(maps.Values(m.tokens)), nil
}

// Agent implements [spireapi.Storage].
func (m *Server) Agent(_ context.Context, id spiffeid.ID) (*spireapi.Agent, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.agentLocked(id), nil
}

// UpdateAgent implements [spireapi.Storage].
func (m *Server) UpdateAgent(_ context.Context, id spiffeid.ID, change func(*spireapi.Agent) (*spireapi.Agent, error), audit ...*spireapi.AuditRecord) (*spireapi.Agent, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	a, err := change(m.agentLocked(id))
	if err != nil {
		return nil, err
	}
	m.putAgentLocked(id, a)
	m.addAuditLocked(audit)
	return m.agentLocked(id), nil
}

// Admit implements [spireapi.Storage]. The ledger keeps the row.
func (m *Server) Admit(_ context.Context, a spireapi.Admission) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	t, ok := m.tokens[a.Token]
	if a.Token != "" && (!ok || !t.SpentAt.IsZero()) {
		return spireapi.ErrNotFound
	}
	agent, err := a.Change(m.agentLocked(a.ID))
	if err != nil {
		return err
	}
	a.Row()
	if ok {
		t.SpentAt = a.SpentAt
		m.tokens[a.Token] = t
	}
	m.putAgentLocked(a.ID, agent)
	return nil
}

// Agents implements [spireapi.Storage].
func (m *Server) Agents(context.Context) ([]spireapi.Agent, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Collect(maps.Values(m.agents)), nil
}

func (m *Server) putAgentLocked(id spiffeid.ID, a *spireapi.Agent) {
	if a == nil {
		delete(m.agents, id)
		return
	}
	m.agents[id] = *a
}

func (m *Server) agentLocked(id spiffeid.ID) *spireapi.Agent {
	a, ok := m.agents[id]
	if !ok {
		return nil
	}
	return &a
}

// Entries implements [spireapi.Storage].
func (m *Server) Entries(context.Context) ([]spireapi.StoredEntry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Collect(maps.Values(m.entries)), nil
}

// PutEntries implements [spireapi.Storage].
func (m *Server) PutEntries(_ context.Context, put []spireapi.StoredEntry, remove []string, audit ...*spireapi.AuditRecord) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.addAuditLocked(audit)
	for _, e := range put {
		m.entries[e.ID] = e
	}
	for _, id := range remove {
		delete(m.entries, id)
	}
	return nil
}
