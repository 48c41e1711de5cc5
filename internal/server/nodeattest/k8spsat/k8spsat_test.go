package k8spsat_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	authenticationv1 "k8s.io/api/authentication/v1"

	"github.com/renewd/renewd/internal/selector"
	"github.com/renewd/renewd/internal/server/nodeattest/k8spsat"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/test/kubetest"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// agentPod is a pod that may attest.
func agentPod() kubetest.Pod {
	return kubetest.Pod{
		Namespace: "renewd", ServiceAccount: "renewd-agent", Name: "renewd-agent-x7", UID: "0f2d5c1e-pod", HostIP: "192.0.2.7",
		Labels: map[string]string{"app": "renewd", "secret": "s"}, Node: "worker-1", NodeUID: "77aa-node",
		NodeLabels: map[string]string{"topology.kubernetes.io/zone": "a", "other": "o"}, Audiences: []string{"spire-server", "https://kubernetes.default.svc"},
	}
}

// prod is the cluster of an API server.
func prod(t testing.TB, api *kubetest.Server) k8spsat.Cluster {
	t.Helper()
	return k8spsat.Cluster{
		Name: "prod", ServiceAccounts: []string{"renewd:renewd-agent"}, Kubeconfig: api.Kubeconfig(t),
		NodeLabels: []string{"topology.kubernetes.io/zone", "missing"}, PodLabels: []string{"app"},
	}
}

func newVerifier(t testing.TB, clusters ...k8spsat.Cluster) *k8spsat.Verifier {
	t.Helper()
	v, err := k8spsat.New(td, clusters)
	check(t, err)
	return v
}

