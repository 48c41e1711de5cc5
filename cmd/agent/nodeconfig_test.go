package main

import (
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/cli"
)

const unbootstrapped = "trust_domain: example.org\nserver_address: server.example.org:8081\n"

func TestTrustBootstrapProblems(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, text, want string }{
		{"file and URL", "trust_bundle_file: b.pem\ntrust_bundle_url: https://example.org/", `agent.yaml:4: trust_bundle_url: "https://example.org/" contradicts trust_bundle_file (agent.yaml:3); keep one of the two`},
		{"URL and insecure", "trust_bundle_url: https://example.org/\ninsecure_bootstrap: true", `agent.yaml:4: insecure_bootstrap: true contradicts trust_bundle_url (agent.yaml:3); remove insecure_bootstrap: with the bundle from the URL the first connection is authenticated`},
		{"plain http", "trust_bundle_url: http://example.org/", `agent.yaml:3: trust_bundle_url: "http://example.org/" is neither an https URL nor unix:///PATH; write it as https://server.example.org/bundle or unix:///run/publisher.sock`},
		{"CA file for a file", "trust_bundle_file: b.pem\ntrust_bundle_ca_file: ca.pem", `agent.yaml:4: trust_bundle_ca_file: "ca.pem" is of no use without an https trust_bundle_url; set trust_bundle_url or remove it`},
		{"CA file for a socket", "trust_bundle_url: unix:///run/p.sock\ntrust_bundle_ca_file: ca.pem", `agent.yaml:4: trust_bundle_ca_file: "ca.pem" is of no use without an https trust_bundle_url; set trust_bundle_url or remove it`},
		{"mode", "trust_bundle_file: b.pem\nrebootstrap: sometimes", `agent.yaml:4: rebootstrap: "sometimes" is none of the three; use never, auto or always`},
		{"delay", "trust_bundle_file: b.pem\nrebootstrap_delay: 0s", `agent.yaml:4: rebootstrap_delay: 0s is not from 1s to 168h; 10m is usual`},
		{"insecure rebootstrap", "insecure_bootstrap: true\nrebootstrap: auto", `agent.yaml:4: rebootstrap: "auto" contradicts insecure_bootstrap (agent.yaml:3); remove insecure_bootstrap: a server that is not authenticated must not replace the stored bundle`},
		{"always with a token", "trust_bundle_file: b.pem\njoin_token_file: t\nrebootstrap: always", `agent.yaml:5: rebootstrap: "always" needs a node that can attest again, and join_token_file works once; set node_attestation, or rebootstrap to auto or never`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if _, err := loadText(unbootstrapped+tt.text+"\n", nil, nil); err == nil || err.Error() != tt.want {
				t.Errorf("got  %v\nwant %s", err, tt.want)
			}
		})
	}
}

