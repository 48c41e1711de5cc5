// Package kubernetes attests a process by the pod and the container that it runs in.
// The control group of the process names the container, and the kubelet's list of the
// node's pods describes it. The selectors are those of SPIRE's attestor k8s (1.15.3):
//
//	k8s:ns:prod  k8s:sa:web  k8s:node-name:n1     namespace, service account, node
//	k8s:pod-name:web-0  k8s:pod-uid:2c48913c-...  the pod
//	k8s:pod-label:app:web                         each label
//	k8s:pod-owner:StatefulSet:web                 each owner, by kind and name
//	k8s:pod-owner-uid:StatefulSet:a2830d0d-...    the same, by UID
//	k8s:pod-image:IMAGE  k8s:pod-image-count:1    images of all containers
//	k8s:pod-init-image:IMAGE  k8s:pod-init-image-count:0
//	k8s:container-name:app  k8s:container-image:IMAGE
//	k8s:ns-label:team:payments                    labels of the namespace, if configured
//
// An image has two selectors: the name that the kubelet reports, and its digest.
//
// The kubelet is asked when a container is not known, and for a known one before its
// answer is older than [MaxAge]. All callers share one request.
package kubernetes

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/attest"
	"github.com/renewd/renewd/internal/agent/attest/cgroup"
)

// Name is the attestor's name and the type of its selectors.
const Name = "k8s"

const (
	// MaxAge is how old a label, an image or the presence of a container in a selector may be:
	// an answer of the kubelet or of the API server is used again for this long.
	MaxAge = 6 * time.Second
	// refreshAge is the age of an answer from which the next one is asked for, so that
	// under steady load no caller waits for it.
	refreshAge = 5 * time.Second
	// HeldFor is how long the last good answer about a known container or namespace is used
	// if the kubelet or the API server does not answer. Kubernetes by default evicts the pods of such a node
	// after the same time.
	HeldFor = 5 * time.Minute

	// DefaultPort is the kubelet's.
	DefaultPort = 10250
	// DefaultPollAttempts and DefaultPollInterval give the kubelet two seconds to
	// report a new container.
	DefaultPollAttempts = 5
	DefaultPollInterval = 500 * time.Millisecond

	serviceAccountDir = "/var/run/secrets/kubernetes.io/serviceaccount/"
	// DefaultTokenFile is the token of the pod's service account.
	DefaultTokenFile = serviceAccountDir + "token"
	// DefaultCAFile is the cluster's CA as a pod has it.
	DefaultCAFile = serviceAccountDir + "ca.crt"
)

// Config configures the attestor. Files are reloaded for each request.
type Config struct {
	// NodeName is the name that the kubelet's certificate must have. Empty: any name,
	// which requires that KubeletHost is empty, too.
	NodeName string
	// KubeletHost is the name or address at which the kubelet listens. Empty:
	// NodeName, or 127.0.0.1 without one, which is the kubelet only in the host's
	// network namespace.
	KubeletHost string
	// KubeletPort is the port of the kubelet's HTTPS API. Zero: [DefaultPort].
	KubeletPort int
	// KubeletReadOnlyPort is the port of the kubelet's unauthenticated HTTP API, on the
	// same host. Zero: HTTPS. Everybody who can listen on that port can make up pods.
	KubeletReadOnlyPort int
	// KubeletCAFile has the CAs of the kubelet's certificate in PEM: the cluster's CA,
	// or the kubelet's own certificate if it signed it itself
	// (/var/lib/kubelet/pki/kubelet.crt).
	KubeletCAFile string
	// SkipKubeletVerification accepts any certificate of the kubelet.
	SkipKubeletVerification bool
	// TokenFile has the bearer token. It is not used with a client certificate. Empty:
	// no token.
	TokenFile string
	// CertificateFile and PrivateKeyFile are a client certificate and its key in
	// PEM. Either both or none.
	CertificateFile, PrivateKeyFile string

	// PollAttempts is how many lists are examined for a new container. Zero:
	// [DefaultPollAttempts].
	PollAttempts int
	// PollInterval is the least time between two requests. Zero: [DefaultPollInterval].
	PollInterval time.Duration

	// SkipContainer leaves out container-name and container-image. A pod is then
	// attested by its UID before the kubelet reports its container, as during a postStart
	// hook, and in gVisor, whose processes are in the container of the sandbox.
	SkipContainer bool

	// NamespaceLabels adds ns-label, from the API server at APIServer (host:port),
	// with TokenFile and the CA in APIServerCAFile.
	NamespaceLabels bool
	APIServer       string
	APIServerCAFile string
}

// Attestor is an [attest.Attestor]. Make it with [New], and close it.
type Attestor struct {
	cfg        Config
	view       cgroup.View
	requests   *requests
	pods       *source[*podList]
	kubelet    *client
	namespaces *namespaces // nil without Config.NamespaceLabels
}

var _ attest.Attestor = (*Attestor)(nil)

// New returns the attestor. It reads the agent's own control group and sends nothing.
func New(cfg Config) (*Attestor, error) {
	view, err := cgroup.Self()
	if err != nil {
		return nil, err
	}
	return newAttestor(cfg, view)
}

