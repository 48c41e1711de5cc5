package agent

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
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
	"github.com/renewd/renewd/internal/loglimit"
	"github.com/renewd/renewd/internal/socket"
	"github.com/renewd/renewd/metrics"
	"github.com/renewd/renewd/renew"
)

// Agent is one node's daemon. Create it with [New] and run it once with [Agent.Run].
type Agent struct {
	cfg       Config
	log       *slog.Logger
	lines     *loglimit.Log
	cache     *cache.Cache
	store     *node.Store
	node      *node.Node
	client    *upstream.Client
	refresher *bundle.Refresher
	renewer   *renew.Renewer
	workload  *workload.Server
	metrics   *metrics.Metrics
	svidStore *svidstore.Dir // nil without RuntimeDir
	attestors []attest.Attestor
	closers   []io.Closer // of attestors
	agentSVID *agentSVID
	seed      [32]byte
	streams   streams

	checks                      []check // of ready
	entrySyncs, bundleRefreshes pollHealth

	// bootstrap verifies the server until a bundle is in force.
	bootstrap       atomic.Pointer[bundle.Bundle]
	firstTrust      bool // there is no stored bundle of a server
	operatorTrust   operatorTrust
	rebootstrap     rebootstrapper
	storedFederated map[spiffeid.TrustDomain]*bundle.Bundle // federated bundles of the last run
	applied         atomic.Pointer[time.Time]               // when the bundle in force was applied
	socket          atomic.Pointer[socket.Listener]         // nil before Run and with Config.Listener
}

// maxSubjects is how many subjects of repeated log lines are distinguished.
const maxSubjects = 16