func attest(ctx context.Context, v *k8spsat.Verifier, cluster, token string) (spireapi.AttestedNode, error) {
	payload, err := json.Marshal(map[string]string{"cluster": cluster, "token": token})
	if err != nil {
		return spireapi.AttestedNode{}, err
	}
	return v.Verify(ctx, payload, nil)
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestAttest: a DaemonSet's agent gets the ID of its node, with all selectors.
func TestAttest(t *testing.T) {
	t.Parallel()
	api := kubetest.Start(t)
	api.Put("token", agentPod())
	v := newVerifier(t, prod(t, api))
	got, err := attest(t.Context(), v, "prod", "token")
	check(t, err)
	if want := "spiffe://example.org/spire/agent/k8s_psat/prod/77aa-node"; got.ID.String() != want {
		t.Errorf("ID %s, want %s", got.ID, want)
	}
	want := []string{
		"cluster:prod", "agent_ns:renewd", "agent_sa:renewd-agent", "agent_pod_name:renewd-agent-x7", "agent_pod_uid:0f2d5c1e-pod",
		"agent_node_ip:192.0.2.7", "agent_node_name:worker-1", "agent_node_uid:77aa-node",
		"agent_node_label:topology.kubernetes.io/zone:a", "agent_pod_label:app:renewd",
	}
	var values, given []string
	for _, s := range got.Selectors {
		values, given = append(values, s.Value), append(given, s.Type+":"+s.Value)
	}
	check(t, selector.Compare("k8s_psat", given))
	if !slices.Equal(values, want) {
		t.Errorf("selectors %q, want %q", values, want)
	}
	asked := []string{"POST /apis/authentication.k8s.io/v1/tokenreviews", "GET /api/v1/namespaces/renewd/pods/renewd-agent-x7", "GET /api/v1/nodes/worker-1"}
	if got := api.Asked(); !slices.Equal(got, asked) {
		t.Errorf("asked %q, want %q", got, asked)
	}
}

// TestClusters: each is asked at its own API server, with its own audience and form of ID.
func TestClusters(t *testing.T) {
	t.Parallel()
	a, b := kubetest.Start(t), kubetest.Start(t)
	p := agentPod()
	a.Put("token a", p)
	p.Audiences = []string{"own", "https://kubernetes.default.svc"}
	b.Put("token b", p)
	nodes, pods, own := prod(t, a), prod(t, b), prod(t, b)
	pods.Name, pods.Audiences, pods.PodUIDs = "pods", []string{"x", "own"}, true
	own.Name, own.Audiences = "own", []string{}
	v := newVerifier(t, nodes, pods, own)
	for _, tt := range []struct{ cluster, token, path string }{
		{"prod", "token a", "/spire/agent/k8s_psat/prod/77aa-node"},
		{"prod", "token b", ""},
		{"pods", "token b", "/spire/agent/k8s_psat/pods/pod/0f2d5c1e-pod"},
		{"pods", "token a", ""},
		{"own", "token b", "/spire/agent/k8s_psat/own/77aa-node"},
	} {
		got, err := attest(t.Context(), v, tt.cluster, tt.token)
		switch {
		case tt.path == "" && status.Code(err) != codes.PermissionDenied:
			t.Errorf("%s, %s: %v, %v", tt.cluster, tt.token, got.ID, err)
		case tt.path != "" && (err != nil || got.ID.Path() != tt.path):
			t.Errorf("%s, %s: %v, %v, want %s", tt.cluster, tt.token, got.ID, err, tt.path)
		}
	}
}

// TestRefuses: tokens and pods that do not attest a node. The errors say what to do.
func TestRefuses(t *testing.T) {
	t.Parallel()
	const denied, invalid = codes.PermissionDenied, codes.InvalidArgument
	for name, tt := range map[string]struct {
		cluster, token string
		pod            func(*kubetest.Pod)
		review         func(*authenticationv1.TokenReviewStatus)
		gone           string // requests for this path are answered with 404
		code           codes.Code
		says           string
	}{
		"no cluster":      {cluster: "-", code: invalid, says: "missing cluster"},
		"unknown cluster": {cluster: "test", code: invalid, says: `not configured for cluster "test": correct`},
		"long cluster":    {cluster: strings.Repeat("c", 256), code: invalid, says: "too long"},
		"no token":        {token: "-", code: invalid, says: "missing token"},
		"long token":      {token: strings.Repeat("t", 40_000), code: invalid, says: "too long"},
		"expired": {review: func(s *authenticationv1.TokenReviewStatus) {
			*s = authenticationv1.TokenReviewStatus{Error: "[invalid bearer token, service account token has expired]"}
		}, code: denied, says: "service account token has expired"},
		"of another cluster": {token: "other", code: denied, says: "another cluster"},
		"other audience":     {pod: func(p *kubetest.Pod) { p.Audiences = []string{"vault"} }, code: denied, says: "token audiences"},
		"audience ignored":   {review: func(s *authenticationv1.TokenReviewStatus) { s.Audiences = nil }, code: denied, says: "audience is not one of"},
		"not authenticated":  {review: func(s *authenticationv1.TokenReviewStatus) { s.Authenticated = false }, code: denied, says: "not valid"},
		"other account":      {pod: func(p *kubetest.Pod) { p.ServiceAccount = "web" }, code: denied, says: `"renewd:web" is not an allowed service account: add it`},
		"other namespace":    {pod: func(p *kubetest.Pod) { p.Namespace = "web" }, code: denied, says: `"web:renewd-agent" is not an allowed`},
		"no account":         {review: func(s *authenticationv1.TokenReviewStatus) { s.User.Username = "x:y:renewd:renewd-agent" }, code: denied, says: "not of a service account"},
		"user":               {review: func(s *authenticationv1.TokenReviewStatus) { s.User.Username = "admin" }, code: denied, says: "not of a service account"},
		"no pod":             {review: func(s *authenticationv1.TokenReviewStatus) { s.User.Extra = nil }, code: denied, says: "not bound to a pod"},
		"deleted pod":        {gone: "/api/v1/namespaces/renewd/pods/renewd-agent-x7", code: denied, says: "no longer exists"},
		"replaced pod":       {review: extra("pod-uid", "other"), code: denied, says: "was replaced"},
		"pod without a node": {pod: func(p *kubetest.Pod) { p.Node = "" }, code: denied, says: "runs on no node"},
		"other node":         {review: extra("node-name", "worker-2"), code: denied, says: `the token is of node "worker-2"`},
		"replaced node":      {review: extra("node-uid", "other"), code: denied, says: "was replaced"},
		"deleted node":       {gone: "/api/v1/nodes/worker-1", code: denied, says: "no longer exists"},
		"before 1.32": {review: func(s *authenticationv1.TokenReviewStatus) {
			delete(s.User.Extra, "authentication.kubernetes.io/node-name")
			delete(s.User.Extra, "authentication.kubernetes.io/node-uid")
		}, code: codes.OK},
		"node without UID":   {pod: func(p *kubetest.Pod) { p.NodeUID = "" }, code: codes.Unknown, says: "no UID"},
		"UID that is no UID": {pod: func(p *kubetest.Pod) { p.NodeUID = "../../server" }, code: codes.Unknown, says: "agent ID"},
		"pod that is no pod": {pod: func(p *kubetest.Pod) { p.Name = "../../nodes" }, code: codes.Unknown, says: "get pod"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			api := kubetest.Start(t)
			p := agentPod()
			if tt.pod != nil {
				tt.pod(&p)
			}
			api.Put("secret-token", p)
			api.Change(tt.review)
			api.Instead(func(w http.ResponseWriter, r *http.Request) bool {
				if r.URL.Path != tt.gone {
					return false
				}
				http.Error(w, "not found", http.StatusNotFound)
				return true
			})
			cluster, token := strings.Trim(orDefault(tt.cluster, "prod"), "-"), strings.Trim(orDefault(tt.token, "secret-token"), "-")
			got, err := attest(t.Context(), newVerifier(t, prod(t, api)), cluster, token)
			if status.Code(err) != tt.code || err != nil && !strings.Contains(err.Error(), tt.says) {
				t.Errorf("%v, %v, want %v with %q", got.ID, err, tt.code, tt.says)
			}
			if err != nil && strings.Contains(err.Error(), "secret-token") {
				t.Errorf("the error has the token: %v", err)
			}
		})
	}
	for _, payload := range []string{"", "x", "[]", `{"cluster":7}`} {
		_, err := newVerifier(t).Verify(t.Context(), []byte(payload), nil)
		if status.Code(err) != invalid {
			t.Errorf("payload %q: %v", payload, err)
		}
	}
}

