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

// expiryGrace is how long after half of its lifetime an SVID counts as expiring.
const expiryGrace = time.Minute

// State returns the agent's state for the metrics and the demo. It is safe for
// concurrent use.
//
// The order of reads makes Settled safe: first the calls in flight, then the agent SVID,
// then the cache, then the files. An SVID moves in the same order, so State sees it in
// at least one of them.
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
	attesting := a.node.Attesting()
	agentSVID := a.agentSVID.Held()
	usages := a.cache.Authorities()
	unanswered := a.cache.Unanswered()
	late := a.cache.Overdue(expiryGrace)

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
	if agentSVID != nil {
		s.OwnID, s.OwnExpiry = agentSVID.ID.String(), agentSVID.NotAfter
	}
	if snapshot == nil {
		return s
	}
	if at := a.applied.Load(); at != nil {
		s.BundleApplied, s.BundleSequence = *at, snapshot.Own.Sequence()
	}
	s.LeftOut = countLeftOut(snapshot)
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
		// Every SVID held of such an authority is due, and an attestation in flight
		// may return one more.
		auth.Pending = auth.Held + inFlight[auth.ID] + attesting
		// A workload that has reconnected, and was not answered yet, still uses the
		// SVIDs from before the restart.
		auth.Streams += unanswered
		if agentSVID != nil && agentSVID.Authority == auth.ID && agentSVID.NotAfter.After(now) {
			auth.Pending++
		}
		// A restarted agent would hold the SVIDs that are stored.
		kept := a.agentSVID.onDisk(auth.ID) || a.svidStore != nil && a.svidStore.Holds(auth.ID, now)
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

// countLeftOut counts the unusable authorities of a snapshot's bundles.
func countLeftOut(snapshot *bundle.Snapshot) []metrics.LeftOut {
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

// releaseReturning waits [cache.ReconnectGrace] for the workloads of the last run to
// reconnect, from when the agent can answer them. Until then it is not known which SVIDs
// they use.
func (a *Agent) releaseReturning(ctx context.Context) {
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

// sweepInterval is how often ended workloads are detected.
const sweepInterval = 5 * time.Second

// sweep checks which workloads have ended or are stopped, until ctx is done.
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

// authority returns the authority in s, and adds it first if it is missing.
func authority(s *metrics.State, typ, id string) *metrics.Authority {
	i := slices.IndexFunc(s.Authorities, func(a metrics.Authority) bool { return a.Type == typ && a.ID == id })
	if i < 0 {
		i = len(s.Authorities)
		s.Authorities = append(s.Authorities, metrics.Authority{Type: typ, ID: id})
	}
	return &s.Authorities[i]
}

// Bundle returns the snapshot in force, nil before there is one.
func (a *Agent) Bundle() *bundle.Snapshot { return a.cache.Bundle() }

// TaintDelay returns this node's delay between the authority's taint and the first
// renewal because of it.
func (a *Agent) TaintDelay(authorityID string) time.Duration {
	return wave.Delay(a.seed, authorityID, a.cfg.TaintDelay)
}

// Metrics returns the registry of the agent's metrics, for a process that serves them
// itself.
func (a *Agent) Metrics() *prometheus.Registry { return a.metrics.Registry() }
