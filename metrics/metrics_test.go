package metrics_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/renewd/renewd/metrics"
)

// wave is the state in the middle of a rotation.
func wave() metrics.State {
	at := time.Unix(1_700_000_000, 500e6)
	return metrics.State{
		Authorities: []metrics.Authority{
			{Type: metrics.TypeX509, ID: "aa", State: metrics.StateActive, Held: 7, Pending: 9, Streams: 9},
			{Type: metrics.TypeX509, ID: "bb", State: metrics.StatePrepared},
			{Type: metrics.TypeX509, ID: "cc", State: metrics.StateTainted, Held: 3, Pending: 2, Streams: 1},
			{Type: metrics.TypeX509, ID: "dd", State: metrics.StateSettled},
			{Type: metrics.TypeX509, ID: "ee", State: metrics.StateRemoved, Held: 1, Pending: 1},
			{Type: metrics.TypeJWT, ID: "k1", State: metrics.StateTainted, Held: 4},
		},
		OwnID:          "spiffe://example.org/spire/agent/join_token/1",
		OwnExpiry:      at.Add(time.Hour),
		BundleApplied:  at,
		BundleSequence: 42,
		LeftOut:        []metrics.LeftOut{{Bundle: metrics.BundleOwn, Type: metrics.TypeJWT, Count: 2}, {Bundle: metrics.BundleFederated, Type: metrics.TypeUnknown}},
		Expiring:       map[string]int{metrics.TypeX509: 5},
		JWTExpiry:      map[string]time.Time{"k1": at.Add(2 * time.Hour)},
		Streams:        map[string]int{metrics.RPCX509SVID: 6},
		SVIDs:          map[string]int{"waiting": 0, "minting": 0, "fresh": 7, "due": 0, "backing_off": 1, "stale": 2, "expired": 0},
		EntriesMissing: 2,
	}
}

func newMetrics(s func() metrics.State) *metrics.Metrics {
	return metrics.New(metrics.Config{
		TrustDomain: "example.org", Deployment: "prod", Version: "v1.2.3", Process: "p1", Hostname: "node-1",
		Source: s,
	})
}

