package server_test

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/federation"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/api"
)

// TestEndpointFollows: a relying party that has a bundle gets every later one from the
// endpoint during a rotation.
func TestEndpointFollows(t *testing.T) {
	t.Parallel()
	r := run(t, newConfig(t, "east", "west"))
	_, trust := r.dial("west", nil).bundle()
	url := "https://" + r.address("bundle_endpoint.address")
	follow := func(sequence uint64, authorities int) {
		t.Helper()
		next, err := federation.FetchBundle(t.Context(), td, url, federation.WithSPIFFEAuth(trust, serverID))
		check(t, err)
		got, _ := next.SequenceNumber()
		hint, _ := next.RefreshHint()
		if got != sequence || len(next.X509Authorities()) != authorities || len(next.JWTAuthorities()) != authorities || hint != time.Minute {
			t.Errorf("sequence %d, %d and %d authorities, hint %v", got, len(next.X509Authorities()), len(next.JWTAuthorities()), hint)
		}
		if n := len(r.keys(trust)); n != authorities {
			t.Errorf("%d keys", n)
		}
		trust = next
	}
	ctx, s := t.Context(), scope("east")
	old := r.keysets("east").GetKeysets()[0].GetId()
	follow(2, 2)
	p, err := r.api.PrepareKeyset(ctx, &api.PrepareKeysetRequest{Scope: s})
	check(t, err)
	follow(3, 3)
	_, err = r.api.ActivateKeyset(ctx, &api.ActivateKeysetRequest{Scope: s, KeysetId: p.GetKeyset().GetId()})
	check(t, err)
	follow(3, 3)
	_, err = r.api.TaintKeyset(ctx, &api.TaintKeysetRequest{Scope: s, KeysetId: old})
	check(t, err)
	follow(4, 3)
	_, err = r.api.RemoveKeyset(ctx, &api.RemoveKeysetRequest{Scope: s, KeysetId: old})
	check(t, err)
	follow(5, 2)
}

// TestEndpointDuringFastRotation: a relying party that polls every few minutes follows a
// rotation even if it missed the first steps, as long as the authority that it trusts is
// not removed.
func TestEndpointDuringFastRotation(t *testing.T) {
	t.Parallel()
	r := run(t, newConfig(t, "default"))
	_, trust := r.dial("default", nil).bundle()
	url := "https://" + r.address("bundle_endpoint.address")
	fetch := func() (*spiffebundle.Bundle, error) {
		return federation.FetchBundle(t.Context(), td, url, federation.WithSPIFFEAuth(trust, serverID))
	}
	old := r.rotate("default")
	next, err := fetch()
	if err != nil {
		t.Fatalf("after prepare, activate and taint: %v", err)
	}
	trust = next
	_, err = r.api.RemoveKeyset(t.Context(), &api.RemoveKeysetRequest{Scope: scope("default"), KeysetId: old})
	check(t, err)
	for range 2 { // the second time it trusts the new authority only
		if trust, err = fetch(); err != nil || len(trust.X509Authorities()) != 1 {
			t.Fatalf("after remove: %v, %v", trust, err)
		}
	}
}

// TestEndpointCertificateRenewal: the certificate is renewed at its half-life.
func TestEndpointCertificateRenewal(t *testing.T) {
	t.Parallel()
	var later atomic.Int64 // than the real clock
	c := newConfig(t, "default")
	c.Now = func() time.Time { return time.Now().Add(time.Duration(later.Load())) }
	r := run(t, c)
	serial := func() string {
		conn, err := tls.Dial("tcp", r.address("bundle_endpoint.address"), &tls.Config{InsecureSkipVerify: true})
		check(t, err)
		defer conn.Close()
		return conn.ConnectionState().PeerCertificates[0].SerialNumber.String()
	}
	first := serial()
	later.Store(int64(11 * time.Hour))
	if serial() != first {
		t.Error("renewed after 11 of 24 hours")
	}
	later.Store(int64(13 * time.Hour))
	if serial() == first {
		t.Error("not renewed after 13 of 24 hours")
	}
}

// keys returns the JWK set of the endpoint.
func (r *running) keys(trust *spiffebundle.Bundle) []any {
	r.t.Helper()
	client := http.Client{Transport: &http.Transport{TLSClientConfig: tlsconfig.TLSClientConfig(trust, tlsconfig.AuthorizeID(serverID)), DisableKeepAlives: true}}
	var set struct{ Keys []any }
	check(r.t, json.Unmarshal(get(r.t, &client, "https://"+r.address("bundle_endpoint.address")+"/keys", http.StatusOK), &set))
	return set.Keys
}

