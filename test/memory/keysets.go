// Package memory has storages in memory, for tests of what is above the store. The
// contract tests of package store compare them with it.
package memory

import (
	"context"
	"slices"
	"sync"

	"github.com/renewd/renewd/internal/server/keyset"
)

// Keysets is a [keyset.Storage], without audit log. The zero value is empty.
type Keysets struct {
	mu  sync.Mutex
	doc keyset.Document
}

// Load implements [keyset.Storage].
func (m *Keysets) Load(context.Context) (keyset.Document, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.doc
	d.Records = slices.Clone(d.Records)
	return d, nil
}

// Save implements [keyset.Storage].
func (m *Keysets) Save(_ context.Context, d keyset.Document, _ keyset.Change) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if d.Version != m.doc.Version+1 {
		return keyset.ErrConflict
	}
	d.Records = slices.Clone(d.Records)
	m.doc = d
	return nil
}
