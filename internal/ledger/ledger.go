// Package ledger knows, for each agent and entry, which authority signed the
// X.509-SVIDs that it was given and until when, and answers from that what an
// operator must know before a key is removed: who could still hold an SVID
// of it.
//
// A row says that an agent could hold an SVID that an authority signed for an
// entry. It is written, durably, before the SVID is handed out, and goes in one
// of four ways: the SVID has expired; the agent, having seen that the authority is
// tainted, has reported that nothing on its node depends on it any more; the
// operator says that the node is gone; the authority was removed. That the agent
// was given a replacement is not enough: it may not have arrived, and the
// workloads may not have it yet. An agent that does not report is therefore
// counted until its SVIDs expire.
//
// What is true of an authority follows from the rows and the last reports at
// every moment; there is no list of waves that are over.
package ledger

import (
	"context"
	"time"
)

// Row says that an agent could hold an X.509-SVID. Entry is empty for the
// agent's own.
type Row struct {
	Authority string // X.509 authority ID
	Agent     string // SPIFFE ID
	Entry     string // entry ID
	NotAfter  time.Time
}

// Change is what a [Storage] keeps in one atomic step. Of two rows with the
// same Authority, Agent and Entry the later one replaces the earlier.
type Change struct {
	Put  []Row
	Gone []Row                // NotAfter does not matter
	JWT  map[string]time.Time // latest expiry by key ID; zero deletes
}

// Storage keeps the ledger. It must be safe for concurrent use.
type Storage interface {
	// LoadLedger hands every row to row, in any order, and returns the latest
	// expiry of JWT-SVIDs by key ID.
	LoadLedger(ctx context.Context, row func(Row)) (jwt map[string]time.Time, err error)
	// SaveLedger returns when the change is durable. Concurrent calls may
	// share one commit.
	SaveLedger(ctx context.Context, c Change) error
}
