package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/listen"
	"github.com/renewd/renewd/internal/server/admin"
	"github.com/renewd/renewd/internal/server/detach"
	"github.com/renewd/renewd/internal/server/endpoint"
	"github.com/renewd/renewd/internal/server/federation"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/rotation"
	"github.com/renewd/renewd/internal/server/seal"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/internal/server/store"
	"github.com/renewd/renewd/metrics"
)

// FileName is the store's name in the data folder.
const FileName = "renewd.db"

// Domain is the signing side of one trust domain. Make it with [Open], run it
// once with [Domain.Run].
type Domain struct {
	cfg         Config
	store       *store.Store // nil in memory
	deployments []*deployment
	union       atomic.Pointer[union]
	unionM      sync.Mutex // held by who makes a new one
	proof       spireapi.CertificateCache
	metrics     *metrics.Server
	rules       admin.Rules
	connections *listen.Pool // of all listeners
	operator    *admin.Service
	endpoint    *endpoint.Server // nil without
	federation  *federation.Follower
	clock       *clock.Clock
	running     atomic.Bool
	scrapes     detach.Group
	close       func() error // closes the store, once
}

// deployment is one deployment of the trust domain. One that serves nobody was
// served once: its keysets are published for what they signed.
type deployment struct {
	DeploymentConfig
	keysets   *keyset.Deployment
	ledger    *ledger.Ledger
	server    *spireapi.Server
	scheduler *rotation.Scheduler
	kept      *store.Deployment // nil in memory
}

// Open checks the configuration, opens the store and loads what it holds. It
// listens nowhere and starts nothing but the store. The Domain has to be
// closed, or run.
func Open(ctx context.Context, cfg Config) (_ *Domain, err error) {
	if cfg, err = cfg.withDefaults(); err != nil {
		return nil, err
	}
	d := &Domain{cfg: cfg, connections: listen.NewPool()}
	if d.rules, err = admin.ParseRules(cfg.TrustDomain, cfg.Managers, cfg.Readers); err != nil {
		return nil, err
	}
	d.proof.Now, d.proof.Issue = cfg.Now, d.newCertificate
	d.proof.Usable = func(authority string) bool { return publishes(d.Published(), authority) }
	d.close = sync.OnceValue(d.closeStore)
	defer func() {
		if err != nil {
			err = errors.Join(err, d.close())
		}
	}()
	names := cfg.Deployments
	if cfg.DataDir != "" {
		if names, err = d.openStore(ctx); err != nil {
			return nil, err
		}
	}
	d.openClock()
	d.metrics = metrics.NewServer(metrics.ServerConfig{
		TrustDomain: cfg.TrustDomain.Name(), Deployments: served(cfg.Deployments), Version: cfg.Version,
		Federated: followed(cfg.Federation), Source: metrics.ServerSourceFunc(d.state), Log: cfg.Log,
	})
	initMetrics(d.metrics)
	for _, c := range names {
		dep, err := d.openDeployment(ctx, c)
		if err != nil {
			return nil, fmt.Errorf("deployment %s: %w", c.Name, err)
		}
		d.deployments = append(d.deployments, dep)
	}
	if err := d.openFederation(ctx); err != nil {
		return nil, err
	}
	if err := d.openOperator(); err != nil {
		return nil, err
	}
	if cfg.EndpointAddress != "" || cfg.EndpointListener != nil {
		if d.endpoint, err = endpoint.New(d.endpointConfig()); err != nil {
			return nil, fmt.Errorf("bundle_endpoint: %w", err)
		}
	}
	return d, nil
}

// openStore opens the store and returns the deployments that are configured
// and those that only the store knows.
func (d *Domain) openStore(ctx context.Context) ([]DeploymentConfig, error) {
	key, err := seal.Find(d.cfg.KeyFile, os.Getenv)
	if err != nil {
		return nil, fmt.Errorf("key_file: %w", err)
	}
	if err := os.MkdirAll(d.cfg.DataDir, 0o700); err != nil {
		return nil, fmt.Errorf("data_dir: %w", err)
	}
	d.store, err = store.Open(filepath.Join(d.cfg.DataDir, FileName), store.Options{TrustDomain: d.cfg.TrustDomain, Seal: key, Log: d.cfg.Log, Now: d.cfg.Now})
	if err != nil {
		return nil, err
	}
	all := slices.Clone(d.cfg.Deployments)
	known, err := d.store.Deployments(ctx)
	if err != nil {
		return nil, err
	}
	for _, name := range known {
		if !slices.ContainsFunc(all, func(c DeploymentConfig) bool { return c.Name == name }) {
			d.cfg.Log.Warn("deployment is not configured any more: it is not served, and its authorities stay in the trust bundle", "deployment", name)
			all = append(all, DeploymentConfig{Name: name})
		}
	}
	return all, nil
}