func get(t testing.TB, client *http.Client, url string, code int) []byte {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	check(t, err)
	resp, err := client.Do(req)
	check(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	check(t, err)
	if resp.StatusCode != code {
		t.Fatalf("%s: %s: %s", url, resp.Status, body)
	}
	return body
}

// operatorEntry returns the entry of an operator's workload; the zero parent means every
// agent.
func operatorEntry(name string, parent spiffeid.ID, operator bool) *api.Entry {
	e := &api.Entry{Id: name, SpiffeId: "spiffe://example.org/ops/" + name, Selectors: []*api.Selector{{Type: "unix", Value: "uid:0"}}, Operator: operator}
	if !parent.IsZero() {
		e.ParentId = parent.String()
	}
	return e
}

// TestRemoteOperators: operators manage a deployment with an SVID that another deployment
// signed, also with a new keyset.
func TestRemoteOperators(t *testing.T) {
	t.Parallel()
	r := run(t, newConfig(t, "east", "west"))
	a := r.join("west")
	for _, name := range []string{"alice", "bob", "carol"} {
		_, err := r.api.PutEntry(t.Context(), &api.PutEntryRequest{Scope: scope("west"), Entry: operatorEntry(name, a.id, false)})
		check(t, err)
	}
	as := func(name string) api.OperatorClient {
		t.Helper()
		return api.NewOperatorClient(r.connect(a.workload(name), r.address("operators.address")).ClientConn)
	}
	ctx := t.Context()
	for range 2 {
		_, err := as("alice").PrepareKeyset(ctx, &api.PrepareKeysetRequest{Scope: scope("east")})
		check(t, err)
		_, err = as("bob").ListKeysets(ctx, &api.ListKeysetsRequest{Scope: scope("east")})
		check(t, err)
		_, err = as("bob").PrepareKeyset(ctx, &api.PrepareKeysetRequest{Scope: scope("east")})
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("prepare by a reader: %v", err)
		}
		_, err = as("carol").ListKeysets(ctx, &api.ListKeysetsRequest{Scope: scope("east")})
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("list by an ID without a role: %v", err)
		}
		_, err = api.NewOperatorClient(r.connect(nil, r.address("operators.address")).ClientConn).ListKeysets(ctx, &api.ListKeysetsRequest{Scope: scope("east")})
		if err == nil {
			t.Error("list without an SVID succeeds")
		}
		r.rotate("west")
	}
	audit, err := r.api.ReadAudit(ctx, &api.ReadAuditRequest{Scope: scope("east")})
	check(t, err)
	var actors []string
	for _, rec := range audit.GetRecords() {
		actors = append(actors, rec.GetActor()+" "+rec.GetOperation())
	}
	if want := []string{"server create", "spiffe://example.org/ops/alice prepare", "spiffe://example.org/ops/alice prepare"}; !slices.Equal(actors, want) {
		t.Errorf("the audit log has %q", actors)
	}
}

