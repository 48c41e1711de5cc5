package metrics

import (
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
)

// ServerConfig is what [NewServer] needs. The first three are labels of
// spirl_application_info, which has one series for each deployment.
type ServerConfig struct {
	TrustDomain string
	Deployments []string
	Version     string
	// Federated are the trust domains whose bundles the server follows.
	Federated []string

	// Source provides the gauges of state. It is called at each scrape, possibly
	// concurrently. It must return soon and read each deployment consistently. The
	// result is neither modified nor kept.
	Source func() ServerState
	// Log receives the errors of scrapes; nil means that they are not logged.
	Log *slog.Logger
}

// Server is the signing server's registry with its metrics. Its methods are safe for
// concurrent use.
type Server struct {
	common
	limited   *prometheus.CounterVec
	refreshes *prometheus.CounterVec
}

// limitedMethods are the methods that a server limits by client address.
var limitedMethods = []string{"AttestAgent", "RenewAgent", "BatchNewX509SVID", "NewJWTSVID", "PostStatus", "Report", "connect"}

// NewServer returns the registered metrics of the signing server.
func NewServer(cfg ServerConfig) *Server {
	s := &Server{
		common: newCommon(cfg.Log, "spirl_server_mint_svid_total", prometheus.HistogramOpts{
			Name:    "spirl_server_mint_svid_duration_seconds",
			Help:    "Time to check, sign and record one SVID, by type and gRPC status.",
			Buckets: []float64{.00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
		}, "SVIDs requested from this server, by type and gRPC status of the attempt. Failed attempts count, too."),
		limited: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "renewd_server_limited_total",
			Help: "Calls delayed or rejected by the limits of their client address, by method; connect: rejected connections.",
		}, []string{"method"}),
		refreshes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "renewd_server_federated_bundle_refreshes_total",
			Help: "Requests for the bundle of another trust domain at its endpoint, by outcome. Rejected: the answer was invalid, or older than the current bundle.",
		}, []string{"trust_domain", "outcome"}),
	}
	s.registry.MustRegister(s.limited, s.refreshes)
	s.Follow(cfg.Federated)
	for _, method := range limitedMethods {
		s.limited.WithLabelValues(method)
	}
	s.info("server", cfg.TrustDomain, cfg.Version, cfg.Deployments...)
	if cfg.Source != nil {
		s.registry.MustRegister(serverCollector{cfg.Source})
	}
	return s
}

// Minted counts one SVID that the server was to sign. svidType is [TypeX509] or
// [TypeJWT], took the time from the request to its durable record. Each item of a batch
// is one.
func (s *Server) Minted(svidType string, code codes.Code, took time.Duration) {
	s.common.Minted(svidType, code.String(), took)
}

// Follow makes these the trust domains whose bundles the server follows. The counters of
// others that were followed before stay.
func (s *Server) Follow(trustDomains []string) {
	for _, td := range trustDomains {
		for _, outcome := range []string{RefreshApplied, RefreshUnchanged, RefreshRejected, RefreshFailed} {
			s.refreshes.WithLabelValues(td, outcome)
		}
	}
}

// Limited counts one call that was delayed or rejected by the limits of its client
// address. method has no package or service; it is "connect" for a rejected connection.
func (s *Server) Limited(method string) { s.limited.WithLabelValues(method).Inc() }

// FederatedBundleRefreshed counts one request for the bundle of another trust domain by
// its outcome (the Refresh constants).
func (s *Server) FederatedBundleRefreshed(td, outcome string) {
	s.refreshes.WithLabelValues(td, outcome).Inc()
}

// The modes of automatic rotation.
const (
	RotationOff    = "off"
	RotationOn     = "on"
	RotationPaused = "paused"
)

// ServerState is what the server knows at one moment.
type ServerState struct {
	Deployments []Deployment
	// Federated is when the bundle of each followed trust domain was last received
	// from its endpoint. A zero time leaves out the series.
	Federated map[string]time.Time
	// LeftOut is the number of unusable authorities in the bundle of each followed
	// trust domain.
	LeftOut map[string]int
	// ClockDoubt is how far the clock is ahead of the trusted time, negative if it was
	// set back; zero if the clock is trusted.
	ClockDoubt time.Duration
}

// Deployment is the state of one deployment.
type Deployment struct {
	Name     string // unique
	Keysets  []Keyset
	Sequence uint64 // of the bundle that its agents get
	// Agents are attested, not banned and not expired. AgentsBehind of them have not
	// reported that they have applied the bundle.
	Agents, AgentsBehind int
	AgentsDuplicated     int    // agents whose identity two processes use
	Rotation             string // [RotationOff], ...
}

// Keyset is the state of one keyset. Zero times mean not known and leave their
// series out.
type Keyset struct {
	ID        string         // unique in its deployment
	State     AuthorityState // [StatePrepared], [StateActive] or [StateTainted]
	ExpiresAt time.Time
	// X509SVIDs counts the X.509-SVIDs that it signed, that have not expired and whose
	// holder has not reported a replacement. AgentsHolding counts the holders.
	X509SVIDs, AgentsHolding int
	// JWTExpiry is when the last JWT-SVID that it signed expires.
	JWTExpiry time.Time
	// X509Safe and JWTSafe mean that no valid SVID of the type depends on it. They are
	// exported for tainted keysets, X509Safe as false while either count is not 0:
	// removing a key too early cannot be undone.
	X509Safe, JWTSafe bool
}

