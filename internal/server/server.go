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
	"github.com/renewd/renewd/internal/config"
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

// Domain is the signing side of one trust domain. Create it with [Open] and run it
// once with [Domain.Run].
type Domain struct {
	cfg         Config
	store       *store.Store
	deployments []*deployment
	union       atomic.Pointer[union]
	unionMu     sync.Mutex // held while a new union is made
	certs       spireapi.CertificateCache
	metrics     *metrics.Server
	rules       admin.Rules
	connections *listen.Pool // of all listeners
	operator    *admin.Service
	endpoint    *endpoint.Server // nil if not configured
	federation  *federation.Follower
	clock       *clock.Clock
	running     atomic.Bool
	scrapes     detach.Group
	close       func() error // closes the store, once
}

// deployment is one deployment of the trust domain. If it is in the store and no
// longer configured, it serves no agents; its authorities stay published, because
// SVIDs that they signed may still be valid.
type deployment struct {
	DeploymentConfig
	keysets   *keyset.Deployment
	ledger    *ledger.Ledger
	server    *spireapi.Server
	scheduler *rotation.Scheduler
	stored    *store.Deployment
}

// Open opens the store and loads its contents. It opens no listener and starts nothing but
// the store. The caller must run or close the Domain.
func Open(ctx context.Context, cfg Config) (_ *Domain, err error) {
	cfg = cfg.withDefaults()
	d := &Domain{cfg: cfg, connections: listen.NewPool()}
	if d.rules, err = admin.ParseRules(cfg.TrustDomain, cfg.Managers, cfg.Readers); err != nil {
		return nil, err
	}
	d.certs.Now, d.certs.Issue = cfg.Now, d.newCertificate
	d.certs.Usable = func(authority string) bool { return publishes(d.Published(), authority) }
	if err := d.openStore(); err != nil {
		return nil, err
	}
	d.close = sync.OnceValue(d.closeStore)
	defer func() {
		if err != nil {
			err = errors.Join(err, d.close())
		}
	}()
	deployments, err := d.allDeployments(ctx)
	if err != nil {
		return nil, err
	}
	d.openClock()
	d.metrics = metrics.NewServer(metrics.ServerConfig{
		TrustDomain: cfg.TrustDomain.Name(), Deployments: deploymentNames(cfg.Deployments), Version: cfg.Version,
		Federated: federatedNames(cfg.Federation), Source: d.state, Log: cfg.Log,
	})
	initMetrics(d.metrics)
	for _, c := range deployments {
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

// openStore opens the store in DataDir, or a temporary one.
func (d *Domain) openStore() (err error) {
	o := store.Options{TrustDomain: d.cfg.TrustDomain, Log: d.cfg.Log, Now: d.cfg.Now}
	if d.cfg.DataDir == "" {
		d.store, err = store.OpenTemporary(o)
		return err
	}
	if o.Seal, err = seal.Find(d.cfg.KeyFile, os.Getenv); err != nil {
		return fmt.Errorf("key_file: %w", err)
	}
	if err := os.MkdirAll(d.cfg.DataDir, 0o700); err != nil {
		return config.FileError(fmt.Errorf("data_dir: create the folder: %w: create it for the user that the server runs as, or choose another data_dir", err))
	}
	d.store, err = store.Open(filepath.Join(d.cfg.DataDir, FileName), o)
	return err
}

// allDeployments returns the configured deployments, followed by those that are in the
// store only.
func (d *Domain) allDeployments(ctx context.Context) ([]DeploymentConfig, error) {
	all := slices.Clone(d.cfg.Deployments)
	known, err := d.store.Deployments(ctx)
	if err != nil {
		return nil, err
	}
	for _, name := range known {
		if !slices.ContainsFunc(all, func(c DeploymentConfig) bool { return c.Name == name }) {
			d.cfg.Log.Warn("stored deployment not configured: it is not served, and its authorities stay in the trust bundle", "deployment", name)
			all = append(all, DeploymentConfig{Name: name})
		}
	}
	return all, nil
}

func (d *Domain) openDeployment(ctx context.Context, c DeploymentConfig) (*deployment, error) {
	dep := &deployment{DeploymentConfig: c, stored: d.store.Deployment(c.Name)}
	log := d.cfg.Log.With("deployment", c.Name)
	keys := keyset.Config{TrustDomain: d.cfg.TrustDomain, Name: c.Name, Storage: dep.stored, Lifetime: d.cfg.KeysetLifetime, Now: d.cfg.Now}
	rows := ledger.Config{Storage: dep.stored, Restored: dep.stored.Restored(), RestoredAt: d.store.RestoredAt(), Log: log, Clock: d.clock}
	config := spireapi.Config{
		TrustDomain: d.cfg.TrustDomain, Published: d.Published, Storage: dep.stored, Lost: d.store.Lost(), X509TTL: d.cfg.X509TTL, JWTTTL: d.cfg.JWTTTL,
		RefreshHint: d.cfg.RefreshHint, IsOperator: d.rules.IsOperator, Connections: d.connections, Observer: d.metrics,
		Log: log, Now: d.cfg.Now, AtLeast: d.clock.AtLeast, SetBack: d.clockSetBack, Heard: d.compareClock,
		Options: append(slices.Clone(d.cfg.ServerOptions), d.metrics.ServerOptions()...),
	}
	if !rows.RestoredAt.IsZero() {
		config.LostUntil = d.clock.Start
	}
	var err error
	if config.NodeVerifiers, err = d.nodeVerifiers(c, log); err != nil {
		return nil, fmt.Errorf("node_attestation: %w", err)
	}
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
		// It signs nothing, so it needs no new keysets.
		policy.Mode = rotation.Off
	}
	dep.scheduler, err = rotation.New(rotation.Config{
		Keysets: dep.keysets, Policy: policy, Facts: &facts{d: d, dep: dep}, Log: log, Clock: d.clock,
	})
	return dep, err
}

func deploymentNames(all []DeploymentConfig) []string {
	var names []string
	for _, c := range all {
		names = append(names, c.Name)
	}
	return names
}

// Close closes the store and the configured listeners of a Domain that is not run.
// [Domain.Run] closes them itself; after it Close does nothing.
func (d *Domain) Close() error {
	d.closeListeners()
	return d.close()
}

func (d *Domain) closeStore() error {
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

// closeListeners closes the listeners of the configuration.
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

// Server returns the services of a configured deployment; nil if there is none of
// that name. It is for a Domain inside another process.
func (d *Domain) Server(name string) *spireapi.Server {
	for _, dep := range d.deployments {
		if dep.Name == name && dep.serves() {
			return dep.server
		}
	}
	return nil
}

// union is the trust bundle of several deployments.
type union struct {
	of     []*keyset.Bundle
	bundle *keyset.Bundle
}

// Published returns the trust bundle: the authorities of all deployments. It returns
// the same pointer until an authority changes.
func (d *Domain) Published() *keyset.Bundle {
	if len(d.deployments) == 1 {
		return d.deployments[0].keysets.Bundle()
	}
	if u := d.union.Load(); u != nil && d.current(u) {
		return u.bundle
	}
	// One at a time, so that an older union never replaces a newer one.
	d.unionMu.Lock()
	defer d.unionMu.Unlock()
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