func (d *Domain) openDeployment(ctx context.Context, c DeploymentConfig) (*deployment, error) {
	dep := &deployment{DeploymentConfig: c}
	log := d.cfg.Log.With("deployment", c.Name)
	keys := keyset.Config{TrustDomain: d.cfg.TrustDomain, Name: c.Name, Lifetime: d.cfg.KeysetLifetime, Now: d.cfg.Now}
	rows := ledger.Config{Log: log, Clock: d.clock}
	config := spireapi.Config{
		TrustDomain: d.cfg.TrustDomain, Published: d.Published, X509TTL: d.cfg.X509TTL, JWTTTL: d.cfg.JWTTTL,
		RefreshHint: d.cfg.RefreshHint, IsOperator: d.rules.IsOperator, Connections: d.connections, Observer: d.metrics,
		Log: log, Now: d.cfg.Now, AtLeast: d.clock.AtLeast, Heard: d.heard,
		Options: append(slices.Clone(d.cfg.ServerOptions), d.metrics.ServerOptions()...),
	}
	if d.store != nil {
		dep.kept = d.store.Deployment(c.Name)
		keys.Storage, rows.Storage, config.Storage = dep.kept, dep.kept, dep.kept
		rows.Restored, rows.RestoredAt, config.Lost = dep.kept.Restored(), d.store.RestoredAt(), d.store.Lost()
		if !rows.RestoredAt.IsZero() {
			config.LostUntil = d.clock.Start
		}
	}
	var err error
	if dep.ledger, err = ledger.Open(ctx, rows); err != nil {
		return nil, err
	}
	if dep.keysets, err = keyset.Open(ctx, keys); err != nil {
		return nil, err
	}
	config.Keysets, config.Ledger = dep.keysets, dep.ledger
	if dep.server, err = spireapi.New(config); err != nil {
		return nil, err
	}
	policy := d.cfg.Rotation
	if !c.serves() {
		// It signs nothing that a new keyset would be for.
		policy.Mode = rotation.Off
	}
	dep.scheduler, err = rotation.New(rotation.Config{
		Keysets: dep.keysets, Policy: policy, Facts: &facts{d: d, dep: dep}, Log: log, Clock: d.clock,
	})
	return dep, err
}

func served(all []DeploymentConfig) []string {
	var names []string
	for _, c := range all {
		names = append(names, c.Name)
	}
	return names
}

// Close closes the store and the listeners of a Domain that is not to be run.
// [Domain.Run] does it by itself; after it Close does nothing.
func (d *Domain) Close() error {
	d.closeListeners()
	return d.close()
}

func (d *Domain) closeStore() error {
	if d.store == nil {
		return nil
	}
	err := d.store.Close()
	for _, dep := range d.deployments {
		dep.keysets.Wait()
		dep.server.Wait()
	}
	if d.operator != nil {
		d.operator.Wait()
	}
	d.scrapes.Wait()
	return err
}

// closeListeners closes those that came with the configuration.
func (d *Domain) closeListeners() {
	for _, c := range d.cfg.Deployments {
		if c.Listener != nil {
			_ = c.Listener.Close()
		}
	}
	if d.cfg.EndpointListener != nil {
		_ = d.cfg.EndpointListener.Close()
	}
}

// Server returns the services of a deployment that is configured, for running
// inside another process; nil when there is none of that name.
func (d *Domain) Server(name string) *spireapi.Server {
	for _, dep := range d.deployments {
		if dep.Name == name && dep.serves() {
			return dep.server
		}
	}
	return nil
}

// union is the bundle of several deployments.
type union struct {
	of     []*keyset.Bundle
	bundle *keyset.Bundle
}

// Published returns the trust bundle: the authorities of all deployments. As
// long as nothing changes it returns the same pointer.
func (d *Domain) Published() *keyset.Bundle {
	if len(d.deployments) == 1 {
		return d.deployments[0].keysets.Bundle()
	}
	if u := d.union.Load(); u != nil && d.current(u) {
		return u.bundle
	}
	// One at a time, so that nobody puts an older union in the place of a newer.
	d.unionM.Lock()
	defer d.unionM.Unlock()
	if u := d.union.Load(); u != nil && d.current(u) {
		return u.bundle
	}
	u := &union{}
	for _, dep := range d.deployments {
		u.of = append(u.of, dep.keysets.Bundle())
	}
	u.bundle = keyset.Union(u.of...)
	d.union.Store(u)
	return u.bundle
}

func (d *Domain) current(u *union) bool {
	for i, dep := range d.deployments {
		if u.of[i] != dep.keysets.Bundle() {
			return false
		}
	}
	return true
}