// New loads the state from DataDir and RuntimeDir. It calls no server and starts no
// goroutine.
func New(cfg Config) (*Agent, error) {
	cfg = cfg.withDefaults()
	a := &Agent{
		cfg: cfg, log: cfg.Log, lines: loglimit.New(cfg.Log, loglimit.Interval, maxSubjects),
		operatorTrust: operatorTrust{changed: make(chan struct{}, 1)}, rebootstrap: rebootstrapper{unknown: make(chan struct{}, 1)},
	}
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
		Attestor:    cfg.Attestor,
		Store:       a.store,
		Bundle:      a.trust,
		Log:         a.log,
		Now:         cfg.Now,
	})
	if err != nil {
		return fmt.Errorf("load the node's identity: %w", err)
	}
	if err := a.checkReattestable(); err != nil {
		return err
	}
	initial, err := a.initialTrust()
	if err != nil {
		return err
	}
	// The agent can start without them.
	a.storedFederated = a.store.LoadFederated()
	process := rand.Text()
	a.client, err = upstream.New(upstream.Config{
		ServerAddress:   cfg.ServerAddress,
		TrustDomain:     cfg.TrustDomain,
		Node:            a.node,
		Bundle:          a.trust,
		Trust:           a.describeTrust,
		VerifyOtherwise: a.verifyOtherwise,
		Verified:        a.serverVerified,
		Insecure:        cfg.InsecureBootstrap,
		Proxy:           cfg.ServerProxy,
		Dial:            cfg.Dial,
		Process:         process,
		Version:         cfg.Version,
		Log:             a.log,
		Now:             cfg.Now,
	})
	if err != nil {
		return fmt.Errorf("set up the server connection: %w", err)
	}
	if a.attestors, err = a.openAttestors(); err != nil {
		return fmt.Errorf("set up workload attestation: %w", err)
	}
	var names []string
	for _, attestor := range a.attestors {
		names = append(names, attestor.Name())
	}
	a.metrics = metrics.New(metrics.Config{
		TrustDomain: cfg.TrustDomain.Name(),
		Deployment:  cfg.DeploymentName,
		Version:     cfg.Version,
		Process:     process,
		Hostname:    cfg.Hostname,
		Attestors:   names,
		Source:      a.State,
		Log:         a.log,
	})
	initWorkloadMetrics(a.metrics)
	a.streams.metrics = a.metrics
	a.refresher = bundle.NewRefresher(bundle.RefresherConfig{
		Fetcher:   a.client,
		Publish:   a.publish,
		Federated: a.federatesWith,
		Initial:   initial,

		InitialFederated: a.storedFederated,
		Interval:         cfg.RefreshInterval,
		Observe:          a.bundleRefreshed,
		Log:              a.log,
		Now:              cfg.Now,
	})
	a.agentSVID = &agentSVID{node: a.node, store: a.store, client: a.client, trust: a.trust, now: cfg.Now}
	a.renewer = renew.New(renew.Config{
		Cache:            a.cache,
		Minter:           minter{a.client},
		AgentSVID:        a.agentSVID,
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
	if err := a.restore(initial); err != nil {
		return err
	}
	a.workload, err = workload.New(workload.Config{
		Cache:          a.cache,
		Attestors:      a.attestors,
		LogSelectors:   cfg.LogSelectors,
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

// hashNeeded returns a nonzero value while an entry has a unix:sha256 selector; see
// [cache.Cache.Needs].
func (a *Agent) hashNeeded() uint64 { return a.cache.Needs(unix.Name, "sha256") }

// initialTrust returns the stored bundle if there is a stored agent SVID. Without one
// the node has to attest, and trusts what the operator configures: that goes to
// bootstrap, which stays nil for an insecure bootstrap.
func (a *Agent) initialTrust() (*bundle.Bundle, error) {
	if a.node.Identity() != nil {
		if stored, adopted := a.store.LoadBundle(); stored != nil {
			a.bootstrap.Store(stored)
			if a.cfg.TrustSource != nil {
				a.operatorTrust.adopted = adopted
			} else {
				a.resumeTrust(stored, adopted)
			}
			return stored, nil
		}
	}
	a.firstTrust = true
	if a.cfg.TrustSource != nil {
		return nil, nil // it is asked in connect
	}
	given, err := a.configuredTrust()
	if err != nil {
		return nil, fmt.Errorf("load trust_bundle_file: %w", err)
	}
	a.beginTrust(given)
	if given != nil {
		a.bootstrap.Store(given)
	}
	// The operator's bundle has no taints and may be old. The server's bundle replaces
	// it after the first connection.
	return nil, nil
}

// federatesWith returns the trust domains whose bundles are needed. Until the first
// entry sync that includes those of the last run.
func (a *Agent) federatesWith() []spiffeid.TrustDomain {
	tds := a.cache.FederatesWith()
	if !a.cache.Ready() {
		for td := range a.storedFederated {
			if !slices.Contains(tds, td) {
				tds = append(tds, td)
			}
		}
	}
	return tds
}

// trust returns the bundle that verifies the server: the one in force, or bootstrap
// before there is one.
func (a *Agent) trust() *bundle.Bundle {
	if a.applied.Load() != nil {
		return a.cache.Bundle().Own
	}
	return a.bootstrap.Load()
}

// publish puts a new snapshot in force and stores its bundles for the next start.
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
		a.saveBundle(held, s.Own)
	}
	if prev != nil && !maps.Equal(prev.Federated, s.Federated) {
		a.store.SaveFederated(s.Federated)
	}
}

// restore loads the workload SVIDs and process records of the last run. stored is the trust
// bundle of the last run, nil when there is none.
func (a *Agent) restore(stored *bundle.Bundle) error {
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
		a.svidStore = dir
		if entries, svids, err = dir.Load(a.cfg.Now()); err != nil {
			return fmt.Errorf("load runtime_dir: %w", err)
		}
		if uses, err = dir.LoadProcesses(a.cfg.Now(), a.cfg.Life); err != nil {
			return fmt.Errorf("load runtime_dir: %w", err)
		}
	}
	if a.store.WasEmpty() && len(svids)+len(uses) == 0 {
		return nil // the first start: no workload can have an SVID
	}
	if len(svids) == 0 {
		// Nothing to serve.
	} else if a.client.Identified() != nil && stored != nil {
		// The agent SVID has expired, or the clock is wrong. The workloads' SVIDs may
		// still be valid: serve them while the node attests.
		a.cache.SetBundle(&bundle.Snapshot{Own: stored, Federated: a.storedFederated})
	} else if stored == nil {
		a.log.Warn("workload SVIDs of the last run not served before the first bundle refresh, no trust bundle is stored")
	}
	a.cache.Restore(entries, svids, uses)
	a.log.Info("state of the last run loaded", "svids", len(svids), "processes", len(uses))
	return nil
}

// record stores what a workload's process can use from now on.
func (a *Agent) record(p cache.Process, uses []cache.Use) {
	if a.svidStore != nil {
		a.svidStore.Record(p, uses)
	}
}

func (a *Agent) close() error {
	var errs []error
	for _, c := range a.closers {
		errs = append(errs, c.Close())
	}
	if a.client != nil {
		errs = append(errs, a.client.Close())
	}
	if a.store != nil {
		errs = append(errs, a.store.Close())
	}
	return errors.Join(errs...)
}