func TestState(t *testing.T) {
	t.Parallel()
	m := newMetrics(wave)
	want := `
# HELP renewd_agent_svid_expiry_timestamp_seconds When the agent SVID expires, as Unix time. After that the agent has to re-attest.
# TYPE renewd_agent_svid_expiry_timestamp_seconds gauge
renewd_agent_svid_expiry_timestamp_seconds{spiffe_id="spiffe://example.org/spire/agent/join_token/1"} 1.7000036005e+09
# HELP renewd_bundle_applied_timestamp_seconds When the current trust bundle was applied, as Unix time.
# TYPE renewd_bundle_applied_timestamp_seconds gauge
renewd_bundle_applied_timestamp_seconds 1.7000000005e+09
# HELP renewd_bundle_authorities_left_out Unusable authorities in the current trust bundles, which are left out, by bundle (own, federated) and type. The log names them.
# TYPE renewd_bundle_authorities_left_out gauge
renewd_bundle_authorities_left_out{bundle="federated",svid_type="unknown"} 0
renewd_bundle_authorities_left_out{bundle="own",svid_type="jwt"} 2
# HELP renewd_bundle_sequence_number Sequence number of the current trust bundle. Nodes that lag behind show a lower one.
# TYPE renewd_bundle_sequence_number gauge
renewd_bundle_sequence_number 42
# HELP renewd_entries_missing Registration entries that the server does not list at present and that this node still serves. Deleted entries are dropped after entry_removal_delay. If this stays above 0, the server's answers change.
# TYPE renewd_entries_missing gauge
renewd_entries_missing 2
# HELP renewd_jwt_svid_latest_expiry_timestamp_seconds When the last JWT-SVID that this node handed out with the key expires, as Unix time. After that no token of this node depends on the key.
# TYPE renewd_jwt_svid_latest_expiry_timestamp_seconds gauge
renewd_jwt_svid_latest_expiry_timestamp_seconds{key_id="k1"} 1.7000072005e+09
# HELP renewd_streams_open Open Workload API streams by RPC.
# TYPE renewd_streams_open gauge
renewd_streams_open{rpc="FetchJWTBundles"} 0
renewd_streams_open{rpc="FetchX509Bundles"} 0
renewd_streams_open{rpc="FetchX509SVID"} 6
# HELP renewd_svids Registration entries whose X.509-SVID this node is to hold, by its state: waiting for the first one, minting, fresh, due, backing_off after a failure, stale (tainted authority, the node's delay is not over) or expired.
# TYPE renewd_svids gauge
renewd_svids{state="backing_off"} 1
renewd_svids{state="due"} 0
renewd_svids{state="expired"} 0
renewd_svids{state="fresh"} 7
renewd_svids{state="minting"} 0
renewd_svids{state="stale"} 2
renewd_svids{state="waiting"} 0
# HELP renewd_svids_held SVIDs this node holds for its workloads, by the authority that signed them and its state.
# TYPE renewd_svids_held gauge
renewd_svids_held{authority="aa",state="active",svid_type="x509"} 7
renewd_svids_held{authority="bb",state="prepared",svid_type="x509"} 0
renewd_svids_held{authority="cc",state="tainted",svid_type="x509"} 3
renewd_svids_held{authority="dd",state="tainted",svid_type="x509"} 0
renewd_svids_held{authority="ee",state="removed",svid_type="x509"} 1
renewd_svids_held{authority="k1",state="tainted",svid_type="jwt"} 4
# HELP renewd_taint_renewals_pending SVIDs of a tainted or removed authority that wait for their renewal.
# TYPE renewd_taint_renewals_pending gauge
renewd_taint_renewals_pending{authority="cc"} 2
renewd_taint_renewals_pending{authority="dd"} 0
renewd_taint_renewals_pending{authority="ee"} 1
# HELP renewd_taint_settled 1 if nothing on this node depends on the tainted authority: as far as this node knows, it is safe to remove. Remove the key only when all nodes show 1.
# TYPE renewd_taint_settled gauge
renewd_taint_settled{authority="cc"} 0
renewd_taint_settled{authority="dd"} 1
# HELP renewd_taint_streams_waiting Open Workload API streams, and workload processes whose streams have ended, that were sent an SVID of a tainted or removed authority and have not read its replacement.
# TYPE renewd_taint_streams_waiting gauge
renewd_taint_streams_waiting{authority="cc"} 1
renewd_taint_streams_waiting{authority="dd"} 0
renewd_taint_streams_waiting{authority="ee"} 0
# HELP spirl_agent_svid_expiring SVIDs held that are more than a minute past half of their life and not renewed. If this stays above 0, renewals fail.
# TYPE spirl_agent_svid_expiring gauge
spirl_agent_svid_expiring{svid_type="jwt"} 0
spirl_agent_svid_expiring{svid_type="x509"} 5
`
	if err := testutil.GatherAndCompare(m.Registry(), strings.NewReader(want),
		"renewd_agent_svid_expiry_timestamp_seconds", "renewd_bundle_applied_timestamp_seconds",
		"renewd_bundle_authorities_left_out", "renewd_bundle_sequence_number", "renewd_entries_missing", "renewd_jwt_svid_latest_expiry_timestamp_seconds",
		"renewd_streams_open", "renewd_svids", "renewd_svids_held", "renewd_taint_renewals_pending",
		"renewd_taint_settled", "renewd_taint_streams_waiting", "spirl_agent_svid_expiring"); err != nil {
		t.Error(err)
	}
}

// Settled is 1 only for a settled authority whose counts are all 0.
func TestSettledNeedsEverything(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		a    metrics.Authority
		want float64
	}{
		{"all gone", metrics.Authority{State: metrics.StateSettled}, 1},
		{"not claimed", metrics.Authority{State: metrics.StateTainted}, 0},
		{"held", metrics.Authority{State: metrics.StateSettled, Held: 1}, 0},
		{"pending", metrics.Authority{State: metrics.StateSettled, Pending: 1}, 0},
		{"streams", metrics.Authority{State: metrics.StateSettled, Streams: 1}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			tt.a.Type, tt.a.ID = metrics.TypeX509, "aa"
			m := newMetrics(func() metrics.State {
				return metrics.State{Authorities: []metrics.Authority{tt.a}}
			})
			if got := series(t, m, "renewd_taint_settled", "authority=aa"); got == nil || got.GetGauge().GetValue() != tt.want {
				t.Errorf("settled = %v, want %v", got, tt.want)
			}
		})
	}
}

