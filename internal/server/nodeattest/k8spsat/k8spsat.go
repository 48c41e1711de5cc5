// Package k8spsat verifies nodes of Kubernetes by the projected service account token of
// the agent's pod. It is the counterpart of the agents' attestor k8s_psat, SPIRE's and our
// own, and gives the same IDs and selectors as the k8s_psat plugin of a SPIRE server (1.15).
//
// The agent names its cluster and sends its token. The API server of that cluster reviews
// the token and describes the pod, which the token is bound to, and its node.
package k8spsat

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/config"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// Type is the type of attestation that agents name.
const Type = "k8s_psat"

// DefaultAudience is the audience of a token when a cluster has none, as in SPIRE.
const DefaultAudience = "spire-server"

const (
	// maxCluster and maxToken are the most bytes of an agent's cluster and token. A
	// token has one to two thousand.
	maxCluster = 255
	maxToken   = 32 << 10
	// maxShown is the most bytes of an API server's explanation in an error.
	maxShown = 500
)

// What a review of a token says beside the user's name. The node is there since
// Kubernetes 1.32.
const (
	extraPodName  = "authentication.kubernetes.io/pod-name"
	extraPodUID   = "authentication.kubernetes.io/pod-uid"
	extraNodeName = "authentication.kubernetes.io/node-name"
	extraNodeUID  = "authentication.kubernetes.io/node-uid"
)

// Cluster is a cluster whose nodes may attest. Several may be of one API server.
type Cluster struct {
	// Name is the one that agents give. It is a segment of their SPIFFE IDs.
	Name string
	// ServiceAccounts may attest; each is NAMESPACE:NAME.
	ServiceAccounts []string
	// Audiences are those of which a token must have one; DefaultAudience when nil,
	// and the API server's own when empty.
	Audiences []string
	// Kubeconfig is a file that says where the API server is and how to authenticate;
	// when empty, this server runs in a pod of the cluster. It is read for each
	// attestation.
	Kubeconfig string
	// NodeLabels and PodLabels are the keys of labels that become selectors.
	NodeLabels, PodLabels []string
	// PodUIDs makes agent IDs of the pod's UID instead of the node's, for agents of
	// which several run on one node.
	PodUIDs bool
}

// Verifier implements [spireapi.NodeVerifier].
type Verifier struct {
	td       spiffeid.TrustDomain
	clusters map[string]cluster
}

type cluster struct {
	Cluster
	api *apiServer
}

// New makes a Verifier. It does not connect to an API server, and fails if it would not
// know how to.
func New(td spiffeid.TrustDomain, clusters []Cluster) (*Verifier, error) {
	v := &Verifier{td: td, clusters: make(map[string]cluster)}
	for _, c := range clusters {
		if c.Audiences == nil {
			c.Audiences = []string{DefaultAudience}
		}
		api := newAPIServer(c.Kubeconfig)
		if _, err := api.connect(); err != nil {
			return nil, config.FileError(fmt.Errorf("k8s_psat: cluster %q: %w", c.Name, err))
		}
		v.clusters[c.Name] = cluster{c, api}
	}
	return v, nil
}

// Type implements [spireapi.NodeVerifier].
func (v *Verifier) Type() string { return Type }

// payload is what an agent sends.
type payload struct {
	Cluster string `json:"cluster"`
	Token   string `json:"token"`
}

// Verify implements [spireapi.NodeVerifier]. There is no challenge.
func (v *Verifier) Verify(ctx context.Context, data []byte, _ func([]byte) ([]byte, error)) (spireapi.AttestedNode, error) {
	var none spireapi.AttestedNode
	var p payload
	switch err := json.Unmarshal(data, &p); {
	case err != nil:
		return none, status.Error(codes.InvalidArgument, "payload is not JSON with a cluster and a token")
	case p.Cluster == "":
		return none, status.Error(codes.InvalidArgument, "missing cluster in attestation data")
	case p.Token == "":
		return none, status.Error(codes.InvalidArgument, "missing token in attestation data")
	case len(p.Cluster) > maxCluster || len(p.Token) > maxToken:
		return none, status.Error(codes.InvalidArgument, "cluster or token in attestation data is too long")
	}
	c, ok := v.clusters[p.Cluster]
	if !ok {
		return none, status.Errorf(codes.InvalidArgument, "not configured for cluster %q: correct the agent's cluster, or add it to node_attestation of the server's deployment", p.Cluster)
	}
	node, err := c.verify(ctx, v.td, p.Token)
	if err != nil {
		if _, refused := status.FromError(err); !refused {
			err = fmt.Errorf("cluster %q: %w", c.Name, err)
		}
		return none, err
	}
	return node, nil
}

// refused is the answer to a token or pod that does not attest a node.
func (c *cluster) refused(format string, args ...any) error {
	return status.Errorf(codes.PermissionDenied, "cluster %q: %s", c.Name, fmt.Sprintf(format, args...))
}

