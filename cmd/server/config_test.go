package main

import (
	"errors"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/config"
	"github.com/renewd/renewd/internal/server"
	"github.com/renewd/renewd/internal/server/federation"
	"github.com/renewd/renewd/internal/server/nodeattest/k8spsat"
	"github.com/renewd/renewd/internal/server/nodeattest/x509pop"
	"github.com/renewd/renewd/test/clitest"
)

const minimal = "trust_domain: example.org\n"

func loadText(text string, flags, env map[string]string) (*settings, error) {
	return schema.Load("server.yaml", []byte(text), flags, func(k string) string { return env[k] })
}

// TestFieldsCoverSettings: the tables and the structs have the same fields.
func TestFieldsCoverSettings(t *testing.T) {
	t.Parallel()
	clitest.Covers(t, schema.Fields)
	clitest.Covers(t, entrySchema.Fields)
}

func TestDefaults(t *testing.T) {
	t.Parallel()
	cfg, err := loadText(minimal, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if cfg.DataDir != "/var/lib/renewd-server" || cfg.AdminSocket != defaultSocket || cfg.AdminSocketMode != 0o660 ||
		cfg.EndpointProfile != server.ProfileSPIFFE || cfg.RefreshHint != 5*time.Minute || cfg.MetricsAddress != "127.0.0.1:9091" ||
		cfg.KeysetLifetime != 90*24*time.Hour || cfg.X509TTL != 24*time.Hour || cfg.JWTTTL != 24*time.Hour ||
		cfg.RotationMode != "on" || len(cfg.Deployments)+len(cfg.Managers)+len(cfg.Readers) != 0 {
		t.Errorf("defaults: %+v", *cfg)
	}
}

// TestListenAddress: listen_address is the address of the deployment default.
func TestListenAddress(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, add string
		flags     map[string]string
		want      map[string]string
	}{
		{"nothing", "", nil, map[string]string{"default": "0.0.0.0:8081"}},
		{"in the file", "listen_address: ':1'", nil, map[string]string{"default": ":1"}},
		{"as a flag", "listen_address: ':1'", map[string]string{"listen_address": ":2"}, map[string]string{"default": ":2"}},
		{"of a deployment without", "listen_address: ':1'\ndeployments: {default: {node_attestation: {x509pop: {mode: spiffe}}}, west: {listen_address: ':3'}}", nil, map[string]string{"default": ":1", "west": ":3"}},
		{"of other deployments", "deployments: {west: {listen_address: ':3'}}", nil, map[string]string{"west": ":3"}},
	} {
		s, err := loadText(minimal+tt.add, tt.flags, nil)
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		s.complete()
		got := map[string]string{}
		for _, d := range s.deployments() {
			got[d.Name] = d.ListenAddress
		}
		if !maps.Equal(got, tt.want) {
			t.Errorf("%s: addresses %v, want %v", tt.name, got, tt.want)
		}
	}
}

