package main

import (
	"io"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/server"
	"github.com/renewd/renewd/internal/server/rotation"
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
metrics: {address: ':5', web_config_file: /web}
keysets: {lifetime: 1000h, x509_ttl: 2h, jwt_ttl: 5m}
rotation: {mode: paused, preparation_threshold: 100h, activation_threshold: 10h, taint_threshold: 11h}
log: {format: json}
`, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	got := domainConfig(s, cli.Env{Getenv: noEnv, Stderr: io.Discard})
	if got.Log == nil || got.Version == "" {
		t.Errorf("log %v, version %q", got.Log, got.Version)
	}
	got.Log, got.Version = nil, ""
	want := server.Config{
		TrustDomain: s.TrustDomain, DataDir: "/data", KeyFile: "/key",
		Deployments: []server.DeploymentConfig{{Name: "east", ListenAddress: ":1"}, {Name: "west", ListenAddress: ":2"}},
		AdminSocket: "/admin.sock", AdminSocketMode: 0o600,
		OperatorAddress: ":3", Managers: []string{"unix:uid:1"}, Readers: []string{"unix:uid:2"},
		EndpointAddress: ":4", EndpointProfile: "https_web", EndpointCertFile: "/cert", EndpointKeyFile: "/cert.key", RefreshHint: 3 * time.Second,
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