func orDefault(s, or string) string {
	if s == "" {
		return or
	}
	return s
}

// extra changes one of the review's extra values.
func extra(key, value string) func(*authenticationv1.TokenReviewStatus) {
	return func(s *authenticationv1.TokenReviewStatus) {
		s.User.Extra["authentication.kubernetes.io/"+key] = authenticationv1.ExtraValue{value}
	}
}

// TestBadAnswers: an API server that answers with nonsense, too much, an error or nothing.
// None is a refusal, and each request ends in time.
func TestBadAnswers(t *testing.T) {
	t.Parallel()
	const review, pod, node = "/apis/authentication.k8s.io/v1/tokenreviews", "/api/v1/namespaces/renewd/pods/renewd-agent-x7", "/api/v1/nodes/worker-1"
	write := func(code int, text string) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(code)
			_, _ = w.Write([]byte(text))
		}
	}
	for name, tt := range map[string]struct {
		answer func(http.ResponseWriter, *http.Request)
		says   string
	}{
		"nonsense": {write(http.StatusOK, "<html>welcome</html>"), "is not JSON"},
		"an array": {write(http.StatusOK, "[]"), "is not JSON"},
		"10 MB":    {write(http.StatusOK, `{"metadata":{"uid":"`+strings.Repeat("x", 10<<20)+`"}}`), "larger than 4 MiB"},
		"endless": {func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				_, _ = w.Write(make([]byte, 1<<16))
			}
		}, "larger than 4 MiB"},
		"large error":  {write(http.StatusInternalServerError, strings.Repeat("x", 10<<20)), ""},
		"unauthorized": {write(http.StatusUnauthorized, ""), "does not accept this server's credentials"},
		"forbidden":    {write(http.StatusForbidden, ""), "with a ClusterRole"},
		"busy": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "3600")
			w.WriteHeader(http.StatusTooManyRequests)
		}, "deadline"},
		"nothing": {func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, "deadline"},
		"half": {func(w http.ResponseWriter, r *http.Request) {
			_, _ = w.Write([]byte("{"))
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}, ""},
		"hung up": {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, ""},
	} {
		for _, path := range []string{review, pod, node} {
			t.Run(name+" "+path, func(t *testing.T) {
				t.Parallel()
				api := kubetest.Start(t)
				api.Put("token", agentPod())
				api.Instead(func(w http.ResponseWriter, r *http.Request) bool {
					if r.URL.Path != path {
						return false
					}
					tt.answer(w, r)
					return true
				})
				ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
				defer cancel()
				got, err := attest(ctx, newVerifier(t, prod(t, api)), "prod", "token")
				if status.Code(err) != codes.Unknown || !strings.Contains(err.Error(), `cluster "prod": `) || !strings.Contains(err.Error(), tt.says) {
					t.Errorf("%v, %v, want an error with %q", got.ID, err, tt.says)
				}
				if err != nil && len(err.Error()) > 4096 {
					t.Errorf("the error has %d bytes", len(err.Error()))
				}
			})
		}
	}
}

