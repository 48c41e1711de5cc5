package k8spsat

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"

	"github.com/go-logr/logr"
	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
)

const (
	// maxAsking is how many attestations ask one API server at a time. Others wait.
	maxAsking = 32
	// maxAnswer is the largest answer in bytes. etcd keeps no object of more than
	// 1.5 MiB.
	maxAnswer = 4 << 20
)

// pod and node are what is read of a pod and a node. k8s.io/api's types would take megabytes
// of the program for fields that are not used.
type pod struct {
	metav1.ObjectMeta `json:"metadata"`
	Spec              struct {
		NodeName string `json:"nodeName"`
	} `json:"spec"`
	Status struct {
		HostIP string `json:"hostIP"`
	} `json:"status"`
}

type node struct {
	metav1.ObjectMeta `json:"metadata"`
}

// apiServer is the API server of a cluster.
type apiServer struct {
	kubeconfig string
	asking     chan struct{} // a semaphore
}

func newAPIServer(kubeconfig string) *apiServer {
	return &apiServer{kubeconfig: kubeconfig, asking: make(chan struct{}, maxAsking)}
}

// enter returns when the API server may be asked, until release is called.
func (a *apiServer) enter(ctx context.Context) (release func(), err error) {
	select {
	case a.asking <- struct{}{}:
		return func() { <-a.asking }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("%d other attestations wait for the API server: %w", maxAsking, ctx.Err())
	}
}

// codecs decode an API server's errors.
var codecs = func() serializer.CodecFactory {
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	return serializer.NewCodecFactory(scheme)
}()

// connection is the way to an API server by the present kubeconfig. client-go shares the
// network connections of equal ones.
type connection struct{ *rest.RESTClient }

// connect reads the kubeconfig, or finds the API server of the cluster that this server
// runs in.
func (a *apiServer) connect() (*connection, error) {
	var c *rest.Config
	var err error
	if a.kubeconfig == "" {
		if c, err = rest.InClusterConfig(); err != nil {
			return nil, fmt.Errorf("kube_config_file is not set and this is no pod of a cluster: %w: set kube_config_file", err)
		}
	} else if c, err = clientcmd.BuildConfigFromFlags("", a.kubeconfig); err != nil {
		return nil, fmt.Errorf("kube_config_file: %w: give a kubeconfig, as \"kubectl config view --raw --minify\" prints it", err)
	}
	c.UserAgent = "renewd-server"
	c.QPS = -1 // maxAsking is the limit
	c.WarningHandler = rest.NoWarnings{}
	c.NegotiatedSerializer = codecs.WithoutConversion()
	c.Wrap(func(rt http.RoundTripper) http.RoundTripper { return bounded{rt} })
	client, err := rest.UnversionedRESTClientFor(c)
	if err != nil {
		return nil, fmt.Errorf("kube_config_file: %w", err)
	}
	return &connection{client}, nil
}

func (c *connection) review(ctx context.Context, token string, audiences []string) (*authenticationv1.TokenReviewStatus, error) {
	body, err := json.Marshal(authenticationv1.TokenReview{
		TypeMeta: metav1.TypeMeta{APIVersion: authenticationv1.SchemeGroupVersion.String(), Kind: "TokenReview"},
		Spec:     authenticationv1.TokenReviewSpec{Token: token, Audiences: audiences},
	})
	if err != nil {
		return nil, fmt.Errorf("encode review: %w", err)
	}
	var out authenticationv1.TokenReview
	err = ask(ctx, c.Post().AbsPath("/apis/authentication.k8s.io/v1").Resource("tokenreviews").SetHeader("Content-Type", runtime.ContentTypeJSON).Body(body), &out)
	if err != nil {
		return nil, explain("review a token", "create tokenreviews", err)
	}
	return &out.Status, nil
}

func (c *connection) pod(ctx context.Context, namespace, name string) (*pod, error) {
	var out pod
	err := ask(ctx, c.Get().AbsPath("/api/v1").Namespace(namespace).Resource("pods").Name(name), &out)
	if err != nil {
		return nil, explain("get pod", "get pods", err)
	}
	return &out, nil
}

func (c *connection) node(ctx context.Context, name string) (*node, error) {
	var out node
	err := ask(ctx, c.Get().AbsPath("/api/v1").Resource("nodes").Name(name), &out)
	if err != nil {
		return nil, explain("get node", "get nodes", err)
	}
	return &out, nil
}

// ask makes a request. A busy API server is asked again twice, when it says so.
func ask(ctx context.Context, r *rest.Request, out any) error {
	ctx = klog.NewContext(ctx, logr.Discard()) // the error says it all
	answer, err := r.SetHeader("Accept", runtime.ContentTypeJSON).MaxRetries(2).Do(ctx).Raw()
	if err != nil {
		return err
	}
	if err := json.Unmarshal(answer, out); err != nil {
		return fmt.Errorf("answer is not JSON: %w: check that the address is that of an API server", err)
	}
	return nil
}

// explain adds what failed and, where it is known, the remedy.
func explain(operation, permission string, err error) error {
	switch {
	case apierrors.IsUnauthorized(err):
		return fmt.Errorf("%s: %w: the API server does not accept this server's credentials, renew those of kube_config_file", operation, err)
	case apierrors.IsForbidden(err):
		return fmt.Errorf("%s: %w: allow this server's user to %s with a ClusterRole", operation, err, permission)
	}
	return fmt.Errorf("%s: %w", operation, err)
}

func isNotFound(err error) bool { return apierrors.IsNotFound(err) }

// errAnswer is returned for an answer that is too large.
var errAnswer = errors.New("answer is larger than 4 MiB: check that the address is that of an API server")

// bounded limits the size of answers.
type bounded struct{ http.RoundTripper }

func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := b.RoundTripper.RoundTrip(r)
	if err == nil {
		resp.Body = &boundedBody{ReadCloser: resp.Body, left: maxAnswer}
	}
	return resp, err
}

type boundedBody struct {
	io.ReadCloser
	left int
}

func (b *boundedBody) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, errAnswer
	}
	n, err := b.ReadCloser.Read(p[:min(len(p), b.left)])
	b.left -= n
	return n, err
}
