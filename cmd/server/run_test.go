package main

import (
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/server"
	"github.com/renewd/renewd/internal/server/rotation"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// TestDomainConfig: every setting reaches the domain.
func TestDomainConfig(t *testing.T) {
	t.Parallel()
	s, err := loadText(`
trust_domain: example.org
data_dir: /data
key_file: /key
deployments: {west: {listen_address: ':2'}, east: {listen_address: ':1'}}
admin_socket: /admin.sock
admin_socket_mode: 0600
operators: {address: ':3', managers: ['unix:uid:1'], readers: ['unix:uid:2']}
bundle_endpoint: {address: ':4', profile: https_web, cert_file: /cert, key_file: /cert.key, refresh_hint: 3s}
federation: {partner.example: {endpoint_url: 'https://p', profile: https_web, bundle_file: /bundle}}
limits: {attestation_rate: 2, jwt_svid_rate: off, networks: {10.0.0.0/8: {attestation_rate: off}, "2001:db8::/32": {connections: 9}}}
proxy_protocol: {trusted_cidrs: [192.0.2.0/24, "2001:db8::1/128"]}
metrics: {address: ':5', web_config_file: /web}
keysets: {lifetime: 1000h, x509_ttl: 2h, jwt_ttl: 5m}
rotation: {mode: paused, preparation_threshold: 100h, activation_threshold: 10h, taint_threshold: 11h}
log: {format: json}
`, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	got := domainConfig(s)
	if got.Version == "" {
		t.Error("no version")
	}
	got.Version = ""
	all := spireapi.DefaultLimits
	all.Attestations, all.JWTSVIDs = 2, 0
	ten, doc := all, all
	ten.Attestations, doc.Known = 0, 9
	want := server.Config{
		TrustDomain: s.TrustDomain, DataDir: "/data", KeyFile: "/key",
		Deployments: []server.DeploymentConfig{{Name: "east", ListenAddress: ":1"}, {Name: "west", ListenAddress: ":2"}},
		AdminSocket: "/admin.sock", AdminSocketMode: 0o600,
		OperatorAddress: ":3", Managers: []string{"unix:uid:1"}, Readers: []string{"unix:uid:2"},
		EndpointAddress: ":4", EndpointProfile: "https_web", EndpointCertFile: "/cert", EndpointKeyFile: "/cert.key", RefreshHint: 3 * time.Second,
		Limits: &spireapi.ClientLimits{Default: all, Networks: map[netip.Prefix]spireapi.Limits{
			netip.MustParsePrefix("10.0.0.0/8"): ten, netip.MustParsePrefix("2001:db8::/32"): doc,
		}},
		Proxies:        []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8::1/128")},
		Federation:     s.endpoints(),
		MetricsAddress: ":5", WebConfigFile: "/web",
		KeysetLifetime: 1000 * time.Hour, X509TTL: 2 * time.Hour, JWTTTL: 5 * time.Minute,
		Rotation: rotation.Policy{
			Mode: rotation.Paused, PreparationThreshold: 100 * time.Hour, ActivationThreshold: 10 * time.Hour, TaintThreshold: 11 * time.Hour,
		},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	// Every other field of the domain is set.
	notSettings := []string{"Log", "Version", "Started", "ServerOptions", "Now", "Uptime", "EndpointListener", "FederationDial"}
	v := reflect.ValueOf(want)
	for i := range v.NumField() {
		if name := v.Type().Field(i).Name; v.Field(i).IsZero() && !slices.Contains(notSettings, name) {
			t.Errorf("server.Config.%s is not configured", name)
		}
	}
}
