package spireapi_test

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/renewd/renewd/internal/server/ledger"
)

// fakeLedger is a Ledger that remembers its calls. hold runs before each of them
// and may wait or fail.
type fakeLedger struct {
	mu      sync.Mutex
	begun   int // not ended yet
	calls   [][]ledger.Row
	jwt     map[string]time.Time
	reports map[string]ledger.Report
	applied map[string]uint64
	gone    []string

	onBegin func()
	hold    func(ctx context.Context) error
}

func newFakeLedger() *fakeLedger {
	return &fakeLedger{
		jwt: make(map[string]time.Time), reports: make(map[string]ledger.Report), applied: make(map[string]uint64),
		onBegin: func() {}, hold: func(context.Context) error { return nil },
	}
}

func (b *fakeLedger) Begin() func() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.onBegin()
	b.begun++
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.begun--
	}
}

func (b *fakeLedger) RecordX509(ctx context.Context, rows ...ledger.Row) error {
	if err := b.holding()(ctx); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls = append(b.calls, rows)
	return nil
}

func (b *fakeLedger) RecordWith(ctx context.Context, r ledger.Row, store func(context.Context, func() ledger.Row) error) error {
	if err := b.holding()(ctx); err != nil {
		return err
	}
	if err := store(ctx, func() ledger.Row { return r }); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls = append(b.calls, []ledger.Row{r})
	return nil
}

func (b *fakeLedger) RecordJWT(ctx context.Context, keyID string, expiresAt time.Time) error {
	if err := b.holding()(ctx); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.jwt[keyID] = expiresAt
	return nil
}

func (b *fakeLedger) Report(ctx context.Context, agent string, r ledger.Report) error {
	if err := b.holding()(ctx); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.reports[agent] = r
	return nil
}

func (b *fakeLedger) Applied(agent string, sequence uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.applied[agent] = sequence
}

func (b *fakeLedger) Knows(agent string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if slices.Contains(b.gone, agent) {
		return false
	}
	return slices.ContainsFunc(slices.Concat(b.calls...), func(r ledger.Row) bool { return r.Agent == agent })
}

func (b *fakeLedger) RemoveAgent(ctx context.Context, agent string) error {
	if err := b.holding()(ctx); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.gone = append(b.gone, agent)
	return nil
}

func (b *fakeLedger) holding() func(context.Context) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.hold
}

func (b *fakeLedger) set(hold func(ctx context.Context) error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.hold = hold
}

// state returns how many calls are signing, and how many records there are.
func (b *fakeLedger) state() (signing, records int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.begun, len(b.calls) + len(b.jwt)
}

// last returns the rows of the last call.
func (b *fakeLedger) last() []ledger.Row {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.calls[len(b.calls)-1]
}
