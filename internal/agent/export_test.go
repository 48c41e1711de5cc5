package agent

import (
	"time"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/node"
)

// Cache lets tests read what is held without going through the figures.
func (a *Agent) Cache() *cache.Cache { return a.cache }

// Ready is what /ready answers.
func (a *Agent) Ready() error { return a.ready() }

// Unsaved is what is not on disk as it should be.
func (a *Agent) Unsaved() map[string]error { return a.store.Unsaved() }

// SignerOf is the authority that an agent SVID counts for under a bundle.
func SignerOf(id *node.Identity, b *bundle.Bundle) string {
	o := &own{trust: func() *bundle.Bundle { return b }, now: time.Now}
	return o.authority(id)
}
