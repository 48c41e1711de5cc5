package server_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/server"
	"github.com/renewd/renewd/internal/server/nodeattest/k8spsat"
	"github.com/renewd/renewd/internal/server/nodeattest/x509pop"
	"github.com/renewd/renewd/test/kubetest"
)

// attestNode attests without a token and answers a challenge of x509pop with key.
func (a *agent) attestNode(kind string, payload map[string]any, key crypto.Signer) (*identity, error) {
	a.t.Helper()
	data, err := json.Marshal(payload)
	check(a.t, err)
	own, csr := newKey(a.t)
	stream, err := a.AttestAgent(a.t.Context())
	check(a.t, err)
	req := attestation(string(data), csr)
	req.GetParams().Data.Type = kind
	check(a.t, stream.Send(req))
	resp, err := stream.Recv()
	if err == nil && resp.GetChallenge() != nil {
		var c struct {
			ECDSA struct{ Nonce []byte } `json:"ecdsa_signature"`
		}
		check(a.t, json.Unmarshal(resp.GetChallenge(), &c))
		nonce := make([]byte, 32)
		digest := sha256.Sum256(append(c.ECDSA.Nonce, nonce...))
		r, s, err := ecdsa.Sign(rand.Reader, key.(*ecdsa.PrivateKey), digest[:])
		check(a.t, err)
		answer, err := json.Marshal(map[string]any{"ecdsa_signature": map[string][]byte{"nonce": nonce, "r": r.Bytes(), "s": s.Bytes()}})
		check(a.t, err)
		check(a.t, stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: answer}}))
		if resp, err = stream.Recv(); err != nil {
			return nil, err
		}
	}
	if err != nil {
		return nil, err
	}
	if !resp.GetResult().GetReattestable() {
		a.t.Error("the agent may renew")
	}
	return parse(a.t, resp.GetResult().GetSvid(), own), nil
}

// TestNodeAttestation: each deployment accepts the nodes that its own configuration names.
// An X.509-SVID of any deployment is exchanged for an agent SVID of one with mode spiffe.
func TestNodeAttestation(t *testing.T) {
	t.Parallel()
	api := kubetest.Start(t)
	api.Put("token", kubetest.Pod{Namespace: "ns", ServiceAccount: "sa", Name: "p", UID: "pod-1", Node: "n", NodeUID: "node-1", Audiences: []string{"spire-server"}})
	c := newConfig(t, "east", "west")
	c.Deployments[0].X509Pop = &x509pop.Config{Mode: x509pop.ModeSPIFFE}
	c.Deployments[1].Clusters = []k8spsat.Cluster{{Name: "prod", ServiceAccounts: []string{"ns:sa"}, Kubeconfig: api.Kubeconfig(t)}}
	r := run(t, c)
	r.put("west", "host", "/spire-exchange/host-1")
	minted, err := r.join("west").mint("host")
	check(t, err)
	svid := map[string]any{"certificates": [][]byte{minted[0].chain[0].Raw}}
	token := map[string]any{"cluster": "prod", "token": "token"}

	node, err := r.dial("east", nil).attestNode("x509pop", svid, minted[0].key)
	check(t, err)
	pod, err := r.dial("west", nil).attestNode("k8s_psat", token, nil)
	check(t, err)
	for deployment, ident := range map[string]*identity{"east": node, "west": pod} {
		_, err := r.dial(deployment, ident).PostStatus(t.Context(), &agentv1.PostStatusRequest{AgentVersion: "1"})
		check(t, err)
	}
	if node.id.Path() != "/spire/agent/x509pop/host-1" || pod.id.Path() != "/spire/agent/k8s_psat/prod/node-1" {
		t.Errorf("IDs %v and %v", node.id, pod.id)
	}
	for deployment, tt := range map[string]struct {
		kind    string
		payload map[string]any
		accepts string
	}{"west": {"x509pop", svid, "accepts join_token, k8s_psat"}, "east": {"k8s_psat", token, "accepts join_token, x509pop"}} {
		_, err := r.dial(deployment, nil).attestNode(tt.kind, tt.payload, minted[0].key)
		if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), tt.accepts) {
			t.Errorf("%s at %s: %v", tt.kind, deployment, err)
		}
	}
}

// TestNodeAttestationIsChecked: a deployment whose CAs or cluster cannot be used fails the
// start, and the error names it.
func TestNodeAttestationIsChecked(t *testing.T) {
	t.Parallel()
	missing := filepath.Join(t.TempDir(), "missing")
	for says, change := range map[string]func(*server.DeploymentConfig){
		"deployment east: node_attestation: x509pop: ca_bundle_files: open ": func(d *server.DeploymentConfig) {
			d.X509Pop = &x509pop.Config{CABundleFiles: []string{missing}}
		},
		`deployment east: node_attestation: k8s_psat: cluster "prod": kube_config_file: `: func(d *server.DeploymentConfig) {
			d.Clusters = []k8spsat.Cluster{{Name: "prod", Kubeconfig: missing}}
		},
	} {
		c := newConfig(t, "east")
		change(&c.Deployments[0])
		d, err := server.Open(t.Context(), c)
		if err == nil {
			check(t, d.Close())
		}
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v, want %q", err, says)
		}
	}
}
