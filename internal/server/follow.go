package server

import (
	"context"
	"log/slog"

	"github.com/renewd/renewd/internal/server/admin"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/rotation"
)

// follow drops what the ledger knows of keysets that are removed, whoever
// removes them. What it misses when the process dies expires by itself.
func (dep *deployment) follow(ctx context.Context, log *slog.Logger) error {
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
				log.Warn("the ledger still has rows of a removed keyset, until they expire", "deployment", dep.Name, "keyset", k.ID, "error", err)
			}
		}
	}
}

func (dep *deployment) automatic() admin.Automatic {
	return admin.Automatic(dep.scheduler.Automatic())
}

// facts are what automatic rotation has to know of a deployment.
type facts struct {
	d   *Domain
	dep *deployment
}

// Behind implements rotation.Facts. Operators are told the same.
func (f *facts) Behind() int {
	behind, err := f.d.operator.AgentsBehind(context.Background())
	if err != nil {
		f.d.cfg.Log.Warn("agents could not be read: automatic rotation takes one for behind", "error", err)
		return 1
	}
	return behind
}

// Holding implements rotation.Facts.
func (f *facts) Holding(k keyset.Keyset) rotation.Holding {
	tainted := k.State == keyset.Tainted
	x509 := f.dep.ledger.X509(k.X509AuthorityID, tainted)
	jwt, clear := f.dep.ledger.JWT(k.JWTKeyID, tainted)
	return rotation.Holding{Agents: x509.Agents, UnknownSince: x509.UnknownSince, X509Safe: x509.Clear, JWTSafe: clear, JWTExpiry: jwt}
}
