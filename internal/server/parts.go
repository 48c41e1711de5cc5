package server

import (
	"context"
	"fmt"
	"io"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/server/admin"
	"github.com/renewd/renewd/internal/server/detach"
	"github.com/renewd/renewd/internal/server/endpoint"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/metrics"
)

// openOperator makes the operators' API over all deployments.
func (d *Domain) openOperator() (err error) {
	c := admin.Config{
		TrustDomain: d.cfg.TrustDomain, Published: d.Published, Certificate: d.certificate, Rules: *d.rules.Load(), Follows: d.federation.Follows,
		Connections: d.connections, Options: d.metrics.ServerOptions(), Log: d.cfg.Log, Clock: d.clock, Heard: d.compareClock,
		ConfirmClock: d.confirmClock, Backup: d.backup,
	}
	if d.endpoint != nil {
		c.RefreshHint = d.endpoint.RefreshHint
	}
	for _, dep := range d.deployments {
		c.Deployments = append(c.Deployments, admin.Deployment{
			Name: dep.Name, Retired: !dep.serves(), Keysets: dep.keysets, Server: dep.server, Ledger: dep.ledger, Audit: dep.audit, Automatic: dep.scheduler.Automatic,
		})
	}
	d.operator, err = admin.New(c)
	return err
}

func (d *Domain) endpointConfig() endpoint.Config {
	c := endpoint.Config{TrustDomain: d.cfg.TrustDomain, Bundle: d.Published, RefreshHint: d.cfg.RefreshHint, Connections: d.connections, Log: d.cfg.Log}
	c.CertFile, c.KeyFile = d.cfg.endpointFiles()
	if c.CertFile == "" {
		c.Certificate = d.certificate
	}
	return c
}

func (dep *deployment) audit(ctx context.Context, after uint64, limit int) ([]admin.AuditRecord, error) {
	records, err := dep.stored.Audit(ctx, after, limit)
	out := make([]admin.AuditRecord, len(records))
	for i, r := range records {
		out[i] = admin.AuditRecord(r)
	}
	return out, err
}

var keysetStates = map[keyset.State]metrics.AuthorityState{
	keyset.Prepared: metrics.StatePrepared, keyset.Active: metrics.StateActive, keyset.Tainted: metrics.StateTainted,
}

// backup writes a copy of the store to w. The audit log of every deployment, which the copy
// has, says so before anything is written.
func (d *Domain) backup(ctx context.Context, w io.Writer) (int64, error) {
	c := keyset.Change{At: d.cfg.Now().UTC(), Actor: keyset.Actor(ctx), Operation: "backup"}
	for _, dep := range d.deployments {
		if err := dep.stored.AddAudit(ctx, c); err != nil {
			return 0, fmt.Errorf("backup not begun, because the audit log of deployment %s cannot have it: %w", dep.Name, err)
		}
	}
	return d.store.Backup(ctx, w)
}

// state returns what the metrics show. A deployment that cannot be read is left out.
func (d *Domain) state() metrics.ServerState {
	s := metrics.ServerState{Federated: make(map[string]time.Time), LeftOut: make(map[string]int), ClockDoubt: d.clock.State().Doubt}
	for td, at := range d.federation.Refreshed() {
		s.Federated[td.Name()] = at
	}
	for td, n := range d.federation.LeftOut() {
		s.LeftOut[td.Name()] = n
	}
	for _, dep := range d.deployments {
		f, err := d.figures(dep.Name)
		if err != nil {
			d.cfg.Log.Warn("figures not read", "deployment", dep.Name, "error", err)
			continue
		}
		out := metrics.Deployment{
			Name: dep.Name, Sequence: f.Sequence, Agents: f.Agents, AgentsBehind: f.AgentsBehind, AgentsDuplicated: len(f.Duplicated), Rotation: dep.scheduler.Automatic().Mode,
		}
		for _, k := range f.Keysets {
			out.Keysets = append(out.Keysets, metrics.Keyset{
				ID: k.ID, State: keysetStates[k.State], ExpiresAt: k.ExpiresAt, X509SVIDs: k.X509SVIDs, AgentsHolding: k.Agents,
				JWTExpiry: k.JWTLatest, X509Safe: k.X509Safe, JWTSafe: k.JWTSafe,
			})
		}
		s.Deployments = append(s.Deployments, out)
	}
	return s
}

// scrapeTimeout bounds how long a scrape waits for the figures of a deployment. It is
// shorter than Prometheus's default timeout.
const scrapeTimeout = 5 * time.Second

// figures returns after scrapeTimeout even when the disk hangs.
func (d *Domain) figures(deployment string) (admin.Figures, error) {
	ctx, cancel := context.WithTimeout(context.Background(), scrapeTimeout)
	defer cancel()
	return detach.Do(ctx, &d.scrapes, func() (admin.Figures, error) { return d.operator.Figures(ctx, deployment) })
}

// initMetrics creates the series of every RPC, so that they exist before the first
// call.
func initMetrics(m *metrics.Server) {
	s := grpc.NewServer()
	agentv1.RegisterAgentServer(s, agentv1.UnimplementedAgentServer{})
	bundlev1.RegisterBundleServer(s, bundlev1.UnimplementedBundleServer{})
	entryv1.RegisterEntryServer(s, entryv1.UnimplementedEntryServer{})
	svidv1.RegisterSVIDServer(s, svidv1.UnimplementedSVIDServer{})
	api.RegisterFleetServer(s, api.UnimplementedFleetServer{})
	api.RegisterOperatorServer(s, api.UnimplementedOperatorServer{})
	m.InitServer(s)
}
