// Package metrics owns every metric of the agent ([Metrics]) and of the signing server
// ([Server]): its name, its help text and the values of its labels. It imports no other
// package of renewd; its users translate.
//
// Events are counted by methods ([Metrics.Minted], [Metrics.Renewed], ...). State is
// never counted up and down: the gauges are read from the Source of the [Config] or [ServerConfig] at
// each scrape, all from one snapshot, so they are consistent and cannot drift.
//
// Existing dashboards read the names that start with spirl_ and grpc_server_. All other
// names start with renewd_.
package metrics

import (
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
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
	ReasonEntry    = "entry_changed"     // its entry has changed
	ReasonTaint    = "taint"             // the authority that signed it is tainted
	ReasonRemoved  = "authority_removed" // the authority that signed it has left the bundle
)

// The values of the outcome label of renewd_renewals_total.
const (
	RenewalDone         = "renewed"       // the new SVID is in use
	RenewalStillTainted = "still_tainted" // the answer was signed by a tainted authority again
	RenewalRejected     = "rejected"      // the answer failed verification
	RenewalFailed       = "failed"        // there was no answer, or an error
	RenewalMissing      = "missing"       // the server does not list the entry at present, and minted nothing
	RenewalDropped      = "dropped"       // its entry changed meanwhile, so the new SVID is not used
)

// The values of the outcome label of renewd_bundle_refreshes_total and
// renewd_server_federated_bundle_refreshes_total.
const (
	RefreshApplied   = "applied"   // the answer differs and is now the current bundle
	RefreshUnchanged = "unchanged" // the answer is the current bundle
	RefreshRejected  = "rejected"  // the answer is invalid or older
	RefreshFailed    = "failed"    // there was no answer
)

// The values of the outcome label of renewd_sync_duration_seconds and of
// renewd_workload_attestation_duration_seconds.
const (
	OutcomeOK     = "ok"
	OutcomeFailed = "failed"
)

// Config is what [New] needs. The first three are labels of
// spirl_application_info and may be empty.
type Config struct {
	TrustDomain string // such as example.org
	Deployment  string // the deployment whose keysets sign for this agent
	Version     string
	// Process is a random ID of this process, which renewd_agent_info shows.
	Process string
	// Hostname is that of the node, which renewd_agent_info shows.
	Hostname string
	// Attestors are the names of the workload attestors.
	Attestors []string

	// Source provides the gauges of state. It is called at each scrape, possibly
	// concurrently. It must be one consistent read, return soon and do no I/O. The
	// result is neither modified nor kept.
	Source func() State
	// Log receives the errors of scrapes; nil means that they are not logged.
	Log *slog.Logger
}

// Metrics is the agent's registry with its metrics. Its methods are safe for concurrent
// use.
type Metrics struct {
	common
	renewals  *prometheus.CounterVec
	refreshes *prometheus.CounterVec
	syncs     *prometheus.HistogramVec
	attested  *prometheus.HistogramVec
	oversize  prometheus.Counter
}

// New returns the registered metrics. The counters exist at 0 from the start: a counter
// that appears with its first failure hides that failure from rate().
func New(cfg Config) *Metrics {
	m := &Metrics{
		common: newCommon(cfg.Log, "spirl_agent_mint_svid_total", prometheus.HistogramOpts{
			Name:    "spirl_agent_mint_svid_duration_seconds",
			Help:    "Time to obtain one SVID, from making the key to the parsed answer, by type and gRPC status.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
		}, "SVIDs this agent requested from the server, by type and gRPC status of the attempt. Failed attempts count, too, except for entries that the server does not list at present."),
		renewals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "renewd_renewals_total",
			Help: "Attempts to obtain an X.509-SVID for a workload, by reason and outcome. The outcome still_tainted means that a tainted authority signed the answer; the agent retries with backoff.",
		}, []string{"reason", "outcome"}),
		refreshes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "renewd_bundle_refreshes_total",
			Help: "Polls of the trust bundle by outcome. If neither applied nor unchanged increases, this agent does not learn of taints.",
		}, []string{"outcome"}),
		syncs: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "renewd_sync_duration_seconds",
			Help:    "Time of one synchronization of registration entries with the server, by outcome.",
			Buckets: []float64{.001, .005, .01, .05, .1, .5, 1, 5, 10, 30},
		}, []string{"outcome"}),
		attested: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "renewd_workload_attestation_duration_seconds",
			Help:    "Time of one workload attestor for one caller, by attestor and outcome. If failed increases, the caller may lack selectors of this type, and gets Unavailable if an entry could depend on them; the log says why.",
			Buckets: []float64{.0001, .0005, .001, .005, .01, .05, .1, .5, 1, 5, 10, 30},
		}, []string{"attestor", "outcome"}),
		oversize: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "renewd_oversize_answers_total",
			Help: "Workload API answers above 4 MiB, the default limit of gRPC clients. The log names the workload and the remedy.",
		}),
	}
	m.registry.MustRegister(m.renewals, m.refreshes, m.syncs, m.attested, m.oversize)
	m.info("agent", cfg.TrustDomain, cfg.Version, cfg.Deployment)
	if cfg.Source != nil {
		m.registry.MustRegister(stateCollector{cfg.Source, cfg.Process, cfg.Hostname})
	}
	m.zero()
	for _, a := range cfg.Attestors {
		m.attested.WithLabelValues(a, OutcomeOK)
		m.attested.WithLabelValues(a, OutcomeFailed)
	}
	return m
}

// zero creates the series that must exist before the first event.
func (m *Metrics) zero() {
	for _, reason := range []string{ReasonFirst, ReasonHalfLife, ReasonEntry, ReasonTaint, ReasonRemoved} {
		for _, outcome := range []string{RenewalDone, RenewalStillTainted, RenewalRejected, RenewalFailed, RenewalMissing, RenewalDropped} {
			m.renewals.WithLabelValues(reason, outcome)
		}
	}
	for _, outcome := range []string{RefreshApplied, RefreshUnchanged, RefreshRejected, RefreshFailed} {
		m.refreshes.WithLabelValues(outcome)
	}
	m.syncs.WithLabelValues(OutcomeOK)
	m.syncs.WithLabelValues(OutcomeFailed)
}

// Renewed counts one renewal of a workload's X.509-SVID by its reason and
// outcome (the Reason and Renewal constants).
func (m *Metrics) Renewed(reason, outcome string) {
	m.renewals.WithLabelValues(reason, outcome).Inc()
}

// BundleRefreshed counts one poll of the trust bundle by its outcome (the Refresh
// constants).
func (m *Metrics) BundleRefreshed(outcome string) {
	m.refreshes.WithLabelValues(outcome).Inc()
}

// Synced records one synchronization of entries that took d and returned err.
func (m *Metrics) Synced(d time.Duration, err error) {
	m.syncs.WithLabelValues(outcome(err)).Observe(d.Seconds())
}

// Attested records that a workload attestor took d for one caller and returned err.
func (m *Metrics) Attested(attestor string, d time.Duration, err error) {
	m.attested.WithLabelValues(attestor, outcome(err)).Observe(d.Seconds())
}

func outcome(err error) string {
	if err != nil {
		return OutcomeFailed
	}
	return OutcomeOK
}

// Oversized counts one Workload API answer above the default limit of clients.
func (m *Metrics) Oversized() { m.oversize.Inc() }
