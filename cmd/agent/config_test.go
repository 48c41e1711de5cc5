package main

import (
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/config"
	"github.com/renewd/renewd/test/clitest"
)

// minimal is a configuration with the required fields only.
const minimal = "trust_domain: example.org\nserver_address: server.example.org:8081\ntrust_bundle_file: bundle.pem\n"

func loadText(text string, flags, env map[string]string) (*settings, error) {
	return schema.Load("agent.yaml", []byte(text), flags, func(k string) string { return env[k] })
}

// The table and the struct describe the same fields.
func TestFieldsCoverConfig(t *testing.T) {
	t.Parallel()
	clitest.Covers(t, fields)
}

// Every field takes its value from the file, then from its variable, then from
// its flag.
func TestPrecedence(t *testing.T) {
	t.Parallel()
	values := map[string][3]string{ // as text in the file, the environment, the flag
		"trust_domain":             {"a.org", "b.org", "c.org"},
		"insecure_bootstrap":       {"true", "false", "true"},
		"rebootstrap_delay":        {"1s", "2s", "3s"},
		"socket_mode":              {"0700", "0770", "0777"},
		"log.level":                {"debug", "warn", "error"},
		"renewal.taint_delay":      {"1s", "2s", "3s"},
		"renewal.taint_rate":       {"1", "2", "3"},
		"renewal.refresh_interval": {"1s", "2s", "3s"},
		"entry_removal_delay":      {"1s", "2s", "3s"},
		"renewal.batch_size":       {"1", "2", "3"},
		"svid_cache_size":          {"1", "2", "3"},
		"unix.discover_path":       {"false", "true", "false"},
		"unix.sha256_size_limit":   {"1", "2", "3"},

		"workload_attestation.kubernetes.enabled":                     {"true", "false", "true"},
		"workload_attestation.kubernetes.kubelet_port":                {"1", "2", "3"},
		"workload_attestation.kubernetes.kubelet_read_only_port":      {"1", "2", "3"},
		"workload_attestation.kubernetes.skip_kubelet_verification":   {"true", "false", "true"},
		"workload_attestation.kubernetes.poll_attempts":               {"1", "2", "3"},
		"workload_attestation.kubernetes.poll_interval":               {"1s", "2s", "3s"},
		"workload_attestation.kubernetes.disable_container_selectors": {"true", "false", "true"},
		"workload_attestation.kubernetes.namespace_labels":            {"true", "false", "true"},

		"workload_attestation.docker.enabled":  {"true", "false", "true"},
		"workload_attestation.systemd.enabled": {"true", "false", "true"},
	}
	unchecked := schema
	unchecked.Check = nil
	for i := range fields {
		f := &fields[i]
		t.Run(f.Path, func(t *testing.T) {
			t.Parallel()
			v, ok := values[f.Path]
			if !ok {
				v = [3]string{"text a", "text b", "text c"}
			}
			env, flags := map[string]string{}, map[string]string{}
			check := func(source, want string) {
				t.Helper()
				cfg, err := unchecked.Load("agent.yaml", []byte(document(f.Path, v[0])), flags, func(k string) string { return env[k] })
				if err != nil {
					t.Fatal(err)
				}
				wanted, err := unchecked.Load("want.yaml", []byte(document(f.Path, want)), nil, noEnv)
				if err != nil {
					t.Fatal(err)
				}
				if !reflect.DeepEqual(cfg, wanted) {
					t.Errorf("%s: %+v, want only %s = %s", source, *cfg, f.Path, want)
				}
			}
			check("file over default", v[0])
			env[schema.Variable(f)] = v[1]
			check("environment over file", v[1])
			if f.Flag() != "" {
				flags[f.Path] = v[2]
				check("flag over environment", v[2])
			}
		})
	}
}

// document is a file that sets one field.
func document(path, value string) string {
	if path == "log_selectors" {
		value = "[" + value + "]"
	}
	var out strings.Builder
	parts := strings.Split(path, ".")
	for depth, part := range parts {
		out.WriteString(strings.Repeat("  ", depth) + part + ":")
		if depth < len(parts)-1 {
			out.WriteString("\n")
		}
	}
	return out.String() + " " + value + "\n"
}

