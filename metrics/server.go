package metrics

import (
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
)

// DefaultServerAddress is where the signing server's [Serve] listens unless told
// otherwise: beside an agent on the same machine.
const DefaultServerAddress = "127.0.0.1:9091"

// ServerConfig is what [NewServer] needs. The first three are labels of
// spirl_application_info, which has one series for each deployment.
type ServerConfig struct {
	TrustDomain string
	Deployments []string
	Version     string
	// Federated are the trust domains whose bundles the server follows.
	Federated []string

	// Source gives the gauges of state. It is called at each scrape, possibly
	// from several goroutines at once.
	Source ServerSource
	// Log takes what goes wrong while a scrape is answered. Nothing is logged
	// when nil.
	Log *slog.Logger
}

// Server is the signing server's one registry and all that is in it. Its
// methods are safe for concurrent use.
type Server struct {
	common
	limited   *prometheus.CounterVec
	refreshes *prometheus.CounterVec
}

// limitedMethods are what a server limits by client address.
var limitedMethods = []string{"AttestAgent", "RenewAgent", "BatchNewX509SVID", "NewJWTSVID", "PostStatus", "Report", "connect"}

// NewServer makes the metrics of the signing server and registers them.
func NewServer(cfg ServerConfig) *Server {
	s := &Server{
		common: newCommon(cfg.Log, "spirl_server_mint_svid_total", prometheus.HistogramOpts{
			Name:    "spirl_server_mint_svid_duration_seconds",
			Help:    "Time to check, sign and record one SVID, by type and gRPC status.",
			Buckets: []float64{.00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
		}, "SVIDs this server was asked to sign, by type and gRPC status of the attempt. Failed attempts count too."),
		limited: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "renewd_server_limited_total",
			Help: "Calls that had to wait, or were refused, because their client address made more than it may, by method; connect: connections that were refused.",
		}, []string{"method"}),
		refreshes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "renewd_server_federated_bundle_refreshes_total",
			Help: "Times that the bundle of another trust domain was asked for at its endpoint, by outcome. Rejected: the answer could not be right, or was older than what is held.",
		}, []string{"trust_domain", "outcome"}),
	}
	s.registry.MustRegister(s.limited, s.refreshes)
	for _, td := range cfg.Federated {
		for _, outcome := range []string{RefreshApplied, RefreshUnchanged, RefreshRejected, RefreshFailed} {
			s.refreshes.WithLabelValues(td, outcome)
		}
	}
	for _, method := range limitedMethods {
		s.limited.WithLabelValues(method)
	}
	s.info("server", cfg.TrustDomain, cfg.Version, cfg.Deployments...)
	if cfg.Source != nil {
		s.registry.MustRegister(serverCollector{cfg.Source})
	}
	return s
}

// Minted counts one SVID that the server was asked to sign. svidType is
// [TypeX509] or [TypeJWT], took the time from the request to the durable record
// of it. Of a batch, each item is one.
func (s *Server) Minted(svidType string, code codes.Code, took time.Duration) {
	s.minted(svidType, code.String(), took)
}

// Limited counts one call that had to wait or was refused because its client
// made more than it may. method has no package or service; it is "connect" for
// a connection that was refused.
func (s *Server) Limited(method string) { s.limited.WithLabelValues(method).Inc() }

// FederatedBundleRefreshed counts one time that the bundle of another trust domain
// was asked for by its outcome (the Refresh constants).
func (s *Server) FederatedBundleRefreshed(td, outcome string) {
	s.refreshes.WithLabelValues(td, outcome).Inc()
}

// The modes of automatic rotation.
const (
	RotationOff    = "off"
	RotationOn     = "on"
	RotationPaused = "paused"
)

// ServerSource gives the state of the signing server. Snapshot must return soon
// and be safe for concurrent use, and what it says of a deployment must be one
// consistent read. What it returns is not modified and not kept.
type ServerSource interface {
	Snapshot() ServerState
}

// ServerSourceFunc is a function used as a [ServerSource].
type ServerSourceFunc func() ServerState

// Snapshot calls f.
func (f ServerSourceFunc) Snapshot() ServerState { return f() }

// ServerState is what the server knows at one moment.
type ServerState struct {
	Deployments []Deployment
	// Federated are when the bundle of each trust domain that the server follows
	// last came from its endpoint. Those with a zero time are left out.
	Federated map[string]time.Time
	// LeftOut is how many authorities of the bundle held of each trust domain that
	// the server follows cannot be used.
	LeftOut map[string]int
	// ClockDoubt is by how much the clock went ahead, or was set back and then
	// negative, without being believed yet; zero when it is.
	ClockDoubt time.Duration
}

// Deployment is the state of one deployment.
type Deployment struct {
	Name     string // unique
	Keysets  []Keyset
	Sequence uint64 // of the bundle that its agents get
	// Agents are those that are attested, not banned and not expired;
	// AgentsBehind those of them that have not said that they have applied the
	// bundle.
	Agents, AgentsBehind int
	AgentsDuplicated     int    // those of them whose identity two processes use
	Rotation             string // [RotationOff], ...
}

