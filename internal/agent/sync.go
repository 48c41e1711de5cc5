package agent

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/agent/upstream"
)

const (
	// attestGrace is how long after an attestation the server's list of entries may
	// be incomplete: see longRemovalDelay.
	attestGrace = 3 * time.Minute
	// entryLag is how long it usually is incomplete: SPIRE rebuilds its lists every
	// 5 s. In that time an incomplete list is fetched every entryLagInterval.
	entryLag         = 10 * time.Second
	entryLagInterval = 500 * time.Millisecond
)

// syncEntries keeps the cache's entries equal to the server's until ctx is done. It
// returns an error only when the server has banned the node.
func (a *Agent) syncEntries(ctx context.Context) error {
	list := newRoster(a.cfg.EntryRemovalDelay, a.cfg.RefreshInterval, a.cache.Entries())
	for {
		began := time.Now()
		answer, err := a.client.SyncEntries(ctx, list.entries)
		if ctx.Err() != nil {
			return nil
		}
		a.metrics.Synced(time.Since(began), err)
		a.entrySyncs.record(err)
		pause := bundle.Jitter(a.cfg.RefreshInterval)
		switch {
		case errors.Is(err, upstream.ErrBanned):
			return err
		case err != nil:
			a.lines.Note(slog.LevelWarn, "entry sync failed, keeping the entries held", "entry sync", "error", err)
		default:
			a.lines.Over("entry sync", "entry sync recovered")
			attested := time.Since(a.client.Attested())
			a.applyAnswer(list, answer, attested < attestGrace)
			if attested < entryLag && (!list.known || len(list.missing) > 0) {
				pause = entryLagInterval
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
}

// applyAnswer updates the cache from one answer, and logs when entries begin to be
// missing from the answers and when none is.
func (a *Agent) applyAnswer(list *roster, answer upstream.EntryChanges, recentlyAttested bool) {
	missing, massive := len(list.missing), list.drop.massive
	v := list.apply(answer, recentlyAttested, time.Now())
	if list.known && (len(v.upsert)+len(v.gone) > 0 || !a.cache.Ready()) {
		a.cache.Update(v.upsert, v.gone)
		if a.cache.BundlesPending() {
			a.refresher.Refresh()
		}
		a.log.Info("entries synced", "changed", len(v.upsert), "deleted", len(v.gone), "entries", len(list.entries))
	}
	a.cache.SetMissing(true, v.missing...)
	a.cache.SetMissing(false, v.back...)
	switch now := len(list.missing); {
	case now > 0 && (missing == 0 || list.drop.massive && !massive):
		level := a.log.Info
		if list.drop.massive {
			level = a.log.Warn
		}
		level("entries missing from the server's answer, still served", "missing", now, "older", v.older, "entries", len(list.entries))
	case now == 0 && missing > 0:
		a.log.Info("no entries missing", "returned", list.drop.returned, "removed", list.drop.removed)
	}
}
