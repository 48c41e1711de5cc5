package agent

import (
	"context"
	"errors"
	"time"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/agent/upstream"
)

const (
	// attestGrace is how long after an attestation the server may not know yet
	// which entries the node is authorized for: see longRemovalDelay.
	attestGrace = 3 * time.Minute
	// learnTime is how long it usually takes: SPIRE rebuilds its lists every 5 s.
	// Meanwhile an incomplete list is asked for again after learnInterval.
	learnTime     = 10 * time.Second
	learnInterval = 500 * time.Millisecond
)

// syncEntries keeps the cache's entries equal to the server's until ctx is
// done. It returns an error only when the server has banned the node.
func (a *Agent) syncEntries(ctx context.Context) error {
	list := newRoster(a.cfg.EntryRemovalDelay, a.cfg.RefreshInterval, a.cache.Entries())
	failing := false
	for {
		began := time.Now()
		answer, err := a.client.SyncEntries(ctx, list.entries)
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
			attested := time.Since(a.client.Attested())
			a.follow(list, answer, attested < attestGrace)
			if attested < learnTime && (!list.known || len(list.missing) > 0) {
				pause = learnInterval
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
}

// follow makes the cache follow one answer, and says when something begins to be
// missing from the answers, and when that is over.
func (a *Agent) follow(list *roster, answer upstream.EntryChanges, fresh bool) {
	missing, massive := len(list.missing), list.drop.massive
	v := list.take(answer, fresh, time.Now())
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
		a.log.Info("no entry missing any more", "returned", list.drop.returned, "removed", list.drop.removed)
	}
}