// x509Safe applies the rule of [Keyset.X509Safe].
func (k Keyset) x509Safe() bool { return k.X509Safe && k.X509SVIDs == 0 && k.AgentsHolding == 0 }

var (
	descKeysetState = desc("renewd_server_keyset_state",
		"1 for the state that the keyset is in, 0 for the others. Exactly one keyset of a deployment is active.", "deployment", "keyset", "state")
	descKeysetExpiry = desc("renewd_server_keyset_expiry_timestamp_seconds",
		"When the keyset's authorities expire, as Unix time. After that of the active keyset nothing can be signed.", "deployment", "keyset")
	descKeysetSVIDs = desc("renewd_server_keyset_x509_svids",
		"X.509-SVIDs signed by the keyset that have not expired and whose holder has not reported a replacement.", "deployment", "keyset")
	descKeysetHolders = desc("renewd_server_keyset_agents_holding",
		"Agents that could hold an X.509-SVID signed by the keyset. An agent that does not report counts until its SVIDs expire.", "deployment", "keyset")
	descKeysetJWT = desc("renewd_server_keyset_jwt_latest_expiry_timestamp_seconds",
		"When the last JWT-SVID signed by the keyset expires, as Unix time.", "deployment", "keyset")
	descKeysetSafe = desc("renewd_server_keyset_safe",
		"1 if no valid SVID of the type depends on the tainted keyset: it is safe to remove.", "deployment", "keyset", "svid_type")
	descAgents = desc("renewd_server_agents",
		"Agents that are attested, not banned and not expired.", "deployment")
	descBehind = desc("renewd_server_agents_behind",
		"Agents that have not reported that they have applied the current trust bundle.", "deployment")
	descDuplicated = desc("renewd_server_agents_duplicated",
		"Agents whose identity two processes use, such as those of a node and its clone. Their SVIDs count until they expire: evict them, and attest each node with a join token of its own.", "deployment")
	descServerSequence = desc("renewd_server_bundle_sequence_number",
		"Sequence number of the trust bundle that the deployment's agents get.", "deployment")
	descRotation = desc("renewd_server_rotation_mode",
		"1 for the mode that automatic rotation is in, 0 for the others.", "deployment", "mode")
	descFederated = desc("renewd_server_federated_bundle_refreshed_timestamp_seconds",
		"When the bundle of another trust domain was last received from its endpoint, as Unix time. After a restart, when the current one was.", "trust_domain")
	descFederatedLeftOut = desc("renewd_server_federated_authorities_left_out",
		"Unusable authorities in the bundle of another trust domain, which are left out. The log names them.", "trust_domain")
	descClockDoubt = desc("renewd_server_clock_doubt_seconds",
		"How far the server's clock is ahead of the time that its uptime confirms, below 0 if it was set back; 0 if the clock is trusted. See server clock show: set the clock, or confirm it.")

	serverDescs = []*prometheus.Desc{descKeysetState, descKeysetExpiry, descKeysetSVIDs, descKeysetHolders,
		descKeysetJWT, descKeysetSafe, descAgents, descBehind, descDuplicated, descServerSequence, descRotation, descFederated, descFederatedLeftOut, descClockDoubt}
)

// serverCollector exports one snapshot for each scrape.
type serverCollector struct{ source func() ServerState }

func (c serverCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range serverDescs {
		ch <- d
	}
}

func (c serverCollector) Collect(ch chan<- prometheus.Metric) {
	gauge, stamp := exporters(ch)
	state := c.source()
	gauge(descClockDoubt, state.ClockDoubt.Seconds())
	for td, at := range state.Federated {
		stamp(descFederated, at, td)
	}
	for td, n := range state.LeftOut {
		gauge(descFederatedLeftOut, float64(n), td)
	}
	for _, d := range state.Deployments {
		gauge(descAgents, float64(d.Agents), d.Name)
		gauge(descBehind, float64(d.AgentsBehind), d.Name)
		gauge(descDuplicated, float64(d.AgentsDuplicated), d.Name)
		gauge(descServerSequence, float64(d.Sequence), d.Name)
		for _, mode := range []string{RotationOff, RotationOn, RotationPaused} {
			gauge(descRotation, boolValue(mode == d.Rotation), d.Name, mode)
		}
		for _, k := range d.Keysets {
			for _, state := range []AuthorityState{StatePrepared, StateActive, StateTainted} {
				gauge(descKeysetState, boolValue(state == k.State), d.Name, k.ID, state.String())
			}
			stamp(descKeysetExpiry, k.ExpiresAt, d.Name, k.ID)
			gauge(descKeysetSVIDs, float64(k.X509SVIDs), d.Name, k.ID)
			gauge(descKeysetHolders, float64(k.AgentsHolding), d.Name, k.ID)
			stamp(descKeysetJWT, k.JWTExpiry, d.Name, k.ID)
			if k.State == StateTainted {
				gauge(descKeysetSafe, boolValue(k.x509Safe()), d.Name, k.ID, TypeX509)
				gauge(descKeysetSafe, boolValue(k.JWTSafe), d.Name, k.ID, TypeJWT)
			}
		}
	}
}
