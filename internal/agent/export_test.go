package agent

import "github.com/renewd/renewd/cache"

// Cache lets tests read what is held without going through the figures.
func (a *Agent) Cache() *cache.Cache { return a.cache }

// Ready is what /ready answers.
func (a *Agent) Ready() error { return a.ready() }

// Unsaved is what is not on disk as it should be.
func (a *Agent) Unsaved() map[string]error { return a.store.Unsaved() }