// TestMetrics: the series of every RPC exist before the first call, and those of keysets
// follow a rotation.
func TestMetrics(t *testing.T) {
	t.Parallel()
	r := run(t, newConfig(t, "east", "west"))
	scrape := func() string {
		t.Helper()
		return string(get(t, http.DefaultClient, "http://"+r.address("metrics.address")+"/metrics", http.StatusOK))
	}
	hasLines := func(lines ...string) {
		t.Helper()
		all := strings.Split(scrape(), "\n")
		for _, want := range lines {
			if !slices.Contains(all, want) {
				series, _, _ := strings.Cut(want, " ")
				i := slices.IndexFunc(all, func(l string) bool { return strings.HasPrefix(l, series) })
				t.Errorf("no %s, but %q", want, all[max(i, 0)])
			}
		}
	}
	for _, call := range []string{
		`grpc_method="AttestAgent",grpc_service="spire.api.server.agent.v1.Agent",grpc_type="bidi_stream"`,
		`grpc_method="GetBundle",grpc_service="spire.api.server.bundle.v1.Bundle",grpc_type="unary"`,
		`grpc_method="SyncAuthorizedEntries",grpc_service="spire.api.server.entry.v1.Entry",grpc_type="bidi_stream"`,
		`grpc_method="BatchNewX509SVID",grpc_service="spire.api.server.svid.v1.SVID",grpc_type="unary"`,
		`grpc_method="Report",grpc_service="` + api.Fleet_ServiceDesc.ServiceName + `",grpc_type="unary"`,
		`grpc_method="RemoveKeyset",grpc_service="` + api.Operator_ServiceDesc.ServiceName + `",grpc_type="unary"`,
	} {
		hasLines("grpc_server_started_total{" + call + "} 0")
	}
	hasLines(`spirl_application_info{spirl_app_version="1.2.3",spirl_component="server",spirl_trust_domain="example.org",spirl_trust_domain_deployment="east"} 1`)

	for _, name := range []string{"east", "west"} {
		r.put(name, "web", "/"+name)
	}
	a := r.join("east")
	a.workload("web")
	a.token("web")
	old := r.keysets("east").GetKeysets()[0].GetId()
	state := func(keyset, state string, is int) string {
		return fmt.Sprintf(`renewd_server_keyset_state{deployment="east",keyset="%s",state="%s"} %d`, keyset, state, is)
	}
	gauge := func(name, keyset string, is int) string {
		return fmt.Sprintf(`renewd_server_keyset_%s{deployment="east",keyset="%s"} %d`, name, keyset, is)
	}
	safe := func(kind string, is int) string {
		return fmt.Sprintf(`renewd_server_keyset_safe{deployment="east",keyset="%s",svid_type="%s"} %d`, old, kind, is)
	}
	hasLines(state(old, "active", 1), state(old, "prepared", 0), gauge("x509_svids", old, 2), gauge("agents_holding", old, 1),
		`renewd_server_bundle_sequence_number{deployment="east"} 2`, `renewd_server_bundle_sequence_number{deployment="west"} 2`,
		`renewd_server_agents{deployment="east"} 1`, `renewd_server_agents_behind{deployment="east"} 1`, `renewd_server_agents{deployment="west"} 0`,
		`renewd_server_rotation_mode{deployment="west",mode="off"} 1`,
		`spirl_server_mint_svid_total{status_code="OK",svid_type="x509"} 1`, `spirl_server_mint_svid_total{status_code="OK",svid_type="jwt"} 1`)

	r.rotate("east")
	next := r.keysets("east").GetKeysets()[1].GetId()
	hasLines(state(old, "tainted", 1), state(old, "active", 0), state(next, "active", 1), gauge("x509_svids", old, 2), gauge("agents_holding", old, 1),
		gauge("x509_svids", next, 0), safe("x509", 0), safe("jwt", 0), `renewd_server_bundle_sequence_number{deployment="west"} 4`)
	_, err := a.Report(t.Context(), &api.ReportRequest{BundleSequence: 4, Authorities: []*api.AuthorityReport{{
		AuthorityId: r.keysets("east").GetKeysets()[0].GetX509AuthorityId(), Tainted: true, Settled: true,
	}}})
	check(t, err)
	a.workload("web")
	hasLines(gauge("x509_svids", old, 0), gauge("agents_holding", old, 0), gauge("x509_svids", next, 1), safe("x509", 1), safe("jwt", 0),
		`renewd_server_agents_behind{deployment="east"} 0`, `spirl_server_mint_svid_total{status_code="OK",svid_type="x509"} 2`)
	_, err = r.api.RemoveKeyset(t.Context(), &api.RemoveKeysetRequest{Scope: scope("east"), KeysetId: old})
	check(t, err)
	if text := scrape(); strings.Contains(text, old) {
		t.Error("the removed keyset is still there")
	} else if promtool, err := exec.LookPath("promtool"); err == nil {
		cmd := exec.CommandContext(t.Context(), promtool, "check", "metrics")
		cmd.Stdin = bytes.NewReader([]byte(text))
		if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("promtool: %v: %s", err, out)
		}
	}
}

// TestReady: the server is not ready if a deployment cannot sign, and says why.
func TestReady(t *testing.T) {
	t.Parallel()
	var passed atomic.Int64
	c := newConfig(t, "east", "west")
	c.Now = func() time.Time { return time.Now().Add(time.Duration(passed.Load())) }
	r := run(t, c)
	ready := "http://" + r.address("metrics.address") + "/ready"
	get(t, http.DefaultClient, ready, http.StatusOK)
	passed.Store(int64(91 * 24 * time.Hour))
	body := get(t, http.DefaultClient, ready, http.StatusServiceUnavailable)
	if !strings.Contains(string(body), "deployment east has expired") {
		t.Errorf("%s", body)
	}
	r.stop()
	passed.Store(0)
	if r.Ready() == nil {
		t.Error("ready after Run")
	}

	// A deployment that is not served need not sign.
	passed.Store(int64(91 * 24 * time.Hour))
	r = run(t, served(c, "north"))
	check(t, r.Ready())
}

// TestMetricsConnections: one address can open 128 connections, so that a client of the
// metrics port cannot take connections from agents.
func TestMetricsConnections(t *testing.T) {
	t.Parallel()
	r := run(t, newConfig(t, "default"))
	ask := func() error { // on a connection that stays open
		conn, err := net.Dial("tcp", r.address("metrics.address"))
		check(t, err)
		t.Cleanup(func() { conn.Close() })
		if _, err := io.WriteString(conn, "GET /live HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			return err
		}
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err == nil {
			resp.Body.Close()
		}
		return err
	}
	for range 128 {
		check(t, ask())
	}
	if ask() == nil {
		t.Error("one address can open 129 connections")
	}
}
