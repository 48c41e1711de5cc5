package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/renewd/renewd/internal/agent"
	"github.com/renewd/renewd/internal/agent/bootstrap"
	"github.com/renewd/renewd/internal/agent/node"
	"github.com/renewd/renewd/internal/config"
)

// The limits of rebootstrap_delay.
const (
	minRebootstrapDelay = time.Second
	maxRebootstrapDelay = 7 * 24 * time.Hour
)

var rebootstraps = []string{string(agent.RebootstrapNever), string(agent.RebootstrapAuto), string(agent.RebootstrapAlways)}

// trustBootstrap checks how the agent authenticates the server.
func (c checker) trustBootstrap() {
	file, at := c.Config.TrustBundleFile != "", c.Config.TrustBundleURL != ""
	switch insecure := c.Config.InsecureBootstrap; {
	case file && at:
		c.Bad("trust_bundle_url", "contradicts trust_bundle_file ("+c.Origin("trust_bundle_file")+")", "keep one of the two")
	case file && insecure:
		c.Bad("insecure_bootstrap", "contradicts trust_bundle_file ("+c.Origin("trust_bundle_file")+")",
			"remove insecure_bootstrap: with a bundle file the first connection is authenticated")
	case at && insecure:
		c.Bad("insecure_bootstrap", "contradicts trust_bundle_url ("+c.Origin("trust_bundle_url")+")",
			"remove insecure_bootstrap: with the bundle from the URL the first connection is authenticated")
	case !file && !at && !insecure:
		c.Missing("trust_bundle_file", "is not set, so the server cannot be authenticated",
			"give the server's trust bundle (PEM or SPIFFE JSON) or trust_bundle_url, or set insecure_bootstrap: true to trust the first server that answers")
	}
	if at {
		if _, err := newTrustURL(c.Config); err != nil {
			c.Bad("trust_bundle_url", err.Error(), "write it as https://server.example.org/bundle or unix:///run/publisher.sock")
		}
	}
	if c.Config.TrustBundleCAFile != "" && !strings.HasPrefix(c.Config.TrustBundleURL, "https:") {
		c.Bad("trust_bundle_ca_file", "is of no use without an https trust_bundle_url", "set trust_bundle_url or remove it")
	}
	if c.OneOf("rebootstrap", "is none of the three", rebootstraps) && c.Config.Rebootstrap != string(agent.RebootstrapNever) {
		switch {
		case c.Config.InsecureBootstrap:
			c.Bad("rebootstrap", "contradicts insecure_bootstrap ("+c.Origin("insecure_bootstrap")+")",
				"remove insecure_bootstrap: a server that is not authenticated must not replace the stored bundle")
		case c.Config.Rebootstrap == string(agent.RebootstrapAlways) && len(c.attestations()) == 1 && c.attestations()[0].once:
			c.Bad("rebootstrap", "needs a node that can attest again, and "+c.attestations()[0].path+" works once", "set node_attestation, or rebootstrap to auto or never")
		}
	}
	if d := c.Config.RebootstrapDelay; d < minRebootstrapDelay || d > maxRebootstrapDelay {
		c.Bad("rebootstrap_delay", "is not from "+config.Short(minRebootstrapDelay)+" to "+config.Short(maxRebootstrapDelay), "10m is usual")
	}
}

// attestation is a way to attest the node that the configuration has, by the field that
// says so.
type attestation struct {
	path string
	once bool // works once
}

// attestations returns the ways to attest the node that the configuration has.
func (c checker) attestations() []attestation {
	var out []attestation
	for _, way := range []struct {
		fields []string
		once   bool
	}{
		{[]string{"join_token", "join_token_file"}, true},
		{[]string{"node_attestation.k8s_psat.cluster", "node_attestation.k8s_psat.token_path", "node_attestation.k8s_psat.audience"}, false},
		{[]string{"node_attestation.x509pop.private_key_path", "node_attestation.x509pop.certificate_path", "node_attestation.x509pop.intermediates_path", "node_attestation.x509pop.spiffe_endpoint_socket"}, false},
	} {
		for _, path := range way.fields {
			if c.Origin(path) != "" {
				out = append(out, attestation{path, way.once})
				break
			}
		}
	}
	return out
}

// nodeAttestation checks how the node is attested.
func (c checker) nodeAttestation() {
	if c.Config.JoinToken != "" && c.Config.JoinTokenFile != "" {
		c.Bad("join_token", "contradicts join_token_file ("+c.Origin("join_token_file")+")", "keep one of the two")
	}
	if _, ok := node.ParseToken(c.Config.JoinToken); !ok {
		c.Bad("join_token", "is not one word", "give the token alone, or what \"spire-server token generate\" prints")
	}
	ways := c.attestations()
	for _, second := range ways[min(1, len(ways)):] {
		remedy := "keep one way to attest the node"
		if c.Origin(ways[0].path) == "RENEWD_JOIN_TOKEN_FILE" {
			remedy += "; the systemd unit sets that variable: set it to nothing in a drop-in"
		}
		c.Bad(second.path, "contradicts "+ways[0].path+" ("+c.Origin(ways[0].path)+")", remedy)
	}
	for _, w := range ways {
		switch {
		case strings.HasPrefix(w.path, "node_attestation.k8s_psat."):
			c.k8sPSAT()
		case strings.HasPrefix(w.path, "node_attestation.x509pop."):
			c.x509PoP()
		}
	}
}

