package metrics_test

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/renewd/renewd/metrics"
)

// rotation is a server with two deployments, one in the middle of a rotation.
func rotation() metrics.ServerState {
	at := time.Unix(1_700_000_000, 500e6)
	return metrics.ServerState{Deployments: []metrics.Deployment{
		{
			Name: "east", Sequence: 9, Agents: 3, AgentsBehind: 1, AgentsDuplicated: 2, Rotation: metrics.RotationPaused,
			Keysets: []metrics.Keyset{
				{ID: "ks_a", State: metrics.StateTainted, ExpiresAt: at, X509SVIDs: 7, AgentsHolding: 2, JWTExpiry: at.Add(time.Hour), JWTSafe: true},
				{ID: "ks_b", State: metrics.StateActive, ExpiresAt: at.Add(2 * time.Hour), X509SVIDs: 5, AgentsHolding: 3},
			},
		},
		{Name: "west", Sequence: 2, Rotation: metrics.RotationOn},
	}, Federated: map[string]time.Time{"partner.example": at, "new.example": {}}, LeftOut: map[string]int{"partner.example": 2}, ClockDoubt: -90 * time.Minute}
}

func newServer(state func() metrics.ServerState) *metrics.Server {
	return metrics.NewServer(metrics.ServerConfig{
		TrustDomain: "example.org", Deployments: []string{"east", "west"}, Version: "v1.2.3", Source: state,
		Federated: []string{"partner.example"},
	})
}

