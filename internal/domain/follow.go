package domain

import (
	"context"
	"log/slog"
	"time"

	"github.com/renewd/renewd/internal/keyset"
	"github.com/renewd/renewd/internal/operator"
	"github.com/renewd/renewd/internal/rotation"
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

func (dep *deployment) automatic() operator.Automatic {
	return operator.Automatic(dep.scheduler.Automatic())
}

// contactTime is within how long every agent that says anything has said it:
// they do so once a minute.
const contactTime = 3 * time.Minute

// facts are what automatic rotation has to know of a deployment.
type facts struct {
	d     *Domain
	dep   *deployment
	since time.Time // what was sure when the server was started
}

// Behind implements rotation.Facts. It counts the agents of all deployments:
// the workloads of each verify what the keyset is about to sign.
func (f *facts) Behind() int {
	behind := 0
	for _, dep := range f.d.deployments {
		if dep.serves() {
			behind += f.behind(dep)
		}
	}
	return behind
}

func (f *facts) behind(dep *deployment) int {
	agents, err := dep.server.Agents(context.Background())
	if err != nil {
		f.d.cfg.Log.Warn("agents could not be read: automatic rotation takes one for behind", "deployment", dep.Name, "error", err)
		return 1
	}
	// An agent counts as long as its SVID may be valid by any clock.
	now, sequence := f.d.clock.Sure(), f.d.Published().Sequence
	early := now.Sub(f.since) < contactTime
	behind := 0
	for _, a := range agents {
		if a.Banned || !now.Before(a.ExpiresAt) && !now.Before(a.NextExpiresAt) {
			continue
		}
		c, ok := dep.ledger.Contact(a.ID.String())
		says := ok && (c.Reports || c.Sequence > 0)
		if says && c.Sequence < sequence || !says && early {
			behind++
		}
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
