package ledger_test

import (
	"context"
	"maps"
	"sync"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/server/ledger"
)

// key identifies a row in storage.
type key struct{ authority, agent, entry string }

// memory is a Storage whose saves a test can inspect, block and make fail.
type memory struct {
	mu    sync.Mutex
	rows  map[key]time.Time
	jwt   map[string]time.Time
	saves int
	// hook is called in SaveLedger, before and after the change is stored; its
	// error is that of the save.
	hook func(c ledger.Change, stored bool) error
}

func newMemory() *memory {
	return &memory{rows: map[key]time.Time{}, jwt: map[string]time.Time{}}
}

func (m *memory) LoadLedger(_ context.Context, row func(ledger.Row)) (map[string]time.Time, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for k, notAfter := range m.rows {
		row(ledger.Row{Authority: k.authority, Agent: k.agent, Entry: k.entry, NotAfter: notAfter})
	}
	return maps.Clone(m.jwt), nil
}

func (m *memory) SaveLedger(_ context.Context, c ledger.Change) error {
	if m.hook != nil {
		if err := m.hook(c, false); err != nil {
			return err
		}
	}
	m.mu.Lock()
	m.saves++
	for _, r := range c.Put {
		m.rows[key{r.Authority, r.Agent, r.Entry}] = r.NotAfter
	}
	for _, r := range c.Gone {
		delete(m.rows, key{r.Authority, r.Agent, r.Entry})
	}
	for id, at := range c.JWT {
		if at.IsZero() {
			delete(m.jwt, id)
		} else {
			m.jwt[id] = at
		}
	}
	m.mu.Unlock()
	if m.hook != nil {
		return m.hook(c, true)
	}
	return nil
}

func (m *memory) has(authority, agent, entry string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, ok := m.rows[key{authority, agent, entry}]
	return ok
}

func (m *memory) count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.rows)
}

func open(t testing.TB, s ledger.Storage, now func() time.Time) *ledger.Ledger {
	t.Helper()
	if s == nil {
		s = newMemory()
	}
	l, err := ledger.Open(t.Context(), ledger.Config{Storage: s, Clock: clock.New(now, nil, time.Time{})})
	check(t, err)
	return l
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func row(authority, agent, entry string, notAfter time.Time) ledger.Row {
	return ledger.Row{Authority: authority, Agent: agent, Entry: entry, NotAfter: notAfter}
}

// says returns a report on one tainted authority.
func says(authority string, pending, streams int, settled bool) ledger.Report {
	return ledger.Report{Sequence: 7, Rate: 20, Authorities: []ledger.AuthorityReport{
		{Authority: authority, Tainted: true, Pending: pending, Streams: streams, Settled: settled},
	}}
}