// An unknown time has no series: a 0 would be a time in 1970.
func TestUnknownIsAbsent(t *testing.T) {
	t.Parallel()
	m := newMetrics(func() metrics.State { return metrics.State{} })
	for _, name := range []string{"renewd_agent_svid_expiry_timestamp_seconds",
		"renewd_bundle_applied_timestamp_seconds", "renewd_bundle_sequence_number"} {
		if s := series(t, m, name); s != nil {
			t.Errorf("%s is there: %v", name, s)
		}
	}
	if series(t, m, "renewd_streams_open", "rpc=FetchX509SVID") == nil {
		t.Error("renewd_streams_open is not there at 0")
	}
}

func TestBadLabelDoesNotPanic(t *testing.T) {
	t.Parallel()
	m := newMetrics(func() metrics.State {
		return metrics.State{JWTExpiry: map[string]time.Time{"k\xff": time.Unix(1, 0)}}
	})
	if series(t, m, "renewd_jwt_svid_latest_expiry_timestamp_seconds", "key_id=k\uFFFD") == nil {
		t.Error("the key with a broken ID is not exported")
	}
}

// renewd_agent_info identifies the agent and its process.
func TestAgentInfo(t *testing.T) {
	t.Parallel()
	s := series(t, newMetrics(wave), "renewd_agent_info", "spiffe_id=spiffe://example.org/spire/agent/join_token/1", "process_id=p1", "hostname=node-1")
	if s == nil || s.GetGauge().GetValue() != 1 {
		t.Errorf("renewd_agent_info is missing: %v", s)
	}
}

// The names and labels that dashboards outside this project read, and the series that
// must be there at 0 before the first event.
func TestNames(t *testing.T) {
	t.Parallel()
	m := newMetrics(wave)
	for _, want := range []struct {
		name   string
		labels []string
	}{
		{"spirl_agent_mint_svid_total", []string{"svid_type=x509", "status_code=OK"}},
		{"spirl_agent_mint_svid_total", []string{"svid_type=jwt", "status_code=DeadlineExceeded"}},
		{"spirl_agent_mint_svid_duration_seconds", []string{"svid_type=x509", "status_code=OK"}},
		{"spirl_agent_svid_expiring", []string{"svid_type=x509"}},
		{"spirl_application_info", []string{"spirl_trust_domain=example.org", "spirl_trust_domain_deployment=prod", "spirl_app_version=v1.2.3", "spirl_component=agent"}},
		{"renewd_renewals_total", []string{"reason=taint", "outcome=still_tainted"}},
		{"renewd_bundle_refreshes_total", []string{"outcome=failed"}},
		{"renewd_sync_duration_seconds", []string{"outcome=ok"}},
		{"renewd_oversize_answers_total", nil},
		{"go_goroutines", nil},
		{"process_start_time_seconds", nil},
	} {
		s := series(t, m, want.name, want.labels...)
		if s == nil {
			t.Errorf("%s%v is missing", want.name, want.labels)
		} else if len(s.GetLabel()) != len(want.labels) {
			t.Errorf("%s has labels %v, want exactly %v", want.name, s.GetLabel(), want.labels)
		}
	}
}

func TestEvents(t *testing.T) {
	t.Parallel()
	m := newMetrics(wave)
	m.Minted(metrics.TypeX509, codes.OK.String(), 40*time.Millisecond)
	m.Minted(metrics.TypeX509, codes.Unavailable.String(), time.Second)
	m.Renewed(metrics.ReasonTaint, metrics.RenewalDone)
	m.BundleRefreshed(metrics.RefreshApplied)
	m.Synced(time.Second, nil)
	m.Synced(2*time.Second, errors.New("no answer"))
	m.Oversized()

	counters := map[string][]string{
		"spirl_agent_mint_svid_total":   {"svid_type=x509", "status_code=Unavailable"},
		"renewd_renewals_total":         {"reason=taint", "outcome=renewed"},
		"renewd_bundle_refreshes_total": {"outcome=applied"},
		"renewd_oversize_answers_total": nil,
	}
	for name, labels := range counters {
		if got := series(t, m, name, labels...).GetCounter().GetValue(); got != 1 {
			t.Errorf("%s%v = %v, want 1", name, labels, got)
		}
	}
	if h := series(t, m, "spirl_agent_mint_svid_duration_seconds", "svid_type=x509", "status_code=OK").GetHistogram(); h.GetSampleSum() != 0.04 {
		t.Errorf("mint duration sum = %v s, want 0.04", h.GetSampleSum())
	}
	if h := series(t, m, "renewd_sync_duration_seconds", "outcome=failed").GetHistogram(); h.GetSampleSum() != 2 {
		t.Errorf("failed sync duration sum = %v s, want 2", h.GetSampleSum())
	}
}