func TestServerState(t *testing.T) {
	t.Parallel()
	want := `
# HELP renewd_server_agents Agents that are attested, not banned and not expired.
# TYPE renewd_server_agents gauge
renewd_server_agents{deployment="east"} 3
renewd_server_agents{deployment="west"} 0
# HELP renewd_server_agents_behind Agents that have not reported that they have applied the current trust bundle.
# TYPE renewd_server_agents_behind gauge
renewd_server_agents_behind{deployment="east"} 1
renewd_server_agents_behind{deployment="west"} 0
# HELP renewd_server_agents_duplicated Agents whose identity two processes use, such as those of a node and its clone. Their SVIDs count until they expire: evict them, and attest each node with a join token of its own.
# TYPE renewd_server_agents_duplicated gauge
renewd_server_agents_duplicated{deployment="east"} 2
renewd_server_agents_duplicated{deployment="west"} 0
# HELP renewd_server_bundle_sequence_number Sequence number of the trust bundle that the deployment's agents get.
# TYPE renewd_server_bundle_sequence_number gauge
renewd_server_bundle_sequence_number{deployment="east"} 9
renewd_server_bundle_sequence_number{deployment="west"} 2
# HELP renewd_server_clock_doubt_seconds How far the server's clock is ahead of the time that its uptime confirms, below 0 if it was set back; 0 if the clock is trusted. See server clock show: set the clock, or confirm it.
# TYPE renewd_server_clock_doubt_seconds gauge
renewd_server_clock_doubt_seconds -5400
# HELP renewd_server_federated_authorities_left_out Unusable authorities in the bundle of another trust domain, which are left out. The log names them.
# TYPE renewd_server_federated_authorities_left_out gauge
renewd_server_federated_authorities_left_out{trust_domain="partner.example"} 2
# HELP renewd_server_federated_bundle_refreshed_timestamp_seconds When the bundle of another trust domain was last received from its endpoint, as Unix time. After a restart, when the current one was.
# TYPE renewd_server_federated_bundle_refreshed_timestamp_seconds gauge
renewd_server_federated_bundle_refreshed_timestamp_seconds{trust_domain="partner.example"} 1.7000000005e+09
# HELP renewd_server_keyset_agents_holding Agents that could hold an X.509-SVID signed by the keyset. An agent that does not report counts until its SVIDs expire.
# TYPE renewd_server_keyset_agents_holding gauge
renewd_server_keyset_agents_holding{deployment="east",keyset="ks_a"} 2
renewd_server_keyset_agents_holding{deployment="east",keyset="ks_b"} 3
# HELP renewd_server_keyset_expiry_timestamp_seconds When the keyset's authorities expire, as Unix time. After that of the active keyset nothing can be signed.
# TYPE renewd_server_keyset_expiry_timestamp_seconds gauge
renewd_server_keyset_expiry_timestamp_seconds{deployment="east",keyset="ks_a"} 1.7000000005e+09
renewd_server_keyset_expiry_timestamp_seconds{deployment="east",keyset="ks_b"} 1.7000072005e+09
# HELP renewd_server_keyset_jwt_latest_expiry_timestamp_seconds When the last JWT-SVID signed by the keyset expires, as Unix time.
# TYPE renewd_server_keyset_jwt_latest_expiry_timestamp_seconds gauge
renewd_server_keyset_jwt_latest_expiry_timestamp_seconds{deployment="east",keyset="ks_a"} 1.7000036005e+09
# HELP renewd_server_keyset_safe 1 if no valid SVID of the type depends on the tainted keyset: it is safe to remove.
# TYPE renewd_server_keyset_safe gauge
renewd_server_keyset_safe{deployment="east",keyset="ks_a",svid_type="jwt"} 1
renewd_server_keyset_safe{deployment="east",keyset="ks_a",svid_type="x509"} 0
# HELP renewd_server_keyset_state 1 for the state that the keyset is in, 0 for the others. Exactly one keyset of a deployment is active.
# TYPE renewd_server_keyset_state gauge
renewd_server_keyset_state{deployment="east",keyset="ks_a",state="active"} 0
renewd_server_keyset_state{deployment="east",keyset="ks_a",state="prepared"} 0
renewd_server_keyset_state{deployment="east",keyset="ks_a",state="tainted"} 1
renewd_server_keyset_state{deployment="east",keyset="ks_b",state="active"} 1
renewd_server_keyset_state{deployment="east",keyset="ks_b",state="prepared"} 0
renewd_server_keyset_state{deployment="east",keyset="ks_b",state="tainted"} 0
# HELP renewd_server_keyset_x509_svids X.509-SVIDs signed by the keyset that have not expired and whose holder has not reported a replacement.
# TYPE renewd_server_keyset_x509_svids gauge
renewd_server_keyset_x509_svids{deployment="east",keyset="ks_a"} 7
renewd_server_keyset_x509_svids{deployment="east",keyset="ks_b"} 5
# HELP renewd_server_rotation_mode 1 for the mode that automatic rotation is in, 0 for the others.
# TYPE renewd_server_rotation_mode gauge
renewd_server_rotation_mode{deployment="east",mode="off"} 0
renewd_server_rotation_mode{deployment="east",mode="on"} 0
renewd_server_rotation_mode{deployment="east",mode="paused"} 1
renewd_server_rotation_mode{deployment="west",mode="off"} 0
renewd_server_rotation_mode{deployment="west",mode="on"} 1
renewd_server_rotation_mode{deployment="west",mode="paused"} 0
`
	var names []string
	for _, line := range strings.Split(want, "\n") {
		if fields := strings.Fields(line); len(fields) > 2 && fields[1] == "TYPE" {
			names = append(names, fields[2])
		}
	}
	if err := testutil.GatherAndCompare(newServer(rotation).Registry(), strings.NewReader(want), names...); err != nil {
		t.Error(err)
	}
}

// Safe is 1 only for a tainted keyset that the server reports as safe and whose counts
// are all 0.
func TestServerSafeNeedsEverything(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		k     metrics.Keyset
		state metrics.AuthorityState
		want  float64
	}{
		{"safe", metrics.Keyset{X509Safe: true}, metrics.StateTainted, 1},
		{"not claimed", metrics.Keyset{}, metrics.StateTainted, 0},
		{"live", metrics.Keyset{X509Safe: true, X509SVIDs: 1}, metrics.StateTainted, 0},
		{"held", metrics.Keyset{X509Safe: true, AgentsHolding: 1}, metrics.StateTainted, 0},
		{"prepared", metrics.Keyset{X509Safe: true, JWTSafe: true}, metrics.StatePrepared, -1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			tt.k.State = tt.state
			s := newServer(func() metrics.ServerState {
				return metrics.ServerState{Deployments: []metrics.Deployment{{Keysets: []metrics.Keyset{tt.k}}}}
			})
			got := -1.0
			if m := series(t, s, "renewd_server_keyset_safe", "svid_type=x509"); m != nil {
				got = m.GetGauge().GetValue()
			}
			if got != tt.want {
				t.Errorf("safe = %v, want %v", got, tt.want)
			}
		})
	}
}

