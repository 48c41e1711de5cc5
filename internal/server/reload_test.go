package server_test

import (
	"errors"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/listen"
	"github.com/renewd/renewd/internal/server"
	"github.com/renewd/renewd/internal/server/nodeattest/x509pop"
	"github.com/renewd/renewd/internal/server/rotation"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// TestReload: each part that can change applies to calls after the reload, and a
// configuration of which one part cannot be used changes nothing.
func TestReload(t *testing.T) {
	t.Parallel()
	p := run(t, newPartner(t))
	base := newConfig(t, "east", "west")
	r := run(t, base)
	r.put("west", "host", "/spire-exchange/host-1")
	member := r.join("west")
	minted, err := member.mint("host")
	check(t, err)
	svid := map[string]any{"certificates": [][]byte{minted[0].chain[0].Raw}}

	node := r.dial("east", nil)

	// state is what the configuration decides.
	type state struct {
		Attests, Federated, Managers, Connections, Paused bool
		Hint                                              int64
	}
	observe := func() (s state) {
		_, err := node.attestNode("x509pop", svid, minted[0].key)
		s.Attests = err == nil
		_, err = member.GetFederatedBundle(t.Context(), &bundlev1.GetFederatedBundleRequest{TrustDomain: partner.Name()})
		s.Federated = err == nil
		_, err = r.api.ListKeysets(t.Context(), &api.ListKeysetsRequest{Scope: scope("west")})
		if s.Managers = err == nil; err != nil && status.Code(err) != codes.PermissionDenied {
			t.Error(err)
		}
		b, err := member.GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
		check(t, err)
		s.Hint = b.GetRefreshHint()
		// Two anonymous connections beside that of join. Those of an earlier call may not have
		// ended yet.
		first, second := r.dial("west", nil), r.dial("west", nil)
		for err = errors.New("not tried"); err != nil && t.Context().Err() == nil; time.Sleep(10 * time.Millisecond) {
			_, err = first.GetBundle(t.Context(), &bundlev1.GetBundleRequest{}, grpc.WaitForReady(true))
		}
		_, err = second.GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
		s.Connections = err == nil
		first.Close()
		second.Close()
		shown := string(get(t, http.DefaultClient, "http://"+r.address("metrics.address")+"/metrics", http.StatusOK))
		s.Paused = strings.Contains(shown, `renewd_server_rotation_mode{deployment="west",mode="paused"} 1`)
		return s
	}
	before := state{Managers: true, Connections: true, Hint: 60}
	if got := observe(); got != before {
		t.Fatalf("at the start: %+v", got)
	}

	next := federateWith(base, p)
	next.RefreshHint = 2 * base.RefreshHint
	next.Managers = []string{"unix:uid:4242"}
	next.Readers = nil
	next.Rotation.Mode = rotation.Paused
	one := spireapi.DefaultLimits
	one.Limits = listen.Limits{Handshakes: 64, Anonymous: 2}
	next.Limits = &spireapi.ClientLimits{Default: spireapi.DefaultLimits, Networks: map[netip.Prefix]spireapi.Limits{netip.MustParsePrefix("127.0.0.0/8"): one}}
	next.Deployments = []server.DeploymentConfig{{Name: "east", ListenAddress: "127.0.0.1:0", X509Pop: &x509pop.Config{Mode: x509pop.ModeSPIFFE}}, base.Deployments[1]}

	for says, spoil := range map[string]func(c *server.Config){
		"federation.partner.example.bundle_file cannot be used: open /missing": func(c *server.Config) {
			c.Federation = append(c.Federation[:0:0], c.Federation...)
			c.Federation[0].BundleFile = "/missing"
		},
		"deployments.west.node_attestation: x509pop: ca_bundle_files: open /missing": func(c *server.Config) {
			c.Deployments = append(c.Deployments[:1:1], server.DeploymentConfig{Name: "west", X509Pop: &x509pop.Config{CABundleFiles: []string{"/missing"}}})
		},
		`operators.managers[0]: "root" is no rule`: func(c *server.Config) { c.Managers = []string{"root"} },
		"bundle_endpoint: certificate files: bundle_endpoint.cert_file: open /missing": func(c *server.Config) {
			c.EndpointProfile, c.EndpointCertFile = server.ProfileWeb, "/missing"
		},
		"rotation: mode is \"never\"": func(c *server.Config) { c.Rotation.Mode = "never" },
		"web config file /missing: ":  func(c *server.Config) { c.WebConfigFile = "/missing" },
	} {
		bad := next
		spoil(&bad)
		if err := r.Reload(bad); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("reload: %v, want %q", err, says)
		}
	}
	if got := observe(); got != before {
		t.Errorf("after refused reloads: %+v", got)
	}

	check(t, r.Reload(next))
	for { // the follower of a new endpoint starts after the reload
		_, err := member.GetFederatedBundle(t.Context(), &bundlev1.GetFederatedBundleRequest{TrustDomain: partner.Name()})
		if status.Code(err) != codes.NotFound {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	member.federated(func(b *types.Bundle) bool { return b.GetRefreshHint() == 60 })
	if got, want := observe(), (state{Attests: true, Federated: true, Paused: true, Hint: 120}); got != want {
		t.Errorf("after the reload: %+v, want %+v", got, want)
	}
	shown := string(get(t, http.DefaultClient, "http://"+r.address("metrics.address")+"/metrics", http.StatusOK))
	if line := `renewd_server_federated_bundle_refreshes_total{outcome="failed",trust_domain="partner.example"} 0`; !strings.Contains(shown, line) {
		t.Errorf("metrics without %s", line)
	}

	check(t, r.Reload(base))
	for got := observe(); got != before; got = observe() { // the bundle is withdrawn soon
		if got.Federated = false; got != before {
			t.Fatalf("after the reload of the first configuration: %+v", got)
		}
	}
}