// TestNames: a reload compares each section with a name that the operator chooses.
func TestNames(t *testing.T) {
	t.Parallel()
	s, err := loadText(minimal, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if changes := schema.Changes(s, s); len(changes) > 0 {
		t.Errorf("changes %v", changes)
	}
}

// TestProblems: each invalid configuration causes exactly this error.
func TestProblems(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, add  string
		flags, env map[string]string
		want       string
	}{
		{name: "unknown", add: "socket_path: /x", want: `server.yaml:2: "socket_path" is not a field; remove it; "server help config" lists the fields`},
		{name: "field of a deployment", add: "deployments: {east: {address: ':1'}}", want: `server.yaml:2: "deployments.east.address" is not a field; did you mean deployments.east.listen_address?`},
		{name: "deployment without fields", add: "deployments:\n  east: {}", want: `server.yaml:3: deployments.east has no fields; give one or remove it`},
		{name: "name of a deployment", add: "deployments: {east/1: {listen_address: ':1'}}", want: `server.yaml:2: deployments.east/1.listen_address: ":1" belongs to a deployment with an invalid name; use up to 63 letters, digits, - and _`},
		{name: "address of a deployment", add: "deployments: {east: {listen_address: here}}", want: `server.yaml:2: deployments.east.listen_address: "here" is not host:port; write it as host:port, such as 0.0.0.0:8081`},
		{name: "same address", add: "deployments:\n  east: {listen_address: ':1'}\n  west: {listen_address: ':1'}", want: `server.yaml:4: deployments.west.listen_address: ":1" is also the address of deployments.east.listen_address; use different addresses`},
		{name: "both addresses", add: "listen_address: ':1'\ndeployments: {default: {listen_address: ':2'}}", want: `server.yaml:2: listen_address: ":1" is set, and deployments.default.listen_address, too; remove one of the two`},
		{name: "address without its deployment", add: "deployments: {east: {listen_address: ':2'}}", env: map[string]string{"RENEWD_SERVER_LISTEN_ADDRESS": ":1"}, want: `RENEWD_SERVER_LISTEN_ADDRESS: listen_address: ":1" is for the deployment default, which is not in deployments; set deployments.NAME.listen_address instead`},
		{name: "invalid address", flags: map[string]string{"listen_address": "here"}, want: `flag --listen-address: listen_address: "here" is not host:port; write it as host:port, such as 0.0.0.0:8081`},
		{name: "address that is taken", add: "listen_address: ':1'\nmetrics: {address: ':1'}", want: `server.yaml:3: metrics.address: ":1" is also the address of listen_address; use different addresses`},
		{name: "limits", add: "limits:\n  attestation_rate: 0\n  status_rate: none\n  report_rate: 1.5\n  connections: true\n  agent_calls: 3000000000\n  networks: {10.0.0.0/8: {calls: 1}}",
			want: `server.yaml:3: limits.attestation_rate: "0" is neither a positive integer nor off` + "\n" +
				`server.yaml:4: limits.status_rate: "none" is neither a positive integer nor off` + "\n" +
				`server.yaml:5: limits.report_rate: "1.5" is not an integer; write the digits without quotes and without a unit, or off` + "\n" +
				`server.yaml:6: limits.connections: "true" is not an integer; write the digits without quotes and without a unit, or off` + "\n" +
				`server.yaml:7: limits.agent_calls: "3000000000" is neither a positive integer nor off` + "\n" +
				`server.yaml:8: "limits.networks.10.0.0.0/8.calls" is not a field; did you mean limits.networks.10.0.0.0/8.agent_calls?`},
		{name: "networks", add: "limits:\n  networks:\n    10.0.0.1/8: {connections: 1}\n    10.0.0.7: {connections: 1}\n    2001:DB8::/32: {connections: 1}\n    2001:db8::/96: {connections: 1}\n    \"::ffff:10.0.0.0/104\": {connections: 1}\n    lan: {connections: 1}\nproxy_protocol: {trusted_cidrs: [10.0.0.0/8, 10.0.0.7]}",
			want: `server.yaml: limits.networks.10.0.0.1/8 is not written as usual, or has bits after its prefix; write it as 10.0.0.0/8` + "\n" +
				`server.yaml: limits.networks.10.0.0.7 has no prefix length; write it as 10.0.0.7/32` + "\n" +
				`server.yaml: limits.networks.2001:DB8::/32 is not written as usual, or has bits after its prefix; write it as 2001:db8::/32` + "\n" +
				`server.yaml: limits.networks.2001:db8::/96 is smaller than a /64, which is limited as one address; write it as 2001:db8::/64` + "\n" +
				`server.yaml: limits.networks.::ffff:10.0.0.0/104 is an IPv4 network in IPv6 notation; write it in IPv4 notation, such as 10.0.0.0/8` + "\n" +
				`server.yaml: limits.networks.lan is not a network; write it as 10.0.0.0/8 or 2001:db8::/32` + "\n" +
				`server.yaml:10: proxy_protocol.trusted_cidrs[1]: "10.0.0.7" has no prefix length; write it as 10.0.0.7/32`},
		{name: "two deployments without addresses", add: "deployments:\n  east: {node_attestation: {x509pop: {mode: spiffe}}}\n  west: {node_attestation: {x509pop: {mode: spiffe}}}", want: `deployments.west.listen_address: "0.0.0.0:8081" is also the address of deployments.east.listen_address; use different addresses`},
		{name: "x509pop without CAs", add: "deployments: {east: {node_attestation: {x509pop: {verify_client_ip: true}}}}", want: `server.yaml: deployments.east.node_attestation.x509pop.ca_bundle_files is not set and x509pop needs it; give a PEM file with the CAs of the nodes, or set mode: spiffe`},
		{name: "x509pop with no CAs", add: "deployments: {east: {node_attestation: {x509pop: {ca_bundle_files: []}}}}", want: `server.yaml:2: deployments.east.node_attestation.x509pop.ca_bundle_files: [] is empty; give a PEM file with the CAs of the nodes, or remove x509pop`},
		{name: "x509pop with values", add: "deployments:\n  east:\n    node_attestation:\n      x509pop:\n        ca_bundle_files: [ca.pem]\n        svid_prefix: /x\n        agent_path_template: '/{{ env \"HOME\" }}'\n        max_intermediates: 0\n        max_rsa_key_size: 512",
			want: `server.yaml:7: deployments.east.node_attestation.x509pop.svid_prefix: "/x" is not used with mode: external_pki; remove it or set mode: spiffe` + "\n" +
				`server.yaml:8: deployments.east.node_attestation.x509pop.agent_path_template: "/{{ env \"HOME\" }}" is not a template of a path; write it as /x509pop/cn/{{ .Subject.CommonName }}` + "\n" +
				`server.yaml:9: deployments.east.node_attestation.x509pop.max_intermediates: 0 is not from 1 to 100; 4 is usual` + "\n" +
				`server.yaml:10: deployments.east.node_attestation.x509pop.max_rsa_key_size: 512 is not from 1024 to 16384; 8192 is usual`},
		{name: "x509pop of SVIDs", add: "deployments:\n  east:\n    node_attestation:\n      x509pop:\n        mode: spiffe\n        ca_bundle_files: [ca.pem]\n        svid_prefix: x\n        agent_path_template: x509pop",
			want: `server.yaml:7: deployments.east.node_attestation.x509pop.ca_bundle_files: ["ca.pem"] is not used with mode: spiffe; remove it or set mode: external_pki` + "\n" +
				`server.yaml:8: deployments.east.node_attestation.x509pop.svid_prefix: "x" does not begin with a slash; write it as /spire-exchange, or / for every path` + "\n" +
				`server.yaml:9: deployments.east.node_attestation.x509pop.agent_path_template: "x509pop" is not a template of a path; write it as /x509pop/cn/{{ .Subject.CommonName }}`},
		{name: "mode of x509pop", add: "deployments: {east: {node_attestation: {x509pop: {mode: tpm}}}}", want: `server.yaml:2: deployments.east.node_attestation.x509pop.mode: "tpm" is not a mode; use external_pki or spiffe`},
		{name: "clusters", add: "deployments:\n  east:\n    node_attestation:\n      k8s_psat:\n        clusters: [prod, prod,\n          test]\nkubernetes_clusters:\n  prod:\n    service_account_allow_list: [renewd:renewd-agent,\n      renewd-agent]\n    kube_config_file: ''\n  spare: {audience: []}",
			want: `server.yaml: kubernetes_clusters.spare is in no deployment; add it to deployments.NAME.node_attestation.k8s_psat.clusters or remove it` + "\n" +
				`server.yaml:6: deployments.east.node_attestation.k8s_psat.clusters[1]: "prod" is given twice; keep one of the two` + "\n" +
				`server.yaml:7: deployments.east.node_attestation.k8s_psat.clusters[2]: "test" is no cluster of kubernetes_clusters; add kubernetes_clusters.test or remove it` + "\n" +
				`server.yaml:11: kubernetes_clusters.prod.service_account_allow_list[1]: "renewd-agent" is not a service account; write it as NAMESPACE:NAME` + "\n" +
				`server.yaml: kubernetes_clusters.spare.service_account_allow_list is not set; give the service accounts of the agents' pods, such as [renewd:renewd-agent]` + "\n" +
				`server.yaml:12: kubernetes_clusters.prod.kube_config_file: "" is empty; give a file or remove it`},
		{name: "name of a cluster", add: "deployments: {east: {node_attestation: {k8s_psat: {clusters: ['a/b']}}}}\nkubernetes_clusters: {a/b: {service_account_allow_list: ['a:b']}}", want: `server.yaml: kubernetes_clusters.a/b has a name that cannot be in a SPIFFE ID; use letters, digits, -, _ and dots`},
		{name: "address of the default deployment", add: "operators: {address: '0.0.0.0:8081'}", want: `server.yaml:2: operators.address: "0.0.0.0:8081" is also the address of deployment default; use different addresses`},
		{name: "rule", add: "operators:\n  managers:\n  - unix:uid:0\n  - nobody\n  readers: ['unix:user:does-not-exist']", want: "server.yaml:5: operators.managers[1]: \"nobody\" is no rule: write unix:uid:N, unix:user:NAME, unix:gid:N, unix:group:NAME or a SPIFFE ID\n" +
			`server.yaml:6: operators.readers[0]: "unix:user:does-not-exist" names a user that this machine does not have: user: unknown user does-not-exist`},
		{name: "operator of another trust domain", env: map[string]string{"RENEWD_SERVER_OPERATORS_READERS": "spiffe://other.org/ops"}, want: `RENEWD_SERVER_OPERATORS_READERS: operators.readers[0]: "spiffe://other.org/ops" is not of trust domain example.org: operators need an SVID of it`},
		{name: "metrics", add: "metrics: {address: localhost}", want: `server.yaml:2: metrics.address: "localhost" is not host:port; write it as host:port, such as 127.0.0.1:9091`},
		{name: "web config without address", add: `metrics: {address: "", web_config_file: w.yml}`, want: `server.yaml:2: metrics.web_config_file: "w.yml" is not used without metrics.address; set metrics.address or remove it`},
		{name: "socket", add: "admin_socket: /" + strings.Repeat("x", 107), want: `server.yaml:2: admin_socket: "/` + strings.Repeat("x", 107) + `" is longer than the kernel's limit of 107 bytes; choose a shorter path`},
		{name: "no socket", add: `admin_socket: ""`, want: `server.yaml:2: admin_socket: "" is empty; remove it for the default, /run/renewd-server/admin.sock`},
		{name: "mode without owner", add: "admin_socket_mode: 0066", want: `server.yaml:2: admin_socket_mode: 0066 does not let its owner connect; set at least 0600`},
		{name: "profile", add: "bundle_endpoint: {profile: http}", want: `server.yaml:2: bundle_endpoint.profile: "http" is not a profile; use https_spiffe or https_web`},
		{name: "web profile without files", add: "bundle_endpoint: {profile: https_web, cert_file: /c}", want: `server.yaml: bundle_endpoint.key_file is not set and profile https_web needs it; give the PEM file`},
		{name: "files without web profile", flags: map[string]string{"bundle_endpoint.cert_file": "/c"}, want: `flag --bundle-endpoint-cert-file: bundle_endpoint.cert_file: "/c" is not used with profile https_spiffe; remove it or set bundle_endpoint.profile: https_web`},
		{name: "refresh hint", add: "bundle_endpoint: {refresh_hint: 1500ms}", want: `server.yaml:2: bundle_endpoint.refresh_hint: 1.5s is not in whole seconds; 5m is usual`},
		{name: "federation without anything", add: "federation:\n  partner.example: {}", want: `server.yaml:3: federation.partner.example has no fields; give one or remove it`},
		{name: "federation, misspelled", add: "federation:\n  partner.example:\n    url: https://p", want: `server.yaml:4: "federation.partner.example.url" is not a field; did you mean federation.partner.example.profile?`},
		{name: "federation without a trust domain", add: "federation: {endpoint_url: https://p}", want: `server.yaml:2: federation.endpoint_url is not a list of fields; write one "name: value" a line`},
		{name: "federation with an invalid name", add: "federation: {Partner: {endpoint_url: https://p}}", want: `server.yaml:2: federation.Partner.endpoint_url: "https://p" is for the trust domain "Partner", which has upper-case letters, which a trust domain cannot have; write partner`},
		{name: "federation with itself", add: "federation: {example.org: {endpoint_url: https://p}}", want: `server.yaml:2: federation.example.org.endpoint_url: "https://p" is of the server's own trust domain; remove it: its bundle is the server's own`},
		{name: "federation without URL", add: "federation: {partner.example: {profile: https_web}}", want: `server.yaml: federation.partner.example.endpoint_url is not set; give the https URL of its bundle endpoint`},
		{name: "federation over http", add: "federation:\n  b.example: {endpoint_url: 'http://p', profile: https_web}\n  a.example: {endpoint_url: 'https://me@p', profile: https_web}\n  c.example: {endpoint_url: 'https:///x', profile: https_web}", want: "server.yaml:4: federation.a.example.endpoint_url: \"https://me@p\" has a user in it; write it as https://host:port/path\n" +
			"server.yaml:3: federation.b.example.endpoint_url: \"http://p\" is not an https URL; write it as https://host:port/path\n" +
			`server.yaml:5: federation.c.example.endpoint_url: "https:///x" has no host; write it as https://host:port/path`},
		{name: "federation without profile", add: "federation: {partner.example: {endpoint_url: 'https://p'}}", want: `server.yaml: federation.partner.example.profile is not set; ask the endpoint's operator and use https_spiffe or https_web`},
		{name: "federation with another profile", add: "federation: {partner.example: {endpoint_url: 'https://p', profile: https}}", want: `server.yaml:2: federation.partner.example.profile: "https" is not a profile; use https_spiffe or https_web`},
		{name: "federation without an ID", add: "federation: {partner.example: {endpoint_url: 'https://p', profile: https_spiffe}}", want: `server.yaml: federation.partner.example.endpoint_spiffe_id is not set and profile https_spiffe needs it; give the SPIFFE ID of the endpoint, such as spiffe://partner.example/spire/server`},
		{name: "federation with an invalid ID", add: "federation:\n  partner.example:\n    endpoint_url: https://p\n    profile: https_spiffe\n    endpoint_spiffe_id: p", want: `server.yaml:6: federation.partner.example.endpoint_spiffe_id: "p" is not a SPIFFE ID; write it as spiffe://partner.example/spire/server`},
		{name: "federation with an ID on the web", add: "federation: {partner.example: {endpoint_url: 'https://p', profile: https_web, endpoint_spiffe_id: 'spiffe://partner.example/x'}}", want: `server.yaml:2: federation.partner.example.endpoint_spiffe_id: "spiffe://partner.example/x" is not used with profile https_web; remove it or set profile: https_spiffe`},
		{name: "federation without a file", add: "federation: {partner.example: {endpoint_url: 'https://p', profile: https_spiffe, endpoint_spiffe_id: 'spiffe://partner.example/x'}}", want: `server.yaml: federation.partner.example.bundle_file is not set, and the endpoint is in this trust domain itself; give a file with its bundle to verify the first connection`},
		{name: "federation with an ID of an unknown trust domain", add: "federation: {partner.example: {endpoint_url: 'https://p', profile: https_spiffe, endpoint_spiffe_id: 'spiffe://x.example/x'}}", want: `server.yaml:2: federation.partner.example.endpoint_spiffe_id: "spiffe://x.example/x" is in a trust domain whose bundle is not available; configure x.example, too, under federation, or give a bundle_file there`},
		{name: "federation with an empty file", add: "federation: {partner.example: {endpoint_url: 'https://p', profile: https_web, bundle_file: ''}}", want: `server.yaml:2: federation.partner.example.bundle_file: "" is empty; give a value or remove it`},
		{name: "X.509 lifetime", env: map[string]string{"RENEWD_SERVER_KEYSETS_X509_TTL": "169h"}, want: `RENEWD_SERVER_KEYSETS_X509_TTL: keysets.x509_ttl: 169h is not from 1h to 168h; 24h is usual`},
		{name: "JWT lifetime", add: "keysets: {jwt_ttl: 0s}", want: `server.yaml:2: keysets.jwt_ttl: 0s is shorter than a second; 24h is usual`},
		{name: "mode", add: "rotation: {mode: manual}", want: `server.yaml:2: rotation.mode: "manual" is not a mode; use off, on or paused`},
		{name: "mode as true", add: "rotation: {mode: true}", want: `server.yaml:2: rotation.mode: "true" is not a string; put quotes around it`},
		{name: "thresholds", add: "rotation:\n  preparation_threshold: 1081h\n  taint_threshold: 1500ms", want: "server.yaml:3: rotation.preparation_threshold: 1081h is 1081h0m0s, more than half of a keyset's lifetime, 2160h0m0s; give at most 1080h0m0s\n" +
			`server.yaml:4: rotation.taint_threshold: 1.5s is 1.5s; give whole seconds, at least one`},
		{name: "log", add: "log: {format: xml}", want: `server.yaml:2: log.format: "xml" is not a format; use auto, text or json`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			_, err := loadText(minimal+tt.add+"\n", tt.flags, tt.env)
			if err == nil {
				t.Fatal("accepted")
			}
			if err.Error() != tt.want {
				t.Errorf("got  %s\nwant %s", err, tt.want)
			}
		})
	}
	cfg, err := loadText(minimal+"federation:\n  partner.example: {endpoint_url: 'https://p/b', profile: https_spiffe, endpoint_spiffe_id: 'spiffe://other/x', bundle_file: f}\n  other: {endpoint_url: 'https://o', profile: https_web}\n", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	partner, other := spiffeid.RequireTrustDomainFromString("partner.example"), spiffeid.RequireTrustDomainFromString("other")
	endpoints := []federation.Endpoint{
		{TrustDomain: other, URL: "https://o", Profile: federation.ProfileWeb},
		{TrustDomain: partner, URL: "https://p/b", Profile: federation.ProfileSPIFFE, ID: spiffeid.RequireFromPath(other, "/x"), BundleFile: "f"},
	}
	if got := cfg.endpoints(); !slices.Equal(got, endpoints) {
		t.Errorf("endpoints %+v", got)
	}
	cfg, err = loadText(minimal+"deployments:\n  default:\n    node_attestation:\n      x509pop: {ca_bundle_files: [a.pem, b.pem], verify_client_ip: true}\n      k8s_psat: {clusters: [prod, east.2]}\n  other: {listen_address: ':1'}\n"+
		"kubernetes_clusters:\n  prod: {service_account_allow_list: ['ns:sa'], allowed_node_label_keys: [zone]}\n  east.2: {service_account_allow_list: ['ns:sa'], audience: [], kube_config_file: k, use_pod_uid_for_agent_id: true}\n", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	deployments := []server.DeploymentConfig{
		{
			Name: "default", ListenAddress: "0.0.0.0:8081",
			X509Pop: &x509pop.Config{Mode: "external_pki", CABundleFiles: []string{"a.pem", "b.pem"}, MaxIntermediates: 4, MaxRSAKeySize: 8192, VerifyClientIP: true},
			Clusters: []k8spsat.Cluster{
				{Name: "prod", ServiceAccounts: []string{"ns:sa"}, NodeLabels: []string{"zone"}},
				{Name: "east.2", ServiceAccounts: []string{"ns:sa"}, Audiences: []string{}, Kubeconfig: "k", PodUIDs: true},
			},
		},
		{Name: "other", ListenAddress: ":1"},
	}
	if got := cfg.deployments(); !reflect.DeepEqual(got, deployments) {
		t.Errorf("deployments %+v", got)
	}
	want := "server.yaml: trust_domain is not set; give the trust domain to sign for, such as example.org"
	if _, err := loadText("", nil, nil); err == nil || err.Error() != want {
		t.Errorf("nothing: %v", err)
	}
}

// TestConfigTable: the published table is that of the code. After a change of a field run
// go test ./cmd/server -run TestConfigTable -update
func TestConfigTable(t *testing.T) {
	t.Parallel()
	clitest.Document(t, "configuration-server.md", "# Configuration of the server\n\n"+
		"One YAML file, given with `--config`; start from [server.example.yaml](../deploy/server.example.yaml). A flag takes precedence over the\n"+
		"environment, the environment over the file, and the file over the default. A dot separates sections of the file, and NAME,\n"+
		"CLUSTER, TRUSTDOMAIN or CIDR is a name of your choice. Write a list as `[A, B]` in the file, and as `A,B` in a flag or a variable. An empty variable\n"+
		"counts as unset. An unknown or contradictory field is an error. `server config check --config FILE` reports all errors at once,\n"+
		"with file, line and remedy. A reload ([operations.md](operations.md#reload-the-configuration)) applies fields with ↻.\n\n"+schema.Markdown())
}

// FuzzEntries: no file causes a panic, every error has a place and a cause, and accepted
// entries have all required fields.
func FuzzEntries(f *testing.F) {
	f.Add("entries:\n- id: web\n  spiffe_id: spiffe://example.org/web\n  selectors: ['unix:uid:1']\n")
	f.Add("entries: [{id: a, id: b}, &x {id: [c]}, *x, {x509_ttl: 1}]\n---\n")
	f.Fuzz(func(t *testing.T, text string) {
		entries, err := parseEntries("entries.yaml", []byte(text))
		var problems config.Error
		if err != nil && !errors.As(err, &problems) {
			t.Fatalf("%T: %v", err, err)
		}
		for _, p := range problems {
			if p.What == "" || !strings.HasPrefix(p.Where, "entries.yaml") {
				t.Errorf("problem without place or cause: %+v", p)
			}
		}
		for _, e := range entries {
			if e.GetId() == "" || e.GetSpiffeId() == "" || len(e.GetSelectors()) == 0 {
				t.Errorf("incomplete: %v", e)
			}
		}
	})
}
