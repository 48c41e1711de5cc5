package agent

import (
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/attest"
	"github.com/renewd/renewd/internal/agent/attest/unix"
	"github.com/renewd/renewd/internal/agent/node"
	"github.com/renewd/renewd/internal/agent/svidstore"
	"github.com/renewd/renewd/internal/agent/upstream"
	"github.com/renewd/renewd/internal/agent/workload"
	"github.com/renewd/renewd/internal/socket"
	"github.com/renewd/renewd/metrics"
	"github.com/renewd/renewd/renew"
)

// Agent is one node's daemon. Make it with [New], run it once with
// [Agent.Run].
type Agent struct {
	cfg       Config
	log       *slog.Logger
	cache     *cache.Cache
	store     *node.Store
	node      *node.Node
	client    *upstream.Client
	refresher *bundle.Refresher
	renewer   *renew.Renewer
	workload  *workload.Server
	metrics   *metrics.Metrics
	keeper    *svidstore.Dir // nil without RuntimeDir
	processes *unix.Attestor // nil where Config.Attestors are given
	own       *own
	seed      [32]byte
	streams   streams

	checks           []check // of ready
	syncs, refreshes upkeep

	// bootstrap is what the server is trusted by until it has answered with a
	// bundle.
	bootstrap     atomic.Pointer[bundle.Bundle]
	adoption      adoption
	keptFederated map[spiffeid.TrustDomain]*bundle.Bundle // federated bundles kept from the last run
	applied       atomic.Pointer[time.Time]               // when the bundle in force was applied
	socket        atomic.Pointer[socket.Listener]         // nil before Run and where Config.Listener is given
}

// New checks the configuration, opens DataDir and RuntimeDir and loads what
// they hold. It makes no connection and starts nothing.
func New(cfg Config) (*Agent, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	a := &Agent{cfg: cfg, log: cfg.Log, adoption: adoption{compare: make(chan struct{}, 1)}}
	if err := a.open(); err != nil {
		return nil, errors.Join(err, a.close())
	}
	return a, nil
}

func (a *Agent) open() (err error) {
	cfg := a.cfg
	a.cache = cache.New(cache.Config{Limit: cfg.CacheSize, Now: cfg.Now})
	if a.store, err = node.OpenStore(cfg.DataDir, a.log); err != nil {
		return fmt.Errorf("open data_dir: %w", err)
	}
	a.seed = a.store.Seed()
	a.node, err = node.New(node.Config{
		TrustDomain: cfg.TrustDomain,
		Attestor:    node.JoinToken(cfg.JoinToken, cfg.JoinTokenFile),
		Store:       a.store,
		Bundle:      a.trust,
		Log:         a.log,
		Now:         cfg.Now,
	})
	if err != nil {
		return fmt.Errorf("load the node's identity: %w", err)
	}
	initial, err := a.initialTrust()
	if err != nil {
		return err
	}
	// To be without them for a while is no reason not to start.
	a.keptFederated = a.store.LoadFederated()
	process := rand.Text()
	a.client, err = upstream.New(upstream.Config{
		ServerAddress: cfg.ServerAddress,
		TrustDomain:   cfg.TrustDomain,
		Node:          a.node,
		Bundle:        a.trust,
		Operator:      a.operator,
		Insecure:      cfg.InsecureBootstrap,
		Proxy:         cfg.ServerProxy,
		Dial:          cfg.Dial,
		Process:       process,
		Version:       cfg.Version,
		Log:           a.log,
		Now:           cfg.Now,
	})
	if err != nil {
		return fmt.Errorf("set up the server connection: %w", err)
	}
	a.metrics = metrics.New(metrics.Config{
		TrustDomain: cfg.TrustDomain.Name(),
		Deployment:  cfg.DeploymentName,
		Version:     cfg.Version,
		Process:     process,
		Source:      metrics.SourceFunc(a.State),
		Log:         a.log,
	})
	initWorkloadMetrics(a.metrics)
	a.streams.metrics = a.metrics
	a.refresher = bundle.NewRefresher(bundle.RefresherConfig{
		Fetcher:   a.client,
		Publish:   a.publish,
		Federated: a.federatesWith,
		Initial:   initial,

		InitialFederated: a.keptFederated,
		Interval:         cfg.RefreshInterval,
		Observe:          a.bundleRefreshed,
		Log:              a.log,
		Now:              cfg.Now,
	})
	a.own = &own{node: a.node, store: a.store, client: a.client, trust: a.trust, now: cfg.Now}
	a.renewer = renew.New(renew.Config{
		Cache:            a.cache,
		Minter:           minter{a.client},
		AgentSVID:        a.own,
		Seed:             a.seed,
		MaxDelay:         cfg.TaintDelay,
		Rate:             cfg.TaintRate,
		BatchSize:        cfg.BatchSize,
		KeyType:          cfg.KeyType,
		UnknownAuthority: a.refresher.Refresh,
		Observer:         observer{a.metrics},
		Log:              a.log,
		Now:              cfg.Now,
	})
	attestors := cfg.Attestors
	if attestors == nil {
		a.processes = unix.New(unix.Config{
			SkipPath: !cfg.DiscoverPath, SHA256: cfg.DiscoverPath && cfg.SHA256Limit > 0, SHA256Limit: cfg.SHA256Limit,
			SHA256Needed: func() bool { return a.hashNeeded() != 0 },
		})
		attestors = []attest.Attestor{a.processes}
	}
	if err := a.restore(initial); err != nil {
		return err
	}
	a.workload, err = workload.New(workload.Config{
		Cache:          a.cache,
		Attestors:      attestors,
		Needs:          a.hashNeeded,
		Peers:          cfg.Peers,
		JWT:            a.client,
		ReplaceTainted: cfg.ReplaceTaintedJWT,
		Record:         a.record,
		Observer:       &a.streams,
		ServerOptions:  a.metrics.ServerOptions(),
		Log:            a.log,
	})
	if err != nil {
		return fmt.Errorf("set up the Workload API: %w", err)
	}
	a.checks = a.newChecks()
	return nil
}