func (c checker) k8sPSAT() {
	if c.Config.PSATCluster == "" {
		c.Missing("node_attestation.k8s_psat.cluster", "is not set", "give the name that the server has for this cluster")
	}
	c.NotEmpty("node_attestation.k8s_psat.token_path")
}

func (c checker) x509PoP() {
	const at = "node_attestation.x509pop."
	files := []struct{ path, value string }{
		{at + "private_key_path", c.Config.PoPKeyPath}, {at + "certificate_path", c.Config.PoPCertPath}, {at + "intermediates_path", c.Config.PoPChainPath},
	}
	if c.Config.PoPEndpoint == "" {
		for _, f := range files[:2] {
			if f.value == "" {
				c.Missing(f.path, "is not set", "give the node's certificate and its key, or spiffe_endpoint_socket")
			}
		}
		return
	}
	for _, f := range files {
		if f.value != "" {
			c.Bad(f.path, "contradicts spiffe_endpoint_socket ("+c.Origin(at+"spiffe_endpoint_socket")+")", "keep the files or the socket")
		}
	}
	if err := workloadapi.ValidateAddress(c.Config.PoPEndpoint); err != nil {
		c.Bad(at+"spiffe_endpoint_socket", "is not the address of a Workload API", "write it as unix:///run/spire/agent.sock")
	} else if path, ok := strings.CutPrefix(c.Config.PoPEndpoint, "unix://"); ok && filepath.Clean(path) == filepath.Clean(c.Config.SocketPath) {
		c.Bad(at+"spiffe_endpoint_socket", "is this agent's own socket", "give the socket of another agent")
	}
}

// attestor returns how the node is attested, nil for a join token.
func attestor(cfg *settings) node.Attestor {
	switch {
	case cfg.PSATCluster != "":
		return node.K8sPSAT(node.K8sPSATConfig{Cluster: cfg.PSATCluster, TokenPath: cfg.PSATTokenPath, Audience: cfg.PSATAudience})
	case cfg.PoPCertPath != "" || cfg.PoPEndpoint != "":
		return node.X509PoP(node.X509PoPConfig{KeyPath: cfg.PoPKeyPath, CertificatePath: cfg.PoPCertPath, IntermediatesPath: cfg.PoPChainPath, Endpoint: cfg.PoPEndpoint})
	}
	return nil
}

func newTrustURL(cfg *settings) (*bootstrap.URL, error) {
	return bootstrap.NewURL(bootstrap.URLConfig{
		URL: cfg.TrustBundleURL, CAFile: cfg.TrustBundleCAFile, TrustDomain: cfg.TrustDomain, ServerAddress: cfg.ServerAddress,
	})
}

// trustSource returns the source of trust_bundle_url, nil if it is not set.
func trustSource(cfg *settings) agent.TrustSource {
	if cfg.TrustBundleURL == "" {
		return nil
	}
	u, err := newTrustURL(cfg)
	if err != nil {
		return nil // not reached: trustBootstrap checks it
	}
	return u
}

// probeTimeout bounds each question of config check.
const probeTimeout = 5 * time.Second

// probeNode looks for what authenticates the server and attests the node. A URL or another
// agent may answer later; a file with the wrong content is wrong on every machine.
func (c checker) probeNode(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	if source := trustSource(c.Config); source != nil {
		if _, err := source.Fetch(ctx, bootstrap.Request{Attempt: 1, Since: time.Now()}); err != nil {
			c.Warn("trust_bundle_url", "does not work on this machine: "+err.Error(), "make it reachable before the first start")
		}
	} else if path := c.Config.TrustBundleFile; path != "" {
		_, err := bootstrap.File{Path: path, TrustDomain: c.Config.TrustDomain}.Fetch(ctx, bootstrap.Request{})
		c.File("trust_bundle_file", err, "install the server's trust bundle there before the first start")
	}
	a := attestor(c.Config)
	var path string
	switch {
	case c.Config.JoinTokenFile != "":
		a, path = node.JoinToken("", c.Config.JoinTokenFile), "join_token_file"
	case a == nil:
		return
	case c.Config.PoPEndpoint != "":
		path = "node_attestation.x509pop.spiffe_endpoint_socket"
	case c.Config.PoPCertPath != "":
		path = "node_attestation.x509pop.certificate_path"
	default:
		path = "node_attestation.k8s_psat.token_path"
	}
	credential, err := a.Credential(ctx)
	switch {
	case path == "join_token_file" && c.attested() && !config.IsPermanent(err):
		// The token has been used, and may be gone.
	case err != nil:
		c.File(path, err, "install the credential before the first start")
	case !credential.ExpiresAt.IsZero() && time.Now().After(credential.ExpiresAt):
		c.Warn(path, "has expired: it is "+credential.About, "install a new one")
	}
}

// attested reports whether the agent has an agent SVID, which may have expired.
func (c checker) attested() bool {
	_, err := os.Stat(filepath.Join(c.Config.DataDir, node.Files[0]))
	return err == nil
}
