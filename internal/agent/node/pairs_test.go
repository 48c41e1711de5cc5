package node_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"strings"
	"testing"

	"github.com/renewd/renewd/internal/agent/node"
	"github.com/renewd/renewd/internal/server/nodeattest/k8spsat"
	"github.com/renewd/renewd/internal/server/nodeattest/x509pop"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/test/kubetest"
)

// Each attestor is accepted by the server's verifier of the same name.
func TestAttestorsAtTheServersVerifiers(t *testing.T) {
	t.Parallel()
	api := kubetest.Start(t)
	token := serviceAccountToken(`{"aud":["spire-server"]}`)
	api.Put(token, kubetest.Pod{Namespace: "renewd", ServiceAccount: "agent", Name: "agent-x", UID: "pod-1", Node: "node-1", NodeUID: "uid-1", Audiences: []string{"spire-server"}})
	psat, err := k8spsat.New(td, []k8spsat.Cluster{{Name: "prod", ServiceAccounts: []string{"renewd:agent"}, Kubeconfig: api.Kubeconfig(t)}})
	if err != nil {
		t.Fatal(err)
	}
	check := func(a node.Attestor, v spireapi.NodeVerifier, id, selector string) {
		t.Helper()
		c, err := a.Credential(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		found, err := v.Verify(t.Context(), c.Payload, c.Respond)
		if err != nil || a.Type() != v.Type() || !strings.HasPrefix(found.ID.String(), "spiffe://example.org/spire/agent/"+id) {
			t.Fatalf("%s: %v, %v", a.Type(), found.ID, err)
		}
		for _, s := range found.Selectors {
			if s.Type+":"+s.Value == selector {
				return
			}
		}
		t.Errorf("%s: selectors %v, want %s", a.Type(), found.Selectors, selector)
	}
	check(node.K8sPSAT(node.K8sPSATConfig{Cluster: "prod", TokenPath: writeFile(t, "token", []byte(token)), Audience: "spire-server"}), psat, "k8s_psat/prod/uid-1", "k8s_psat:agent_pod_name:agent-x")

	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ecKey, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	for _, key := range []crypto.Signer{rsaKey, ecKey} {
		f := newPoPFiles(t, key, nil)
		pop, err := x509pop.New(x509pop.Config{TrustDomain: td, CABundleFiles: []string{f.intermediate}})
		if err != nil {
			t.Fatal(err)
		}
		check(node.X509PoP(f.config()), pop, "x509pop/", "x509pop:subject:cn:node-1")
	}
}
