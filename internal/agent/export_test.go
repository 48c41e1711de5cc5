package agent

import (
	"time"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/node"
)

// Cache returns the agent's cache.
func (a *Agent) Cache() *cache.Cache { return a.cache }

// Ready returns the answer of /ready.
func (a *Agent) Ready() error { return a.ready() }

// Unsaved returns the files of data_dir that are not saved, with the reasons.
func (a *Agent) Unsaved() map[string]error { return a.store.Unsaved() }

// SignerOf returns the ID of the authority that signed an agent SVID, looked up in b.
func SignerOf(id *node.Identity, b *bundle.Bundle) string {
	o := &agentSVID{trust: func() *bundle.Bundle { return b }, now: time.Now}
	return o.authorityLocked(id)
}
