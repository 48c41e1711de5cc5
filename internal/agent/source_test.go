package agent_test

import (
	"context"
	"slices"
	"sync"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/agent/bootstrap"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/test/memory"
)

// source is an [agent.TrustSource] with an answer, or an error.
type source struct {
	mu     sync.Mutex
	bundle *bundle.Bundle
	err    error
	asked  []bootstrap.Request
}

func (s *source) Fetch(_ context.Context, r bootstrap.Request) (*bundle.Bundle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = append(s.asked, r)
	return s.bundle, s.err
}

func (s *source) set(b *bundle.Bundle) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bundle, s.err = b, nil
}

func (s *source) requests() []bootstrap.Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.asked)
}

// otherTrust returns the bundle of another server.
func otherTrust(w *world) *bundle.Bundle {
	keys, err := keyset.Open(w.t.Context(), keyset.Config{TrustDomain: td, Storage: new(memory.Keysets)})
	w.check(err)
	var c bundle.Content
	for _, cert := range keys.Bundle().Certificates() {
		c.X509 = append(c.X509, bundle.X509Authority{Certificate: cert})
	}
	b, err := bundle.New(td, c)
	w.check(err)
	return b
}