func TestDefaults(t *testing.T) {
	t.Parallel()
	cfg, err := loadText(minimal, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if cfg.TaintDelay != time.Minute || cfg.TaintRate != 20 || cfg.RefreshInterval != 5*time.Second || cfg.EntryRemovalDelay != 30*time.Second ||
		cfg.BatchSize != 500 || cfg.KeyType != "ec-p256" || cfg.SVIDCacheSize != 1000 || cfg.ServerProxy != "" || cfg.JWTTainted != "serve" ||
		cfg.MetricsAddress != "127.0.0.1:9090" || cfg.SocketPath != defaultSocket || cfg.SocketMode != 0o777 ||
		adminSocket(cfg.AdminSocket, cfg.SocketPath) != "/run/renewd/agent-admin.sock" || !slices.Equal(cfg.LogSelectors, []string{"unix"}) || cfg.KubernetesEnabled || cfg.DockerEnabled || cfg.SystemdEnabled ||
		cfg.DataDir != "/var/lib/renewd" || !cfg.DiscoverPath || cfg.InsecureBootstrap {
		t.Errorf("defaults: %+v", *cfg)
	}
}

// The output of "spire-server token generate" is accepted as a token.
func TestTokenOfSPIRE(t *testing.T) {
	t.Parallel()
	if _, err := loadText(minimal+`join_token: "Token: 0b7a-1\nWarning: Missing SPIFFE ID.\n"`+"\n", nil, nil); err != nil {
		t.Error(err)
	}
}

// Each wrong configuration has exactly this error.
func TestProblems(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, add  string
		flags, env map[string]string
		want       string
	}{
		{name: "unknown", add: "taint_rate: 3", want: `agent.yaml:4: "taint_rate" is not a field; did you mean renewal.taint_rate?`},
		{name: "misspelled", add: "data_dri: /x", want: `agent.yaml:4: "data_dri" is not a field; did you mean data_dir?`},
		{name: "far off", add: "zzzzzzzzz: /x", want: `agent.yaml:4: "zzzzzzzzz" is not a field; remove it; "agent help config" lists the fields`},
		{name: "duplicate", add: "data_dir: /x\ndata_dir: /x", want: `agent.yaml:5: data_dir is given twice, first in line 4; keep one of the two`},
		{name: "duplicate section", add: "log:\n  level: info\nlog:\n  level: warn", want: `agent.yaml:6: log is given twice, first in line 4; keep one of the two`},
		{name: "number for text", add: "data_dir: 7", want: `agent.yaml:4: data_dir: "7" is not a string; put quotes around it`},
		{name: "text for number", add: "svid_cache_size: many", want: `agent.yaml:4: svid_cache_size: "many" is not an integer; write the digits without quotes and without a unit`},
		{name: "yes for true", add: "insecure_bootstrap: yes", want: `agent.yaml:4: insecure_bootstrap: "yes" is not a boolean; write true, or false, without quotes`},
		{name: "duration without unit", add: "renewal: {taint_delay: 60}", want: `agent.yaml:4: renewal.taint_delay: "60" has no unit; write it with a unit, such as 500ms, 60s or 5m`},
		{name: "section for a value", add: "data_dir:\n  path: /x", want: `agent.yaml:4: data_dir takes one value, not a list or a section; write data_dir: /var/lib/renewd`},
		{name: "value for a section", add: "log: debug", want: `agent.yaml:4: log is not a list of fields; write one "name: value" a line`},
		{name: "nothing", add: "data_dir:", want: `agent.yaml:4: data_dir has no value; give one or remove the line`},
		{name: "mode", add: "socket_mode: 888", want: `agent.yaml:4: socket_mode: "888" is not an octal mode such as 0770`},
		{name: "level", add: "log: {level: loud}", want: `agent.yaml:4: log.level: "loud" is not debug, info, warn or error`},
		{name: "format", add: "log: {format: xml}", want: `agent.yaml:4: log.format: "xml" is not a format; use auto, text or json`},
		{name: "contradicting trust", add: "insecure_bootstrap: true", want: `agent.yaml:4: insecure_bootstrap: true contradicts trust_bundle_file (agent.yaml:3); remove insecure_bootstrap: with a bundle file the first connection is authenticated`},
		{name: "contradicting tokens", add: "join_token_file: /t", env: map[string]string{"RENEWD_JOIN_TOKEN": "s3cr3t"}, want: `RENEWD_JOIN_TOKEN: join_token contradicts join_token_file (agent.yaml:4); keep one of the two`},
		{name: "token with space", add: `join_token: "s3cr3t x"`, want: `agent.yaml:4: join_token is not one word; give the token alone, or what "spire-server token generate" prints`},
		{name: "token of wrong type", add: `join_token: 1234`, want: `agent.yaml:4: join_token is not a string; put quotes around it`},
		{name: "rate 0", flags: map[string]string{"renewal.taint_rate": "0"}, want: `flag --renewal-taint-rate: renewal.taint_rate: 0 would never renew anything; set 1 or more renewals a second; 20 is usual`},
		{name: "batch", env: map[string]string{"RENEWD_RENEWAL_BATCH_SIZE": "501"}, want: `RENEWD_RENEWAL_BATCH_SIZE: renewal.batch_size: 501 is not from 1 to 500, the most that a server accepts; set 500 or less`},
		{name: "delay", add: "renewal: {taint_delay: 61m}", want: `agent.yaml:4: renewal.taint_delay: 1h1m is not from 0s to 1h; 60s spreads a fleet over a minute`},
		{name: "removal", add: "entry_removal_delay: 0s", want: `agent.yaml:4: entry_removal_delay: 0s is not from 1s to 1h; 30s is usual`},
		{name: "refresh", add: "renewal: {refresh_interval: 10ms}", want: `agent.yaml:4: renewal.refresh_interval: 10ms is not from 1s to 10m; 5s is usual`},
		{name: "key type", add: "renewal: {key_type: ed25519}", want: `agent.yaml:4: renewal.key_type: "ed25519" is not a key type; use ec-p256, ec-p384 or rsa-2048`},
		{name: "proxy in TLS", add: "server_proxy: https://node:hunter2@proxy.example.org:3128", want: `agent.yaml:4: server_proxy is not an http:// URL: the connection through it is TLS already; write it as http://proxy.example.org:3128, environment or none`},
		{name: "proxy without a port", env: map[string]string{"RENEWD_SERVER_PROXY": "http://proxy"}, want: `RENEWD_SERVER_PROXY: server_proxy has no host and port; write it as http://proxy.example.org:3128, environment or none`},
		{name: "JWT-SVIDs of a tainted key", add: "jwt: {tainted: drop}", want: `agent.yaml:4: jwt.tainted: "drop" is not one of the two; use serve or replace`},
		{name: "cache", add: "svid_cache_size: 0", want: `agent.yaml:4: svid_cache_size: 0 keeps nothing; set 1 or more; 1000 is usual`},
		{name: "disk for keys", add: "runtime_dir: /proc/renewd", want: `agent.yaml:4: runtime_dir: "/proc/renewd" is not on a memory file system; private keys are kept there: use a directory on tmpfs, such as one under /run, or remove it`},
		{name: "same directory", add: "runtime_dir: /var/lib/renewd/", want: `agent.yaml:4: runtime_dir: "/var/lib/renewd/" is the same as data_dir; give it a directory of its own on a memory file system, or remove it`},
		{name: "socket beside keys", add: "runtime_dir: /dev/shm/renewd\nsocket_path: /dev/shm/renewd/agent.sock", want: `agent.yaml:5: socket_path: "/dev/shm/renewd/agent.sock" is inside of runtime_dir, which only the agent may enter; keep them apart, such as in /run/renewd/agent.sock and /run/renewd/svids`},
		{name: "socket below keys", add: "runtime_dir: /dev/shm/\nsocket_path: /dev/shm/renewd/agent.sock", want: `agent.yaml:5: socket_path: "/dev/shm/renewd/agent.sock" is inside of runtime_dir, which only the agent may enter; keep them apart, such as in /run/renewd/agent.sock and /run/renewd/svids`},
		{name: "socket beside the agent key", add: "data_dir: /x\nsocket_path: /x/agent.sock", want: `agent.yaml:5: socket_path: "/x/agent.sock" is inside of data_dir, which only the agent may enter; keep them apart, such as in /run/renewd/agent.sock and /run/renewd/svids`},
		{name: "long socket", add: "socket_path: /" + strings.Repeat("x", 107), want: `agent.yaml:4: socket_path: "/` + strings.Repeat("x", 107) + `" is 108 bytes long, and the kernel takes at most 107; choose a shorter path`},
		{name: "socket closed to its owner", add: "socket_mode: 0044", want: `agent.yaml:4: socket_mode: 0044 does not let its owner connect; set at least 0600; 0777 lets every workload connect`},
		{name: "no port", add: "metrics: {address: localhost}", want: `agent.yaml:4: metrics.address: "localhost" is not host:port; write it as host:port, such as 127.0.0.1:9090`},
		{name: "web config without an address", add: `metrics: {address: "", web_config_file: w.yml}`, want: `agent.yaml:4: metrics.web_config_file: "w.yml" is of no use without metrics.address; set metrics.address or remove it`},
		{name: "size limit", add: "unix: {sha256_size_limit: -1}", want: `agent.yaml:4: unix.sha256_size_limit: -1 is negative; give a number of bytes, or 0 to hash none`},
		{name: "two sockets at one path", add: "admin_socket_path: /run/renewd/x/../agent.sock", want: `agent.yaml:4: admin_socket_path: "/run/renewd/x/../agent.sock" is the same as socket_path; give it a path of its own`},
		{name: "kubelet's port", add: "workload_attestation: {kubernetes: {kubelet_port: 0}}", want: `agent.yaml:4: workload_attestation.kubernetes.kubelet_port: 0 is not a port; 10250 is usual`},
		{name: "kubelet's read-only port", add: "workload_attestation: {kubernetes: {kubelet_read_only_port: 65536}}", want: `agent.yaml:4: workload_attestation.kubernetes.kubelet_read_only_port: 65536 is not a port; 10255 is usual; remove it to use HTTPS`},
		{name: "kubelet without a CA", add: "workload_attestation: {kubernetes: {kubelet_ca_file: ''}}", want: `agent.yaml:4: workload_attestation.kubernetes.kubelet_ca_file: "" is empty, so the kubelet cannot be authenticated; give the CA of its certificate, or set skip_kubelet_verification: true to accept any`},
		{name: "certificate without a key", add: "workload_attestation: {kubernetes: {certificate_file: a}}", want: `agent.yaml:4: workload_attestation.kubernetes.certificate_file: "a" is of no use without private_key_file; give both or none`},
		{name: "key without a certificate", add: "workload_attestation: {kubernetes: {private_key_file: a}}", want: `agent.yaml:4: workload_attestation.kubernetes.private_key_file: "a" is of no use without certificate_file; give both or none`},
		{name: "no polls", add: "workload_attestation: {kubernetes: {poll_attempts: 0}}", want: `agent.yaml:4: workload_attestation.kubernetes.poll_attempts: 0 is not from 1 to 100; 5 is usual`},
		{name: "polls without a pause", add: "workload_attestation: {kubernetes: {poll_interval: 1ms}}", want: `agent.yaml:4: workload_attestation.kubernetes.poll_interval: 1ms is not from 100ms to 10s; 500ms is usual`},
		{name: "a URL for a path", add: "workload_attestation:\n  docker:\n    socket_path: unix:///var/run/docker.sock", want: `agent.yaml:6: workload_attestation.docker.socket_path: "unix:///var/run/docker.sock" is not an absolute path; write the path of the socket, without unix://`},
		{name: "one socket for all users", add: "workload_attestation: {docker: {rootless_podman_socket_path: /run/podman.sock}}", want: `agent.yaml:4: workload_attestation.docker.rootless_podman_socket_path: "/run/podman.sock" is not an absolute path with %d once, the place of the user ID; write it like /run/user/%d/podman/podman.sock, without unix://`},
		{name: "syntax", add: "data_dir: [", want: `agent.yaml:4: is not YAML: did not find expected node content; check the indentation and the quotes around it`},
		{name: "token as alias", add: "join_token: *s3cr3t", want: `agent.yaml: is not YAML: an alias has no anchor; check the indentation and the quotes around it`},
		{name: "two documents", add: "---\ndata_dir: /x", want: `agent.yaml:4: the file has more than one document; remove everything from the second --- on`},
		{name: "all at once", add: "svid_cache_size: 0\nrenewal: {taint_rate: 0}", want: "agent.yaml:5: renewal.taint_rate: 0 would never renew anything; set 1 or more renewals a second; 20 is usual\n" +
			"agent.yaml:4: svid_cache_size: 0 keeps nothing; set 1 or more; 1000 is usual"},
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
}

func TestMissing(t *testing.T) {
	t.Parallel()
	want := "agent.yaml: trust_domain is not set; give the trust domain of the server, such as example.org\n" +
		"agent.yaml: server_address is not set; give the server's host and port, such as server.example.org:8081\n" +
		"agent.yaml: trust_bundle_file is not set, so the server cannot be authenticated; give the server's trust bundle (PEM or SPIFFE JSON) or trust_bundle_url, or set insecure_bootstrap: true to trust the first server that answers"
	for _, text := range []string{"", "# only this\n", "null\n"} {
		if _, err := loadText(text, nil, nil); err == nil || err.Error() != want {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// The published table matches the code. After a change of a field:
// go test ./cmd/agent -run TestConfigTable -update
func TestConfigTable(t *testing.T) {
	t.Parallel()
	clitest.Document(t, "configuration-agent.md", "# Configuration of the agent\n\n"+
		"One YAML file, given with `--config`; start from [an example for your kind of node](../deploy/README.md#kinds-of-nodes). A flag takes precedence over the\n"+
		"environment, the environment over the file, and the file over the default. A dot separates sections of the file. Write a list as `[A, B]` in\n"+
		"the file, and as `A,B` in a flag or a variable. An empty variable counts as unset. An unknown or contradictory field is an error.\n"+
		"`agent config check --config FILE` reports all errors at once, with file, line and remedy. A reload ([operations.md](operations.md#reload-the-configuration)) applies fields with ↻.\n\n"+schema.Markdown())
}

// FuzzConfig checks that no file makes the loader panic, that every problem has a
// place and a reason, and that none contains a secret.
func FuzzConfig(f *testing.F) {
	f.Add(minimal)
	f.Add("log: {level: debug, format: json}\nrenewal:\n  taint_delay: 60s\n")
	f.Add("a: &x [1]\nb: *x\n<<: {c: d}\n? {a: b}\n: c\n")
	f.Add("join_token: [s3cr3t]\n")
	f.Add("--- !!binary x\n...\n---\n")
	const secret = "7c1f-very-secret"
	f.Fuzz(func(t *testing.T, text string) {
		text = strings.ReplaceAll(text, "s3cr3t", secret)
		cfg, err := loadText(text, nil, map[string]string{"RENEWD_JOIN_TOKEN": secret + " x"})
		var problems config.Error
		if !errors.As(err, &problems) || cfg != nil {
			t.Fatalf("the token with a space was accepted: %v", err)
		}
		for _, p := range problems {
			if p.What == "" || !strings.HasPrefix(p.Where, "agent.yaml") && !strings.HasPrefix(p.Where, "RENEWD_") {
				t.Errorf("problem without place or reason: %+v", p)
			}
			if p.Path == "join_token" && strings.Contains(p.String(), secret) {
				t.Errorf("the secret is in %q", p)
			}
		}
	})
}