// The names and labels that dashboards outside this project read, and the series that
// must be there at 0 before the first event.
func TestServerNames(t *testing.T) {
	t.Parallel()
	s := newServer(rotation)
	for _, want := range []struct {
		name   string
		labels []string
	}{
		{"spirl_server_mint_svid_total", []string{"svid_type=x509", "status_code=OK"}},
		{"spirl_server_mint_svid_total", []string{"svid_type=jwt", "status_code=Unavailable"}},
		{"spirl_server_mint_svid_duration_seconds", []string{"svid_type=jwt", "status_code=OK"}},
		{"spirl_application_info", []string{"spirl_trust_domain=example.org", "spirl_trust_domain_deployment=east", "spirl_app_version=v1.2.3", "spirl_component=server"}},
		{"spirl_application_info", []string{"spirl_trust_domain=example.org", "spirl_trust_domain_deployment=west", "spirl_app_version=v1.2.3", "spirl_component=server"}},
		{"renewd_server_limited_total", []string{"method=AttestAgent"}},
		{"renewd_server_limited_total", []string{"method=connect"}},
		{"renewd_server_federated_bundle_refreshes_total", []string{"trust_domain=partner.example", "outcome=applied"}},
		{"renewd_server_federated_bundle_refreshes_total", []string{"trust_domain=partner.example", "outcome=rejected"}},
		{"go_goroutines", nil},
		{"process_start_time_seconds", nil},
	} {
		m := series(t, s, want.name, want.labels...)
		if m == nil {
			t.Errorf("%s%v is missing", want.name, want.labels)
		} else if len(m.GetLabel()) != len(want.labels) {
			t.Errorf("%s has labels %v, want exactly %v", want.name, m.GetLabel(), want.labels)
		}
	}
}

func TestServerEvents(t *testing.T) {
	t.Parallel()
	s := newServer(rotation)
	s.Minted(metrics.TypeX509, codes.OK, 40*time.Millisecond)
	s.Minted(metrics.TypeX509, codes.Unavailable, time.Second)
	s.Limited("PostStatus")
	s.FederatedBundleRefreshed("partner.example", metrics.RefreshFailed)
	if got := series(t, s, "renewd_server_federated_bundle_refreshes_total", "trust_domain=partner.example", "outcome=failed").GetCounter().GetValue(); got != 1 {
		t.Errorf("refreshes = %v, want 1", got)
	}
	if got := series(t, s, "renewd_server_limited_total", "method=PostStatus").GetCounter().GetValue(); got != 1 {
		t.Errorf("limited = %v, want 1", got)
	}
	if got := series(t, s, "spirl_server_mint_svid_total", "svid_type=x509", "status_code=Unavailable").GetCounter().GetValue(); got != 1 {
		t.Errorf("minted = %v, want 1", got)
	}
	if h := series(t, s, "spirl_server_mint_svid_duration_seconds", "svid_type=x509", "status_code=OK").GetHistogram(); h.GetSampleSum() != 0.04 {
		t.Errorf("mint duration sum = %v s, want 0.04", h.GetSampleSum())
	}
}

// Several gRPC servers, one for each deployment, are counted together, and initializing
// one does not reset another.
func TestServerGRPC(t *testing.T) {
	t.Parallel()
	s := newServer(rotation)
	for range 2 {
		srv := grpc.NewServer(s.ServerOptions()...)
		healthpb.RegisterHealthServer(srv, health.NewServer())
		s.InitServer(srv)
		if _, err := healthpb.NewHealthClient(dial(t, srv)).Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	if got := series(t, s, "grpc_server_handled_total", "grpc_method=Check", "grpc_code=OK").GetCounter().GetValue(); got != 2 {
		t.Errorf("handled = %v, want 2", got)
	}
	if series(t, s, "grpc_server_started_total", "grpc_method=Watch") == nil {
		t.Error("grpc_server_started_total is missing before the first call")
	}
}

// The server's metrics are served by the same listener as the agent's.
func TestServeServer(t *testing.T) {
	t.Parallel()
	url := serve(t, metrics.HTTPConfig{Metrics: newServer(rotation)})
	code, body := get(t, request(t, http.MethodGet, url+"/metrics"))
	if want := `renewd_server_agents{deployment="east"} 3`; code != http.StatusOK || !strings.Contains(body, want) {
		t.Errorf("%d without %s", code, want)
	}
}