// TestAsking: at most 32 attestations ask an API server at a time.
func TestAsking(t *testing.T) {
	t.Parallel()
	api := kubetest.Start(t)
	api.Put("token", agentPod())
	var in, most atomic.Int64
	full, release := make(chan struct{}), make(chan struct{})
	api.Instead(func(http.ResponseWriter, *http.Request) bool {
		if n := in.Add(1); n > most.Load() {
			most.Store(n)
			if n == 32 {
				close(full)
			}
		}
		<-release
		in.Add(-1)
		return false
	})
	v := newVerifier(t, prod(t, api))
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			if _, err := attest(t.Context(), v, "prod", "token"); err != nil {
				t.Error(err)
			}
		})
	}
	<-full
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := attest(ctx, v, "prod", "token"); err == nil || !strings.Contains(err.Error(), "32 other attestations wait") {
		t.Errorf("one more: %v", err)
	}
	close(release)
	wg.Wait()
	if most.Load() != 32 {
		t.Errorf("%d at a time", most.Load())
	}
}

// TestKubeconfig: a file that cannot be used is known at the start, and a replaced one is
// used at the next attestation.
func TestKubeconfig(t *testing.T) {
	t.Parallel()
	garbage := filepath.Join(t.TempDir(), "kubeconfig")
	check(t, os.WriteFile(garbage, []byte("{"), 0o600))
	for _, path := range []string{"", "/missing", garbage} {
		_, err := k8spsat.New(td, []k8spsat.Cluster{{Name: "prod", Kubeconfig: path}})
		if err == nil || !strings.Contains(err.Error(), `cluster "prod": kube_config_file`) {
			t.Errorf("%q: %v", path, err)
		}
	}
	api := kubetest.Start(t)
	api.Put("token", agentPod())
	c := prod(t, api)
	v := newVerifier(t, c)
	good, err := os.ReadFile(c.Kubeconfig)
	check(t, err)
	for i, credential := range []string{kubetest.Credential, "revoked", kubetest.Credential} {
		check(t, os.WriteFile(c.Kubeconfig, []byte(strings.ReplaceAll(string(good), kubetest.Credential, credential)), 0o600))
		if _, err := attest(t.Context(), v, "prod", "token"); (err == nil) != (credential == kubetest.Credential) {
			t.Errorf("attestation %d, with %q: %v", i, credential, err)
		}
	}
}

// FuzzVerify: a payload causes no panic, and only the pod's own token is accepted.
func FuzzVerify(f *testing.F) {
	api := kubetest.Start(f)
	api.Put("token", agentPod())
	v := newVerifier(f, prod(f, api))
	for _, payload := range []string{`{"cluster":"prod","token":"other"}`, `{"cluster":"","token":""}`, `{"cluster":"prod"`, fmt.Sprintf(`{"cluster":%q}`, "\x00")} {
		f.Add([]byte(payload))
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		if node, err := v.Verify(t.Context(), payload, nil); err == nil && !strings.Contains(string(payload), "token") {
			t.Errorf("accepted %v", node)
		}
	})
}