// verify asks the API server for everything that it knows of a token.
func (c *cluster) verify(ctx context.Context, td spiffeid.TrustDomain, token string) (spireapi.AttestedNode, error) {
	var none spireapi.AttestedNode
	release, err := c.api.enter(ctx)
	if err != nil {
		return none, err
	}
	defer release()
	conn, err := c.api.connect()
	if err != nil {
		return none, err
	}
	user, err := c.review(ctx, conn, token)
	if err != nil {
		return none, err
	}
	pod, err := conn.pod(ctx, user.namespace, user.podName)
	switch {
	case isNotFound(err):
		return none, c.refused("pod %s/%s of the token no longer exists", user.namespace, user.podName)
	case err != nil:
		return none, err
	case string(pod.UID) != user.podUID:
		return none, c.refused("pod %s/%s of the token was replaced by another of that name", user.namespace, user.podName)
	case pod.Spec.NodeName == "":
		return none, c.refused("pod %s/%s runs on no node", user.namespace, user.podName)
	case user.nodeName != "" && user.nodeName != pod.Spec.NodeName:
		return none, c.refused("the token is of node %q and pod %s/%s runs on node %q", user.nodeName, user.namespace, user.podName, pod.Spec.NodeName)
	}
	node, err := conn.node(ctx, pod.Spec.NodeName)
	switch {
	case isNotFound(err):
		return none, c.refused("node %q of pod %s/%s no longer exists", pod.Spec.NodeName, user.namespace, user.podName)
	case err != nil:
		return none, err
	case node.UID == "":
		return none, fmt.Errorf("the API server gives no UID of node %q", pod.Spec.NodeName)
	case user.nodeUID != "" && user.nodeUID != string(node.UID):
		return none, c.refused("node %q of the token was replaced by another of that name", pod.Spec.NodeName)
	}
	segments := []string{"spire", "agent", Type, c.Name, string(node.UID)}
	if c.PodUIDs {
		segments = []string{"spire", "agent", Type, c.Name, "pod", user.podUID}
	}
	id, err := spiffeid.FromSegments(td, segments...)
	if err != nil {
		return none, fmt.Errorf("agent ID: %w", err)
	}
	return spireapi.AttestedNode{ID: id, Selectors: c.selectors(user, pod, node)}, nil
}

// user is whose token it is.
type user struct {
	namespace, serviceAccount string
	podName, podUID           string
	nodeName, nodeUID         string // empty before Kubernetes 1.32
}

// review has the API server review a token, and returns the allowed user that it is of.
func (c *cluster) review(ctx context.Context, conn *connection, token string) (user, error) {
	s, err := conn.review(ctx, token, c.Audiences)
	if err != nil {
		return user{}, err
	}
	if s.Error != "" || !s.Authenticated {
		return user{}, c.refused("the token is not valid (%.*q): it may have expired, be of a deleted pod or another cluster, or have none of the audiences %q",
			maxShown, s.Error, c.Audiences)
	}
	// An API server that ignores audiences returns none.
	if len(c.Audiences) > 0 && !slices.ContainsFunc(c.Audiences, func(a string) bool { return slices.Contains(s.Audiences, a) }) {
		return user{}, c.refused("the token's audience is not one of %q: set it where the token is mounted in the agent's pod", c.Audiences)
	}
	name := strings.Split(s.User.Username, ":")
	if len(name) != 4 || name[0] != "system" || name[1] != "serviceaccount" || name[2] == "" || name[3] == "" {
		return user{}, c.refused("the token is not of a service account")
	}
	if account := name[2] + ":" + name[3]; !slices.Contains(c.ServiceAccounts, account) {
		return user{}, c.refused("%.*q is not an allowed service account: add it to service_account_allow_list if its pods run agents", maxShown, account)
	}
	extra := func(key string) string {
		if values := s.User.Extra[key]; len(values) == 1 {
			return values[0]
		}
		return ""
	}
	u := user{
		namespace: name[2], serviceAccount: name[3],
		podName: extra(extraPodName), podUID: extra(extraPodUID), nodeName: extra(extraNodeName), nodeUID: extra(extraNodeUID),
	}
	if u.podName == "" || u.podUID == "" {
		return user{}, c.refused("the token is not bound to a pod: use a projected service account token")
	}
	return u, nil
}

func (c *cluster) selectors(u user, p *pod, n *node) (out []spireapi.Selector) {
	add := func(parts ...string) {
		out = append(out, spireapi.Selector{Type: Type, Value: strings.Join(parts, ":")})
	}
	add("cluster", c.Name)
	add("agent_ns", u.namespace)
	add("agent_sa", u.serviceAccount)
	add("agent_pod_name", u.podName)
	add("agent_pod_uid", u.podUID)
	add("agent_node_ip", p.Status.HostIP)
	add("agent_node_name", p.Spec.NodeName)
	add("agent_node_uid", string(n.UID))
	for _, key := range c.NodeLabels {
		if value, ok := n.Labels[key]; ok {
			add("agent_node_label", key, value)
		}
	}
	for _, key := range c.PodLabels {
		if value, ok := p.Labels[key]; ok {
			add("agent_pod_label", key, value)
		}
	}
	return out
}
