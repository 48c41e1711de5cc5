package agent

import (
	"context"
	"errors"
	"time"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/upstream"
)

const (
	// settling is how long after a fresh attestation the server may not yet
	// know which entries the node is authorized for: SPIRE rebuilds that every
	// 5 s. Until then its answers add entries but take none away.
	settling = 10 * time.Second
	// settlingInterval is the pause between syncs meanwhile.
	settlingInterval = 500 * time.Millisecond
)

// syncEntries keeps the cache's entries equal to the server's until ctx is
// done. It returns an error only when the server has banned the node.
func (a *Agent) syncEntries(ctx context.Context) error {
	have := a.cache.Revisions() // from here on kept by the answers
	failing := false
	for {
		// An attestation during the sync concerns the next one.
		attested := a.client.Attested()
		began := time.Now()
		upsert, gone, err := a.client.SyncEntries(ctx, have)
		if ctx.Err() != nil {
			return nil
		}
		a.metrics.Synced(time.Since(began), err)
		a.syncs.note(err)
		pause := bundle.Jitter(a.cfg.RefreshInterval)
		switch {
		case errors.Is(err, upstream.ErrBanned):
			return err
		case err != nil:
			level := a.log.Debug
			if !failing {
				failing, level = true, a.log.Warn
			}
			level("entry sync failed, keeping the entries held", "error", err)
		default:
			if failing {
				failing = false
				a.log.Info("entry sync works again")
			}
			fresh := time.Since(attested) < settling
			if fresh && (len(gone) > 0 || len(have)+len(upsert) == 0) {
				gone, pause = nil, settlingInterval
				if len(have)+len(upsert) == 0 {
					break // not even known to be synced
				}
			}
			// An entry that was replaced by another of the same ID is in both.
			for _, id := range gone {
				delete(have, id)
			}
			for _, e := range upsert {
				have[e.ID] = e.Revision
			}
			if len(upsert)+len(gone) > 0 || !a.cache.Ready() {
				a.cache.Update(upsert, gone)
				if a.cache.Unheard() {
					a.refresher.Refresh()
				}
				a.log.Info("entries synced", "changed", len(upsert), "deleted", len(gone), "entries", len(have))
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
}