func newAttestor(cfg Config, view cgroup.View) (*Attestor, error) {
	cfg.KubeletPort = cmp.Or(cfg.KubeletPort, DefaultPort)
	cfg.PollAttempts = cmp.Or(cfg.PollAttempts, DefaultPollAttempts)
	cfg.PollInterval = cmp.Or(cfg.PollInterval, DefaultPollInterval)
	switch {
	case (cfg.CertificateFile == "") != (cfg.PrivateKeyFile == ""):
		return nil, errors.New("a client certificate and its private key are needed together")
	case cfg.NamespaceLabels && cfg.APIServer == "":
		return nil, errors.New("no API server to ask for the labels of namespaces: run the agent in a pod, or remove namespace_labels")
	}
	a := &Attestor{cfg: cfg, view: view, requests: newRequests(), kubelet: newKubelet(cfg)}
	a.pods = newSource(a.requests, cfg.PollInterval, a.kubelet.pods)
	if cfg.NamespaceLabels {
		a.namespaces = newNamespaces(a.requests, newAPIServer(cfg))
	}
	return a, nil
}

// Close ends the requests and waits for them. Attestations that wait for an answer fail.
func (a *Attestor) Close() error {
	a.requests.close()
	a.kubelet.close()
	if a.namespaces != nil {
		a.namespaces.server.close()
	}
	return nil
}

// Name returns "k8s".
func (a *Attestor) Name() string { return Name }

// Attest returns the selectors of the pod and the container of the process. A process that
// is in no pod has none. As in SPIRE, nor has one in an ephemeral container, unless
// SkipContainer is set: who may debug a pod does not thereby get its identity. A container that the kubelet does not report yet is waited
// for. If the kubelet does not answer, soon for a known container, Attest returns what it
// last reported about it with the error, for up to [HeldFor].
func (a *Attestor) Attest(ctx context.Context, p *attest.Peer) ([]cache.Selector, error) {
	c, err := a.view.Read(p)
	if err != nil {
		return nil, err
	}
	return a.selectors(ctx, c)
}

func (a *Attestor) selectors(ctx context.Context, c cgroup.Container) ([]cache.Selector, error) {
	if !c.Pod {
		return nil, nil
	}
	known, age := a.lastKnown(c)
	if known.pod != nil && age < MaxAge {
		a.pods.refresh(time.Now().Add(-refreshAge))
		return a.describe(ctx, known)
	}
	limit := requestTimeout + time.Duration(a.cfg.PollAttempts)*a.cfg.PollInterval
	if known.pod != nil {
		limit = refreshWait
	}
	found, err := a.find(ctx, c, limit)
	if err == nil {
		return a.describe(ctx, found)
	}
	// A new list may no longer have it.
	if known, age = a.lastKnown(c); known.pod == nil || ctx.Err() != nil {
		return nil, err
	}
	selectors, describeErr := a.describe(ctx, known)
	return selectors, errors.Join(fmt.Errorf("selectors of the pod are %s old: %w", age.Round(time.Second), err), describeErr)
}

// refreshWait is how long the attestation of a known container waits for a new answer, about
// it or about its namespace.
const refreshWait = 2 * time.Second

// lastKnown returns what the last good list says about a container, and its age. There is
// nothing after HeldFor.
func (a *Attestor) lastKnown(c cgroup.Container) (found, time.Duration) {
	held := a.pods.last()
	if held == nil {
		return found{}, 0
	}
	f, err := held.value.find(c, a.cfg.SkipContainer)
	age := time.Since(held.asked)
	if err != nil || age > HeldFor {
		return found{}, 0
	}
	return f, age
}

// find looks for a container in lists that are younger than MaxAge.
func (a *Attestor) find(ctx context.Context, c cgroup.Container, limit time.Duration) (found, error) {
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	oldest := time.Now().Add(-MaxAge)
	for range a.cfg.PollAttempts {
		list, err := a.pods.after(limited, oldest)
		switch {
		case err != nil && limited.Err() != nil && ctx.Err() == nil:
			return found{}, fmt.Errorf("no answer of the kubelet within %s", limit)
		case err != nil:
			return found{}, err
		}
		f, err := list.value.find(c, a.cfg.SkipContainer)
		if err != nil || f.pod != nil {
			return f, err
		}
		oldest = list.asked
	}
	return found{}, fmt.Errorf("container %s is not in the kubelet's list of pods after %d attempts, %s apart",
		c.ID, a.cfg.PollAttempts, a.cfg.PollInterval)
}

// describe returns the selectors of a container. Labels of the namespace that cannot be
// had only cost their own selectors, and old ones are returned with an error.
func (a *Attestor) describe(ctx context.Context, f found) ([]cache.Selector, error) {
	selectors := f.pod.selectors()
	if !a.cfg.SkipContainer {
		if f.pod.isEphemeral(f.container) {
			return nil, nil
		}
		selectors = f.container.selectors(selectors)
	}
	if a.namespaces == nil {
		return selectors, nil
	}
	labels, err := a.namespaces.labels(ctx, f.pod.Metadata.Namespace)
	return appendLabels(selectors, "ns-label:", labels), err
}

// Check reports what is missing for attestation: a kubelet that answers, permissions,
// files. It sends one request to the kubelet, and one to the API server if it is needed.
func (a *Attestor) Check(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	_, err := a.kubelet.pods(ctx)
	if a.namespaces != nil {
		_, nsErr := a.namespaces.server.namespaceLabels(ctx, "default")
		if err != nil && nsErr != nil {
			return fmt.Errorf("%w; %w", err, nsErr)
		}
		err = cmp.Or(err, nsErr)
	}
	return err
}
