package agent

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/node"
	"github.com/renewd/renewd/metrics"
	"github.com/renewd/renewd/renew/wave"
)

// overdue is how far past its half-life an SVID counts as expiring.
const overdue = time.Minute

// State is what the agent knows at this moment: what metrics export and the
// demo shows. It may be called at any time, from any goroutine.
//
// The order of reads makes "settled" safe: first the calls in flight, then the
// agent SVID, then the cache, then the files. Whatever moves meanwhile moves from the
// one to the other and is seen in at least one of them.
func (a *Agent) State() metrics.State {
	snapshot := a.cache.Bundle()
	inFlight := make(map[string]int)
	if snapshot != nil {
		for _, x := range snapshot.Own.X509() {
			if x.Tainted {
				inFlight[x.ID] = a.renewer.InFlight(x.ID, x.TaintedSince)
			}
		}
	}
	attesting := a.node.Signing()
	own := a.own.Held()
	usages := a.cache.Authorities()
	unanswered := a.cache.Unanswered()
	_, _, late := a.cache.Counts(overdue)

	s := metrics.State{
		Expiring:  map[string]int{metrics.TypeX509: late},
		JWTExpiry: a.cache.JWTExpiry(),
		Streams:   a.streams.counts(),
		ClockLag:  a.renewer.ClockLag(),
		Unsaved:   make(map[string]bool),
		SVIDs:     make(map[string]int),

		EntriesMissing: a.cache.CountMissing(),
	}
	for state, n := range a.renewer.States() {
		s.SVIDs[state.String()] = n
	}
	unsaved := a.store.Unsaved()
	for _, file := range node.Files {
		s.Unsaved[file] = unsaved[file] != nil
	}
	if own != nil {
		s.OwnID, s.OwnExpiry = own.ID.String(), own.NotAfter
	}
	if snapshot == nil {
		return s
	}
	if at := a.applied.Load(); at != nil {
		s.BundleApplied, s.BundleSequence = *at, snapshot.Own.Sequence()
	}
	s.LeftOut = leftOut(snapshot)
	newest, now := a.cache.Newest(), a.cfg.Now()
	for _, u := range usages {
		s.Authorities = append(s.Authorities, metrics.Authority{
			Type: metrics.TypeX509, ID: u.Authority, Held: u.Held, Streams: u.Streams,
		})
	}
	for _, x := range snapshot.Own.X509() {
		authority(&s, metrics.TypeX509, x.ID)
	}
	for i := range s.Authorities {
		auth := &s.Authorities[i]
		trust, _ := snapshot.State(auth.ID)
		if trust == bundle.Trusted {
			auth.State = authorityState(trust, auth.ID == newest.X509, false)
			continue
		}
		// Everything held of such an authority is due, and so is an answer that
		// the server may have signed before it knew.
		auth.Pending = auth.Held + inFlight[auth.ID] + attesting
		// A workload that has come back and was not answered yet has what a stream
		// of the process before sent it.
		auth.Streams += unanswered
		if own != nil && own.Authority == auth.ID && own.NotAfter.After(now) {
			auth.Pending++
		}
		// What is kept for a restart could be held again after it.
		kept := a.own.stored(auth.ID) || a.keeper != nil && a.keeper.Holds(auth.ID, now)
		settled := auth.Held == 0 && auth.Pending == 0 && auth.Streams == 0 && a.cache.Ready() && !kept && !a.cache.Returning()
		auth.State = authorityState(trust, false, settled)
	}
	held := a.cache.JWTCounts()
	for _, k := range snapshot.Own.JWT() {
		auth := authority(&s, metrics.TypeJWT, k.KeyID)
		auth.Held = held[k.KeyID]
		trust := bundle.Trusted
		if k.Tainted {
			trust = bundle.Tainted
		}
		auth.State = authorityState(trust, k.KeyID == newest.JWT, false)
	}
	slices.SortFunc(s.Authorities, func(x, y metrics.Authority) int {
		return cmp.Or(-cmp.Compare(x.Type, y.Type), cmp.Compare(x.ID, y.ID))
	})
	return s
}

// authorityState decides the state of an authority from what the bundle says of it,
// whether it signed the newest SVID, and whether nothing depends on it.
func authorityState(trust bundle.State, newest, settled bool) metrics.AuthorityState {
	switch {
	case trust == bundle.Removed:
		return metrics.StateRemoved
	case trust == bundle.Tainted && settled:
		return metrics.StateSettled
	case trust == bundle.Tainted:
		return metrics.StateTainted
	case newest:
		return metrics.StateActive
	}
	return metrics.StatePrepared
}

// leftOut counts what of a snapshot's bundles cannot be used.
func leftOut(snapshot *bundle.Snapshot) []metrics.LeftOut {
	var out []metrics.LeftOut
	count := func(which string, bundles ...*bundle.Bundle) {
		n := make(map[string]int)
		for _, b := range bundles {
			for _, l := range b.LeftOut() {
				n[l.Type]++
			}
		}
		for _, typ := range []string{bundle.TypeX509, bundle.TypeJWT, bundle.TypeUnknown} {
			out = append(out, metrics.LeftOut{Bundle: which, Type: typ, Count: n[typ]})
		}
	}
	count(metrics.BundleOwn, snapshot.Own)
	count(metrics.BundleFederated, slices.Collect(maps.Values(snapshot.Federated))...)
	return out
}

// release gives the workloads of the process before time to come back, from when
// the agent can answer all of them. Until then it is not known what they use.
func (a *Agent) release(ctx context.Context) {
	watch := a.cache.Watch()
	defer watch.Close()
	for !a.cache.Ready() {
		select {
		case <-ctx.Done():
			return
		case <-watch.C():
		}
	}
	select {
	case <-ctx.Done():
	case <-time.After(cache.ReconnectGrace):
		a.cache.Release()
	}
}

// sweepInterval is how soon a workload that has ended counts no longer.
const sweepInterval = 5 * time.Second

// sweep notes which workloads have ended or are stopped, until ctx is done.
func (a *Agent) sweep(ctx context.Context) {
	tick := time.NewTicker(sweepInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			a.cache.Sweep(a.cfg.Life)
		}
	}
}

// authority finds the authority in s or adds it.
func authority(s *metrics.State, typ, id string) *metrics.Authority {
	i := slices.IndexFunc(s.Authorities, func(a metrics.Authority) bool { return a.Type == typ && a.ID == id })
	if i < 0 {
		i = len(s.Authorities)
		s.Authorities = append(s.Authorities, metrics.Authority{Type: typ, ID: id})
	}
	return &s.Authorities[i]
}

// Bundle is the snapshot in force, nil before the first.
func (a *Agent) Bundle() *bundle.Snapshot { return a.cache.Bundle() }

// TaintDelay is how long this node waits after it has seen the authority's
// taint mark before it renews anything because of it.
func (a *Agent) TaintDelay(authorityID string) time.Duration {
	return wave.Delay(a.seed, authorityID, a.cfg.TaintDelay)
}

// Metrics are the agent's metrics, for a process that serves them itself.
func (a *Agent) Metrics() *prometheus.Registry { return a.metrics.Registry() }