func TestNodeAttestationProblems(t *testing.T) {
	t.Parallel()
	const psat, pop = "node_attestation: {k8s_psat: {cluster: c}}", "node_attestation: {x509pop: {private_key_path: k, certificate_path: c}}"
	for _, tt := range []struct {
		name, text, want string
		env              map[string]string
	}{
		{name: "two ways", text: "join_token: t\n" + pop, want: `agent.yaml:5: node_attestation.x509pop.private_key_path: "k" contradicts join_token (agent.yaml:4); keep one way to attest the node`},
		{name: "two sections", text: "node_attestation: {k8s_psat: {cluster: c}, x509pop: {private_key_path: k, certificate_path: c}}", want: `agent.yaml:4: node_attestation.x509pop.private_key_path: "k" contradicts node_attestation.k8s_psat.cluster (agent.yaml:4); keep one way to attest the node`},
		{name: "the unit's variable", text: psat, env: map[string]string{"RENEWD_JOIN_TOKEN_FILE": "/t"}, want: `agent.yaml:4: node_attestation.k8s_psat.cluster: "c" contradicts join_token_file (RENEWD_JOIN_TOKEN_FILE); keep one way to attest the node; the systemd unit sets that variable: set it to nothing in a drop-in`},
		{name: "no cluster", text: "node_attestation: {k8s_psat: {token_path: t}}", want: `agent.yaml: node_attestation.k8s_psat.cluster is not set; give the name that the server has for this cluster`},
		{name: "no token path", text: "node_attestation: {k8s_psat: {cluster: c, token_path: \"\"}}", want: `agent.yaml:4: node_attestation.k8s_psat.token_path: "" is empty; remove it for the default, /var/run/secrets/tokens/spire-agent`},
		{name: "no key", text: "node_attestation: {x509pop: {certificate_path: c}}", want: `agent.yaml: node_attestation.x509pop.private_key_path is not set; give the node's certificate and its key, or spiffe_endpoint_socket`},
		{name: "no certificate", text: "node_attestation: {x509pop: {private_key_path: k}}", want: `agent.yaml: node_attestation.x509pop.certificate_path is not set; give the node's certificate and its key, or spiffe_endpoint_socket`},
		{name: "files and socket", text: "node_attestation: {x509pop: {intermediates_path: i, spiffe_endpoint_socket: \"unix:///run/a.sock\"}}", want: `agent.yaml:4: node_attestation.x509pop.intermediates_path: "i" contradicts spiffe_endpoint_socket (agent.yaml:4); keep the files or the socket`},
		{name: "no address", text: "node_attestation: {x509pop: {spiffe_endpoint_socket: /run/a.sock}}", want: `agent.yaml:4: node_attestation.x509pop.spiffe_endpoint_socket: "/run/a.sock" is not the address of a Workload API; write it as unix:///run/spire/agent.sock`},
		{name: "own socket", text: "node_attestation: {x509pop: {spiffe_endpoint_socket: \"unix:///run/renewd/agent.sock\"}}", want: `agent.yaml:4: node_attestation.x509pop.spiffe_endpoint_socket: "unix:///run/renewd/agent.sock" is this agent's own socket; give the socket of another agent`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if _, err := loadText(minimal+tt.text+"\n", nil, tt.env); err == nil || err.Error() != tt.want {
				t.Errorf("got  %v\nwant %s", err, tt.want)
			}
		})
	}
	for text, want := range map[string]string{psat: "k8s_psat", pop: "x509pop", "node_attestation: {x509pop: {spiffe_endpoint_socket: \"unix:///run/a.sock\"}}": "x509pop", "join_token: t": ""} {
		cfg, err := loadText(minimal+"rebootstrap: auto\n"+text+"\n", nil, nil)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		c := agentConfig(cfg, cli.Env{Stderr: os.Stderr, Getenv: noEnv})
		if c.Attestor == nil && want != "" || c.Attestor != nil && c.Attestor.Type() != want {
			t.Errorf("%s: attestor %v, want %q", text, c.Attestor, want)
		}
	}
}

// serveBundle serves the trust bundle of an identity at $BUNDLE_URL over https, and writes
// the CA of its certificate, and a node's credentials, into the script's folder.
func serveBundle(t *testing.T, e *testscript.Env, id *identity) {
	bundlePEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: id.root})
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(bundlePEM) }))
	e.Defer(s.Close)
	e.Setenv("BUNDLE_URL", s.URL)
	claims := func(audience string) []byte {
		part := base64.RawURLEncoding.EncodeToString
		return []byte(part([]byte(`{}`)) + "." + part([]byte(`{"aud":["`+audience+`"],"exp":4102444800}`)) + "." + part([]byte("x")))
	}
	write := func(name string, content []byte) {
		if err := os.WriteFile(filepath.Join(e.WorkDir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("ca.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
	write("bundle.pem", bundlePEM)
	write("bundle.der", id.root)
	root, err := x509.ParseCertificate(id.root)
	if err != nil {
		t.Fatal(err)
	}
	json, err := spiffebundle.FromX509Authorities(spiffeid.RequireTrustDomainFromString("example.org"), []*x509.Certificate{root}).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	write("bundle.json", json)
	write("token", claims("spire-server"))
	write("api.token", claims("https://kubernetes.default.svc"))
	key := newKey(t)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	write("node.key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}))
	for name, life := range map[string]time.Duration{"node.pem": time.Hour, "expired.pem": -time.Hour} {
		template := &x509.Certificate{
			SerialNumber: big.NewInt(77), Subject: pkix.Name{CommonName: "node-1"}, KeyUsage: x509.KeyUsageDigitalSignature,
			NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(life),
		}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		write(name, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
}

// No key and no token is in what config check prints.
func TestProbeHasNoSecrets(t *testing.T) {
	t.Parallel()
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("s3cr3t.s3cr3t.s3cr3t"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{
		"node_attestation: {k8s_psat: {cluster: c, token_path: " + secret + "}}",
		"node_attestation: {x509pop: {private_key_path: " + secret + ", certificate_path: " + secret + "}}",
	} {
		file := filepath.Join(t.TempDir(), "agent.yaml")
		if err := os.WriteFile(file, []byte(minimal+text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		var out, problems strings.Builder
		if code := program.Run(t.Context(), []string{"config", "check", "--config", file}, cli.Env{Getenv: noEnv, Stdout: &out, Stderr: &problems}); code != 0 {
			t.Errorf("exit status %d", code)
		}
		if !strings.Contains(problems.String(), "node_attestation") || strings.Contains(strings.ReplaceAll(problems.String(), secret, ""), "s3cr3t") {
			t.Errorf("%s", problems.String())
		}
	}
}
