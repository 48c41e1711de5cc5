// Package metrics owns every metric of the agent: its name, its help text and
// the values its labels can have. It imports no other package of renewd; the
// agent translates.
//
// What happens is told through methods ([Metrics.Minted], [Metrics.Renewed],
// ...) and counted. What is held is never counted up and down: the gauges of
// state are read from a [Source] at each scrape, all from one snapshot, so they
// agree with each other and cannot drift from the truth.
//
// The names that start with spirl_ and grpc_server_ are those that existing
// dashboards of this field already read. Everything else starts with renewd_.
package metrics

import (
	"log/slog"
	"net/http"
	"time"

	grpcprom "github.com/grpc-ecosystem/go-grpc-middleware/providers/prometheus"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/reflection"
)

// The values of the svid_type label.
const (
	TypeX509 = "x509"
	TypeJWT  = "jwt"
)

// The values of the reason label of renewd_renewals_total.
const (
	ReasonFirst    = "first"             // none was held yet
	ReasonHalfLife = "half_life"         // half of its life has passed
	ReasonEntry    = "entry_changed"     // its registration entry has changed
	ReasonTaint    = "taint"             // the authority that signed it is tainted
	ReasonRemoved  = "authority_removed" // the authority that signed it left the bundle
)

// The values of the outcome label of renewd_renewals_total.
const (
	RenewalDone         = "renewed"       // the new SVID is in use
	RenewalStillTainted = "still_tainted" // the answer was signed by a tainted authority again
	RenewalRejected     = "rejected"      // the answer failed verification
	RenewalFailed       = "failed"        // there was no answer, or an error
	RenewalDropped      = "dropped"       // its entry changed meanwhile, so it is not used
)

// The values of the outcome label of renewd_bundle_refreshes_total.
const (
	RefreshApplied   = "applied"   // the answer differs and is now in force
	RefreshUnchanged = "unchanged" // the answer is what is held
	RefreshRejected  = "rejected"  // the answer cannot be right
	RefreshFailed    = "failed"    // there was no answer
)

// The values of the outcome label of renewd_sync_duration_seconds.
const (
	SyncDone   = "ok"
	SyncFailed = "failed"
)

// Config is what [New] needs. The first four are the labels of
// spirl_application_info and may be empty.
type Config struct {
	TrustDomain string // such as example.org
	Deployment  string // the deployment whose keysets sign for this agent
	Version     string
	Component   string // agent when empty

	// Source gives the gauges of state. It is called at each scrape, possibly
	// from several goroutines at once.
	Source Source
	// Log takes what goes wrong while a scrape is answered. Nothing is logged
	// when nil.
	Log *slog.Logger
}

// Metrics is the agent's one registry and all that is in it. Its methods are
// safe for concurrent use.
type Metrics struct {
	registry *prometheus.Registry
	grpc     *grpcprom.ServerMetrics
	log      *slog.Logger

	mints        *prometheus.CounterVec
	mintDuration *prometheus.HistogramVec
	renewals     *prometheus.CounterVec
	refreshes    *prometheus.CounterVec
	syncs        *prometheus.HistogramVec
	oversize     prometheus.Counter
}

// New makes the metrics and registers them. Every counter that a rate or an
// alert is likely to be made of exists at 0 from the start: a counter that
// appears with its first failure hides that failure from rate().
func New(cfg Config) *Metrics {
	if cfg.Component == "" {
		cfg.Component = "agent"
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		grpc:     grpcprom.NewServerMetrics(),
		log:      cfg.Log,
		mints: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "spirl_agent_mint_svid_total",
			Help: "SVIDs this agent asked the server for, by type and gRPC status of the attempt. Failed attempts count too.",
		}, []string{"svid_type", "status_code"}),
		mintDuration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "spirl_agent_mint_svid_duration_seconds",
			Help:    "Time to obtain one SVID, from making the key to the parsed answer, by type and gRPC status.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
		}, []string{"svid_type", "status_code"}),
		renewals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "renewd_renewals_total",
			Help: "Attempts to obtain an X.509-SVID for a workload, by what made it due and what came of it. An outcome of still_tainted means the server answered with an SVID of a tainted authority again; the agent tries again with backoff.",
		}, []string{"reason", "outcome"}),
		refreshes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "renewd_bundle_refreshes_total",
			Help: "Polls of the trust bundle by outcome. If neither applied nor unchanged moves, this agent does not learn of taints.",
		}, []string{"outcome"}),
		syncs: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "renewd_sync_duration_seconds",
			Help:    "Time one synchronization of registration entries with the server took, by outcome.",
			Buckets: []float64{.001, .005, .01, .05, .1, .5, 1, 5, 10, 30},
		}, []string{"outcome"}),
		oversize: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "renewd_oversize_answers_total",
			Help: "Workload API answers above 4 MiB, the most that a gRPC client accepts unless told otherwise. The log names the workload and the remedy.",
		}),
	}
	m.registry.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		m.grpc, m.mints, m.mintDuration, m.renewals, m.refreshes, m.syncs, m.oversize,
		info(cfg),
	)
	if cfg.Source != nil {
		m.registry.MustRegister(stateCollector{cfg.Source})
	}
	m.zero()
	return m
}

