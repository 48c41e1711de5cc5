package server_test

import (
	"bytes"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/server"
	"github.com/renewd/renewd/internal/server/federation"
)

var partner = spiffeid.RequireTrustDomainFromString("partner.example")

// newPartner returns the configuration of another trust domain.
func newPartner(t *testing.T) server.Config {
	c := newConfig(t, "default")
	c.TrustDomain, c.Managers, c.Readers = partner, nil, nil
	return c
}

// federateWith returns the configuration with p's bundle endpoint.
func federateWith(c server.Config, p *running) server.Config {
	file := filepath.Join(filepath.Dir(c.KeyFile), "partner.pem")
	if err := os.WriteFile(file, p.Published().PEM(), 0o600); err != nil {
		p.t.Fatal(err)
	}
	c.Federation = []federation.Endpoint{{
		TrustDomain: partner, URL: "https://" + p.address("bundle_endpoint.address") + "/bundle", Profile: federation.ProfileSPIFFE,
		ID: spiffeid.RequireFromPath(partner, "/spire/server"), BundleFile: file,
	}}
	return c
}

// federated waits until an agent gets a bundle of the partner that ok accepts.
func (a *agent) federated(ok func(*types.Bundle) bool) *types.Bundle {
	a.t.Helper()
	for begin := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		b, err := a.GetFederatedBundle(a.t.Context(), &bundlev1.GetFederatedBundleRequest{TrustDomain: partner.Name()})
		check(a.t, err)
		if ok(b) {
			return b
		}
		if time.Since(begin) > 2*time.Minute {
			a.t.Fatalf("not in two minutes: %v", b)
		}
	}
}

// TestFederation: the agents of all deployments get the bundle of a federated trust
// domain, even after a restart while its endpoint is down. They no longer get it when
// the configuration no longer has the endpoint.
func TestFederation(t *testing.T) {
	t.Parallel()
	p := run(t, newPartner(t))
	base := newConfig(t, "east", "west")
	c := federateWith(base, p)
	r := run(t, c)
	want := p.Published()
	fetched := func(b *types.Bundle) bool { return b.GetRefreshHint() == 60 } // the file has none
	agents := map[string]*identity{}
	for _, name := range []string{"east", "west"} {
		a := r.join(name)
		agents[name] = a.identity
		b := a.federated(fetched)
		if b.GetTrustDomain() != partner.Name() || b.GetSequenceNumber() != want.Sequence || len(b.GetX509Authorities()) != 1 || len(b.GetJwtAuthorities()) != 1 ||
			!bytes.Equal(b.GetX509Authorities()[0].GetAsn1(), want.X509[0].Certificate.Raw) || b.GetJwtAuthorities()[0].GetKeyId() != want.JWT[0].KeyID ||
			!bytes.Equal(b.GetJwtAuthorities()[0].GetPublicKey(), want.JWT[0].PKIX) || b.GetJwtAuthorities()[0].GetExpiresAt() != 0 {
			t.Errorf("%s gets %v", name, b)
		}
		_, err := a.GetFederatedBundle(t.Context(), &bundlev1.GetFederatedBundleRequest{TrustDomain: "unknown.example"})
		if status.Code(err) != codes.NotFound {
			t.Errorf("unknown trust domain: %v", err)
		}
	}
	shown := string(get(t, http.DefaultClient, "http://"+r.address("metrics.address")+"/metrics", http.StatusOK))
	for _, line := range []string{
		`renewd_server_federated_bundle_refreshes_total{outcome="applied",trust_domain="partner.example"} 1`,
		`renewd_server_federated_bundle_refreshes_total{outcome="failed",trust_domain="partner.example"} 0`,
		`renewd_server_federated_bundle_refreshed_timestamp_seconds{trust_domain="partner.example"} `,
		`renewd_server_federated_authorities_left_out{trust_domain="partner.example"} 0`,
	} {
		if !strings.Contains(shown, line) {
			t.Errorf("metrics without %s", line)
		}
	}

	p.stop()
	r.stop()
	r = run(t, c)
	r.dial("west", agents["west"]).federated(fetched)

	r.stop()
	r = run(t, base)
	_, err := r.dial("east", agents["east"]).GetFederatedBundle(t.Context(), &bundlev1.GetFederatedBundleRequest{TrustDomain: partner.Name()})
	if status.Code(err) != codes.NotFound {
		t.Errorf("no longer configured: %v", err)
	}
}

// TestEntriesWithUnknownTrustDomain: an entry that federates with a trust domain that is
// not configured causes a warning, when it is put and in the log of each start.
func TestEntriesWithUnknownTrustDomain(t *testing.T) {
	t.Parallel()
	p := run(t, newPartner(t))
	c := federateWith(newConfig(t, "default"), p)
	r := run(t, c)
	entry := func(id string, with ...string) *api.Entry {
		return &api.Entry{Id: id, SpiffeId: "spiffe://example.org/" + id, Selectors: []*api.Selector{{Type: "unix", Value: "uid:0"}}, FederatesWith: with}
	}
	const warning = `entries that federate with "typo.example": the server does not fetch its bundle, so workloads do not get it: set federation.typo.example in the server's configuration, or correct "a", "b"`
	for _, dryRun := range []bool{true, false} {
		resp, err := r.api.ApplyEntries(t.Context(), &api.ApplyEntriesRequest{Scope: scope("default"), DryRun: dryRun, Entries: []*api.Entry{
			entry("b", "typo.example"), entry("a", "partner.example", "typo.example"), entry("c", "partner.example"),
		}})
		check(t, err)
		if got := resp.GetWarnings(); len(got) != 1 || got[0] != warning {
			t.Errorf("warnings %q", got)
		}
	}
	put, err := r.api.PutEntry(t.Context(), &api.PutEntryRequest{Scope: scope("default"), Entry: entry("b", "partner.example")})
	check(t, err)
	if got := put.GetWarnings(); len(got) != 0 {
		t.Errorf("warnings %q", got)
	}
	var many []*api.Entry
	for _, id := range strings.Split("ghifjkm", "") {
		many = append(many, entry(id, "typo.example"))
	}
	resp, err := r.api.ApplyEntries(t.Context(), &api.ApplyEntriesRequest{Scope: scope("default"), DryRun: true, Entries: many, Remove: new(int64(3))})
	check(t, err)
	if got := resp.GetWarnings(); len(got) != 1 || !strings.HasSuffix(got[0], `or correct "f", "g", "h", "i", "j" and 2 more`) {
		t.Errorf("warnings of many %q", got)
	}
	r.stop()
	var log bytes.Buffer
	c.Log = slog.New(slog.NewTextHandler(&log, nil))
	d, err := server.Open(t.Context(), c)
	check(t, err)
	check(t, d.Close())
	if got := log.String(); strings.Count(got, "entries federate with") != 1 || !strings.Contains(got, "deployment=default trust_domain=typo.example entries=1") {
		t.Errorf("log:\n%s", got)
	}
}
