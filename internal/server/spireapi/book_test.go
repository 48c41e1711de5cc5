package spireapi_test

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/renewd/renewd/internal/server/ledger"
)

// book is a ledger that writes down what it is told. What it is told to hand
// out goes through hold, which may wait or fail.
type book struct {
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

func newBook() *book {
	return &book{
		jwt: make(map[string]time.Time), reports: make(map[string]ledger.Report), applied: make(map[string]uint64),
		onBegin: func() {}, hold: func(context.Context) error { return nil },
	}
}

func (b *book) Begin() func() {
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

func (b *book) GiveX509(ctx context.Context, rows ...ledger.Row) error {
	if err := b.holding()(ctx); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls = append(b.calls, rows)
	return nil
}

func (b *book) GiveWith(ctx context.Context, r ledger.Row, store func(context.Context, func() ledger.Row) error) error {
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

func (b *book) GiveJWT(ctx context.Context, keyID string, expiresAt time.Time) error {
	if err := b.holding()(ctx); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.jwt[keyID] = expiresAt
	return nil
}

func (b *book) Report(ctx context.Context, agent string, r ledger.Report) error {
	if err := b.holding()(ctx); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.reports[agent] = r
	return nil
}

func (b *book) Applied(agent string, sequence uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.applied[agent] = sequence
}

func (b *book) Knows(agent string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if slices.Contains(b.gone, agent) {
		return false
	}
	return slices.ContainsFunc(slices.Concat(b.calls...), func(r ledger.Row) bool { return r.Agent == agent })
}

func (b *book) Gone(ctx context.Context, agent string) error {
	if err := b.holding()(ctx); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.gone = append(b.gone, agent)
	return nil
}

func (b *book) holding() func(context.Context) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.hold
}

func (b *book) set(hold func(ctx context.Context) error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.hold = hold
}

// state is how many calls are signing, and how many records there are.
func (b *book) state() (signing, records int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.begun, len(b.calls) + len(b.jwt)
}

// last returns the rows of the last call.
func (b *book) last() []ledger.Row {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.calls[len(b.calls)-1]
}
