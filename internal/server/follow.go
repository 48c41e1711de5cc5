package server

import (
	"context"
	"log/slog"
	"time"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/rotation"
)

// pruneLedger deletes the ledger's rows of every keyset that is removed. Rows that it
// misses because the process ends expire.
func (dep *deployment) pruneLedger(ctx context.Context, log *slog.Logger) error {
	status := dep.keysets.Status()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-status.Changed:
		}
		before := status.Keysets
		status = dep.keysets.Status()
		left := make(map[string]bool, len(status.Keysets))
		for _, k := range status.Keysets {
			left[k.ID] = true
		}
		for _, k := range before {
			if left[k.ID] {
				continue
			}
			if err := dep.ledger.Removed(ctx, k.X509AuthorityID, k.JWTKeyID); err != nil && ctx.Err() == nil {
				log.Warn("ledger rows of a removed keyset not deleted, they stay until they expire", "deployment", dep.Name, "keyset_id", k.ID, "error", err)
			}
		}
	}
}

// pruneInterval is how long an expired entry may stay: less than under a SPIRE server, which
// deletes expired entries every 5 minutes.
const pruneInterval = time.Minute

// pruneEntries deletes expired entries.
func (dep *deployment) pruneEntries(ctx context.Context, log *slog.Logger) error {
	tick := time.NewTicker(pruneInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := dep.server.PruneEntries(ctx); err != nil && ctx.Err() == nil {
			log.Warn("expired entries not deleted, they are served", "deployment", dep.Name, "error", err, "delay", pruneInterval)
		}
	}
}

// facts implements [rotation.Facts] for a deployment.
type facts struct {
	d   *Domain
	dep *deployment
}

// Behind returns the number that operators see, too.
func (f *facts) Behind() int {
	behind, err := f.d.operator.AgentsBehind(context.Background())
	if err != nil {
		f.d.cfg.Log.Warn("agents not read, automatic rotation counts one as behind", "error", err)
		return 1
	}
	return behind
}

// Holding returns what the ledger knows of a keyset.
func (f *facts) Holding(k keyset.Keyset) rotation.Holding {
	tainted := k.State == keyset.Tainted
	x509 := f.dep.ledger.X509(k.X509AuthorityID, tainted)
	jwt, clear := f.dep.ledger.JWT(k.JWTKeyID, tainted)
	return rotation.Holding{Agents: x509.Agents, UnknownSince: x509.UnknownSince, X509Safe: x509.Clear, JWTSafe: clear, JWTExpiry: jwt}
}