// Keyset is the state of one keyset. Zero times mean not known and leave their
// series out.
type Keyset struct {
	ID        string         // unique in its deployment
	State     AuthorityState // [StatePrepared], [StateActive] or [StateTainted]
	ExpiresAt time.Time
	// X509SVIDs are those that it signed, that have not expired and that their
	// holder has not said to have replaced; AgentsHolding are the holders.
	X509SVIDs, AgentsHolding int
	// JWTExpiry is when the last JWT-SVID that it signed ends.
	JWTExpiry time.Time
	// X509Safe and JWTSafe say that it can be removed without taking a valid SVID
	// of the kind from anybody. They are exported of tainted keysets, X509Safe
	// as false while either count is not 0: removing a key early is the one
	// mistake that cannot be taken back.
	X509Safe, JWTSafe bool
}

// x509Safe applies the rule of [Keyset.X509Safe].
func (k Keyset) x509Safe() bool { return k.X509Safe && k.X509SVIDs == 0 && k.AgentsHolding == 0 }

var (
	descKeysetState = desc("renewd_server_keyset_state",
		"1 for the state that the keyset is in, 0 for the others. Exactly one keyset of a deployment is active.", "deployment", "keyset", "state")
	descKeysetExpiry = desc("renewd_server_keyset_expiry_timestamp_seconds",
		"When the keyset's authorities end, as Unix time. Past that of the active keyset nothing can be signed.", "deployment", "keyset")
	descKeysetSVIDs = desc("renewd_server_keyset_x509_svids",
		"X.509-SVIDs signed by the keyset that have not expired and that their holder has not reported as replaced.", "deployment", "keyset")
	descKeysetHolders = desc("renewd_server_keyset_agents_holding",
		"Agents that could hold an X.509-SVID signed by the keyset. An agent that does not report counts until its SVIDs expire.", "deployment", "keyset")
	descKeysetJWT = desc("renewd_server_keyset_jwt_latest_expiry_timestamp_seconds",
		"When the last JWT-SVID signed by the keyset ends, as Unix time.", "deployment", "keyset")
	descKeysetSafe = desc("renewd_server_keyset_safe",
		"1 when the tainted keyset can be removed without taking a valid SVID of the type from anybody.", "deployment", "keyset", "svid_type")
	descAgents = desc("renewd_server_agents",
		"Agents that are attested, not banned and not expired.", "deployment")
	descBehind = desc("renewd_server_agents_behind",
		"Agents that have not reported to have applied the current trust bundle.", "deployment")
	descDuplicated = desc("renewd_server_agents_duplicated",
		"Agents whose identity two processes use, such as those of a node and its clone. Their SVIDs count until they expire: evict them, and attest each node with a join token of its own.", "deployment")
	descServerSequence = desc("renewd_server_bundle_sequence_number",
		"Sequence number of the trust bundle that the deployment's agents get.", "deployment")
	descRotation = desc("renewd_server_rotation_mode",
		"1 for the mode that automatic rotation is in, 0 for the others.", "deployment", "mode")
	descFederated = desc("renewd_server_federated_bundle_refreshed_timestamp_seconds",
		"When the bundle of another trust domain last came from its endpoint, as Unix time. After a restart, when the one held did.", "trust_domain")
	descFederatedLeftOut = desc("renewd_server_federated_authorities_left_out",
		"Authorities in the bundle of another trust domain that cannot be used and are left out. The log names them.", "trust_domain")
	descClockDoubt = desc("renewd_server_clock_doubt_seconds",
		"By how much the server's clock went ahead of what its uptime explains, below 0 when it was set back, while that is not believed. See server clock show: set the clock, or confirm it.")

	serverDescs = []*prometheus.Desc{descKeysetState, descKeysetExpiry, descKeysetSVIDs, descKeysetHolders,
		descKeysetJWT, descKeysetSafe, descAgents, descBehind, descDuplicated, descServerSequence, descRotation, descFederated, descFederatedLeftOut, descClockDoubt}
)

// serverCollector exports one snapshot for each scrape.
type serverCollector struct{ source ServerSource }

func (c serverCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range serverDescs {
		ch <- d
	}
}

func (c serverCollector) Collect(ch chan<- prometheus.Metric) {
	gauge, stamp := exporters(ch)
	state := c.source.Snapshot()
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
			gauge(descRotation, truth(mode == d.Rotation), d.Name, mode)
		}
		for _, k := range d.Keysets {
			for _, state := range []AuthorityState{StatePrepared, StateActive, StateTainted} {
				gauge(descKeysetState, truth(state == k.State), d.Name, k.ID, state.String())
			}
			stamp(descKeysetExpiry, k.ExpiresAt, d.Name, k.ID)
			gauge(descKeysetSVIDs, float64(k.X509SVIDs), d.Name, k.ID)
			gauge(descKeysetHolders, float64(k.AgentsHolding), d.Name, k.ID)
			stamp(descKeysetJWT, k.JWTExpiry, d.Name, k.ID)
			if k.State == StateTainted {
				gauge(descKeysetSafe, truth(k.x509Safe()), d.Name, k.ID, TypeX509)
				gauge(descKeysetSafe, truth(k.JWTSafe), d.Name, k.ID, TypeJWT)
			}
		}
	}
}