// hashNeeded is not 0 while an entry has a unix:sha256 selector; see
// [cache.Cache.Needs].
func (a *Agent) hashNeeded() uint64 { return a.cache.Needs(unix.Name, "sha256") }

// initialTrust finds what to trust the server by: the bundle kept from the
// last run, unless the node has to be proved anew, which is done on the trust
// that the operator gives now. It is nil for an insecure bootstrap.
func (a *Agent) initialTrust() (*bundle.Bundle, error) {
	if a.node.Identity() != nil {
		if kept, adopted := a.store.LoadBundle(); kept != nil {
			a.bootstrap.Store(kept)
			a.trustGoesOn(kept, adopted)
			return kept, nil
		}
	}
	given, err := a.given()
	if err != nil {
		return nil, fmt.Errorf("load trust_bundle_file: %w", err)
	}
	a.trustBegins(given)
	if given != nil {
		a.bootstrap.Store(given)
	}
	// What the operator gives tells no taints and may be old; it is trusted
	// for the first connection and replaced by the server's own answer.
	return nil, nil
}

// federatesWith lists the trust domains whose bundles are wanted. Until the
// server has told its entries those of the last run count.
func (a *Agent) federatesWith() []spiffeid.TrustDomain {
	tds := a.cache.FederatesWith()
	if !a.cache.Ready() {
		for td := range a.keptFederated {
			if !slices.Contains(tds, td) {
				tds = append(tds, td)
			}
		}
	}
	return tds
}

// trust is the bundle that the server is verified with now.
func (a *Agent) trust() *bundle.Bundle {
	if a.applied.Load() != nil {
		return a.cache.Bundle().Own
	}
	return a.bootstrap.Load()
}

// publish puts a new snapshot in force and keeps the own bundle, with the
// times at which taints were first seen, for the next start.
func (a *Agent) publish(s *bundle.Snapshot) {
	prev := a.cache.Bundle()
	a.cache.SetBundle(s)
	now := a.cfg.Now()
	a.applied.Store(&now)
	var held *bundle.Bundle
	if prev != nil {
		held = prev.Own
	}
	if held != s.Own {
		a.keepOwn(held, s.Own)
	}
	if prev != nil && !maps.Equal(prev.Federated, s.Federated) {
		a.store.SaveFederated(s.Federated)
	}
}

// restore loads what RuntimeDir has of the last run, if there was one. kept is the
// bundle that was kept with it, nil when there is none.
func (a *Agent) restore(kept *bundle.Bundle) error {
	var (
		entries []*cache.Entry
		svids   []*cache.SVID
		uses    map[cache.Process][]cache.Use
	)
	if a.cfg.RuntimeDir != "" {
		dir, err := svidstore.Open(a.cfg.RuntimeDir, a.log)
		if err != nil {
			return fmt.Errorf("open runtime_dir: %w", err)
		}
		a.keeper = dir
		if entries, svids, err = dir.Load(a.cfg.Now()); err != nil {
			return fmt.Errorf("load runtime_dir: %w", err)
		}
		if uses, err = dir.LoadProcesses(a.cfg.Now(), a.cfg.Life); err != nil {
			return fmt.Errorf("load runtime_dir: %w", err)
		}
	}
	if a.store.Fresh() && len(svids)+len(uses) == 0 {
		return nil // the first start: no workload can have anything
	}
	if len(svids) == 0 {
		// Nothing to serve.
	} else if a.client.Identified() != nil && kept != nil {
		// The outage has outlived the agent SVID, or the clock is wrong. Neither
		// need be true of the SVIDs of the workloads: they are served while the
		// server is asked.
		a.cache.SetBundle(&bundle.Snapshot{Own: kept, Federated: a.keptFederated})
	} else if kept == nil {
		a.log.Warn("workload SVIDs of the last run wait for the server: no trust bundle was kept with them")
	}
	a.cache.Restore(entries, svids, uses)
	a.log.Info("state of the last run loaded", "svids", len(svids), "processes", len(uses))
	return nil
}

// record notes what a workload's process can use from now on.
func (a *Agent) record(p cache.Process, uses []cache.Use) {
	if a.keeper != nil {
		a.keeper.Record(p, uses)
	}
}

func (a *Agent) close() error {
	var errs []error
	if a.processes != nil {
		errs = append(errs, a.processes.Close())
	}
	if a.client != nil {
		errs = append(errs, a.client.Close())
	}
	if a.store != nil {
		errs = append(errs, a.store.Close())
	}
	return errors.Join(errs...)
}
