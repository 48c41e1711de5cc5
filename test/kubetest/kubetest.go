// Package kubetest is as much of a Kubernetes API server as node attestation asks: reviews
// of tokens, pods and nodes, over HTTPS. Its answers have the form of Kubernetes 1.34.
package kubetest

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
)

// Credential is the bearer token with which the kubeconfig authenticates.
const Credential = "reviewer"

// Pod is a pod that runs on a node, and the token that is mounted in it.
type Pod struct {
	Namespace, ServiceAccount string
	Name, UID                 string
	Labels                    map[string]string
	HostIP                    string
	Node, NodeUID             string
	NodeLabels                map[string]string
	Audiences                 []string // of the token
}

// Server is an API server. Its methods may be called concurrently.
type Server struct {
	*httptest.Server
	mu   sync.Mutex
	pods map[string]Pod // by token
	// change may change a review's answer.
	change func(*authenticationv1.TokenReviewStatus)
	// instead may answer a request in the server's place.
	instead func(http.ResponseWriter, *http.Request) bool
	asked   []string
}

// Start starts a server, which stops at the end of the test.
func Start(t testing.TB) *Server {
	t.Helper()
	s := &Server{pods: make(map[string]Pod)}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /apis/authentication.k8s.io/v1/tokenreviews", s.review)
	mux.HandleFunc("GET /api/v1/namespaces/{namespace}/pods/{name}", s.pod)
	mux.HandleFunc("GET /api/v1/nodes/{name}", s.node)
	s.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Only after the request is read does its context end with the connection.
		body, _ := io.ReadAll(r.Body)
		r.Body = io.NopCloser(bytes.NewReader(body))
		s.mu.Lock()
		s.asked = append(s.asked, r.Method+" "+r.URL.Path)
		instead := s.instead
		s.mu.Unlock()
		switch {
		case instead != nil && instead(w, r):
		case r.Header.Get("Authorization") != "Bearer "+Credential:
			fail(w, http.StatusUnauthorized, metav1.StatusReasonUnauthorized, "Unauthorized")
		default:
			mux.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(s.Close)
	return s
}

// Kubeconfig writes a kubeconfig for the server and returns its path.
func (s *Server) Kubeconfig(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	ca := filepath.Join(dir, "ca.pem")
	path := filepath.Join(dir, "kubeconfig")
	for name, data := range map[string][]byte{
		ca: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}),
		path: fmt.Appendf(nil, "apiVersion: v1\nkind: Config\ncurrent-context: c\n"+
			"clusters: [{name: c, cluster: {server: %q, certificate-authority: %q}}]\n"+
			"users: [{name: u, user: {token: %q}}]\ncontexts: [{name: c, context: {cluster: c, user: u}}]\n", s.URL, ca, Credential),
	} {
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

// Put adds a pod with its token, or replaces the one of that token.
func (s *Server) Put(token string, p Pod) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pods[token] = p
}

// Change sets what changes the answer of a review; nil for nothing.
func (s *Server) Change(change func(*authenticationv1.TokenReviewStatus)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.change = change
}

// Instead sets what may answer a request in the server's place and returns whether it has;
// nil for nothing.
func (s *Server) Instead(answer func(http.ResponseWriter, *http.Request) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.instead = answer
}

// Asked returns the requests since the last call, each as "METHOD path".
func (s *Server) Asked() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	asked := s.asked
	s.asked = nil
	return asked
}

func (s *Server) review(w http.ResponseWriter, r *http.Request) {
	review, err := decodeReview(r)
	if err != nil {
		fail(w, http.StatusBadRequest, metav1.StatusReasonBadRequest, "no TokenReview: "+err.Error())
		return
	}
	s.mu.Lock()
	p, ok := s.pods[review.Spec.Token]
	change := s.change
	s.mu.Unlock()
	audiences := slices.DeleteFunc(slices.Clone(review.Spec.Audiences), func(a string) bool { return !slices.Contains(p.Audiences, a) })
	switch {
	case !ok:
		review.Status.Error = "[invalid bearer token, service account token has been invalidated]"
	case len(audiences) == 0 && len(review.Spec.Audiences) > 0:
		review.Status.Error = fmt.Sprintf("[invalid bearer token, token audiences %q is invalid for the target audiences %q]", p.Audiences, review.Spec.Audiences)
	default:
		review.Status = authenticationv1.TokenReviewStatus{Authenticated: true, Audiences: audiences, User: authenticationv1.UserInfo{
			Username: "system:serviceaccount:" + p.Namespace + ":" + p.ServiceAccount,
			Extra: map[string]authenticationv1.ExtraValue{
				"authentication.kubernetes.io/pod-name": {p.Name}, "authentication.kubernetes.io/pod-uid": {p.UID},
				"authentication.kubernetes.io/node-name": {p.Node}, "authentication.kubernetes.io/node-uid": {p.NodeUID},
			},
		}}
	}
	if change != nil {
		change(&review.Status)
	}
	answer(w, http.StatusCreated, review)
}

// decodeReview decodes a request in JSON, or in the protobuf encoding that client-go
// prefers: four bytes, and a runtime.Unknown around the object.
func decodeReview(r *http.Request) (review authenticationv1.TokenReview, err error) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return review, err
	}
	if encoded, ok := bytes.CutPrefix(body, []byte("k8s\x00")); ok {
		var object runtime.Unknown
		if err := object.Unmarshal(encoded); err != nil {
			return review, err
		}
		err := review.Unmarshal(object.Raw)
		review.TypeMeta = metav1.TypeMeta{APIVersion: object.APIVersion, Kind: object.Kind}
		return review, err
	}
	if err := json.Unmarshal(body, &review); err != nil {
		return review, err
	}
	if review.Kind != "TokenReview" {
		return review, fmt.Errorf("it is a %q", review.Kind)
	}
	return review, nil
}

func (s *Server) pod(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.pods {
		if p.Namespace == r.PathValue("namespace") && p.Name == r.PathValue("name") {
			answer(w, http.StatusOK, map[string]any{
				"kind": "Pod", "apiVersion": "v1", "metadata": metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name, UID: types.UID(p.UID), Labels: p.Labels},
				"spec": map[string]string{"nodeName": p.Node, "serviceAccountName": p.ServiceAccount}, "status": map[string]string{"hostIP": p.HostIP},
			})
			return
		}
	}
	fail(w, http.StatusNotFound, metav1.StatusReasonNotFound, fmt.Sprintf("pods %q not found", r.PathValue("name")))
}

func (s *Server) node(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.pods {
		if p.Node == r.PathValue("name") {
			answer(w, http.StatusOK, map[string]any{
				"kind": "Node", "apiVersion": "v1", "metadata": metav1.ObjectMeta{Name: p.Node, UID: types.UID(p.NodeUID), Labels: p.NodeLabels},
			})
			return
		}
	}
	fail(w, http.StatusNotFound, metav1.StatusReasonNotFound, fmt.Sprintf("nodes %q not found", r.PathValue("name")))
}

func answer(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(v) // the client may have left
}

func fail(w http.ResponseWriter, code int, reason metav1.StatusReason, message string) {
	answer(w, code, metav1.Status{
		TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure, Message: message, Reason: reason, Code: int32(code),
	})
}