// The gRPC counters through a real server and client.
func TestGRPC(t *testing.T) {
	t.Parallel()
	m := newMetrics(wave)
	srv := grpc.NewServer(m.ServerOptions()...)
	workload.RegisterSpiffeWorkloadAPIServer(srv, denies{})
	m.InitServer(srv)
	if s := series(t, m, "grpc_server_started_total", "grpc_service=SpiffeWorkloadAPI", "grpc_method=FetchX509SVID", "grpc_type=server_stream"); s == nil {
		t.Error("grpc_server_started_total is missing before the first call")
	}
	_, err := workload.NewSpiffeWorkloadAPIClient(dial(t, srv)).FetchJWTSVID(t.Context(), &workload.JWTSVIDRequest{})
	if status.Code(err) != codes.PermissionDenied {
		t.Fatalf("call: %v", err)
	}
	if got := series(t, m, "grpc_server_handled_total", "grpc_method=FetchJWTSVID", "grpc_code=PermissionDenied").GetCounter().GetValue(); got != 1 {
		t.Errorf("handled = %v, want 1", got)
	}
}

// dial serves srv in memory and connects to it.
func dial(t *testing.T, srv *grpc.Server) *grpc.ClientConn {
	t.Helper()
	l := bufconn.Listen(1 << 16)
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(srv.Stop)
	conn, err := grpc.NewClient("passthrough:///bufconn", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

type denies struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
}

func (denies) FetchJWTSVID(context.Context, *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	return nil, status.Error(codes.PermissionDenied, "no identity")
}

func TestLint(t *testing.T) {
	t.Parallel()
	for name, m := range map[string]interface{ Handler() http.Handler }{"agent": newMetrics(wave), "server": newServer(rotation)} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			lint(t, m.Handler())
		})
	}
}

func lint(t *testing.T, h http.Handler) {
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	if rec.Code != http.StatusOK {
		t.Fatalf("scrape: %d\n%s", rec.Code, rec.Body)
	}
	problems, err := promlint.New(bytes.NewReader(rec.Body.Bytes())).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("promtool (Debian package prometheus) is not installed: its own check is left out")
	}
	cmd := exec.CommandContext(t.Context(), promtool, "check", "metrics")
	cmd.Stdin = bytes.NewReader(rec.Body.Bytes())
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("promtool check metrics: %v\n%s", err, out)
	}
}

// Without a source there are only the counters, and a scrape still works.
func TestNoSource(t *testing.T) {
	t.Parallel()
	m := metrics.New(metrics.Config{})
	if series(t, m, "renewd_streams_open", "rpc=FetchX509SVID") != nil {
		t.Error("state without a source")
	}
	if series(t, m, "renewd_oversize_answers_total") == nil {
		t.Error("no events")
	}
	var _ prometheus.Gatherer = m.Registry()
}

// series returns the one series of name that has all the labels ("key=value"),
// or nil.
func series(t *testing.T, m interface{ Registry() *prometheus.Registry }, name string, labels ...string) *dto.Metric {
	t.Helper()
	families, err := m.Registry().Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
	next:
		for _, s := range f.GetMetric() {
			var have []string
			for _, l := range s.GetLabel() {
				have = append(have, fmt.Sprintf("%s=%s", l.GetName(), l.GetValue()))
			}
			for _, want := range labels {
				if !slices.Contains(have, want) {
					continue next
				}
			}
			return s
		}
	}
	return nil
}