// info is the constant series that says what runs here.
func info(cfg Config) prometheus.Collector {
	g := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "spirl_application_info",
		Help: "Always 1. The labels say which trust domain and deployment this process serves, and its version.",
	}, []string{"spirl_trust_domain", "spirl_trust_domain_deployment", "spirl_app_version", "spirl_component"})
	g.WithLabelValues(text(cfg.TrustDomain), text(cfg.Deployment), text(cfg.Version), text(cfg.Component)).Set(1)
	return g
}

// zero makes the series that must exist before the first event. The duration
// histograms get only their usual series: one for each code would be hundreds.
func (m *Metrics) zero() {
	for _, typ := range []string{TypeX509, TypeJWT} {
		for c := codes.OK; c <= codes.Unauthenticated; c++ {
			m.mints.WithLabelValues(typ, c.String())
		}
		m.mintDuration.WithLabelValues(typ, codes.OK.String())
	}
	for _, reason := range []string{ReasonFirst, ReasonHalfLife, ReasonEntry, ReasonTaint, ReasonRemoved} {
		for _, outcome := range []string{RenewalDone, RenewalStillTainted, RenewalRejected, RenewalFailed, RenewalDropped} {
			m.renewals.WithLabelValues(reason, outcome)
		}
	}
	for _, outcome := range []string{RefreshApplied, RefreshUnchanged, RefreshRejected, RefreshFailed} {
		m.refreshes.WithLabelValues(outcome)
	}
	m.syncs.WithLabelValues(SyncDone)
	m.syncs.WithLabelValues(SyncFailed)
}

// Registry returns the registry, for a caller with a metric of its own.
func (m *Metrics) Registry() *prometheus.Registry { return m.registry }

// Minted counts one attempt to obtain an SVID from the server. svidType is
// [TypeX509] or [TypeJWT], code the gRPC status as codes.Code prints it, d the
// time from making the key to the parsed answer. Of a batch, each item is one
// attempt that took as long as the batch.
func (m *Metrics) Minted(svidType, code string, d time.Duration) {
	m.mints.WithLabelValues(svidType, code).Inc()
	m.mintDuration.WithLabelValues(svidType, code).Observe(d.Seconds())
}

// Renewed counts one renewal of a workload's X.509-SVID by its reason and
// outcome (the Reason and Renewal constants).
func (m *Metrics) Renewed(reason, outcome string) {
	m.renewals.WithLabelValues(reason, outcome).Inc()
}

// BundleRefreshed counts one poll of the trust bundle by its outcome (the
// Refresh constants). What is in force is read from the [Source].
func (m *Metrics) BundleRefreshed(outcome string) {
	m.refreshes.WithLabelValues(outcome).Inc()
}

// Synced records one synchronization of entries that took d and ended with
// err, which may be nil.
func (m *Metrics) Synced(d time.Duration, err error) {
	outcome := SyncDone
	if err != nil {
		outcome = SyncFailed
	}
	m.syncs.WithLabelValues(outcome).Observe(d.Seconds())
}

// Oversized counts one Workload API answer above the default limit of clients.
func (m *Metrics) Oversized() { m.oversize.Inc() }

// ServerOptions returns the interceptors that fill the grpc_server_ metrics of
// the Workload API.
func (m *Metrics) ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(m.grpc.UnaryServerInterceptor()),
		grpc.ChainStreamInterceptor(m.grpc.StreamServerInterceptor()),
	}
}

// InitServer makes the grpc_server_ series of every RPC of s at 0. Call it once
// the services are registered.
func (m *Metrics) InitServer(s reflection.ServiceInfoProvider) { m.grpc.InitializeMetrics(s) }

// Handler answers scrapes. A state that cannot be exported leaves out its own
// series and not the rest.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{
		ErrorLog:      slog.NewLogLogger(m.log.Handler(), slog.LevelWarn),
		ErrorHandling: promhttp.ContinueOnError,
		Registry:      m.registry,
	})
}
