package kubernetes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/url"
	"sync"
	"time"
)

// namespaces knows the labels of namespaces, which are in the API server alone.
type namespaces struct {
	owner  *requests
	server *client

	mu     sync.Mutex
	byName map[string]*source[map[string]string]
}

func newNamespaces(owner *requests, server *client) *namespaces {
	return &namespaces{owner: owner, server: server, byName: make(map[string]*source[map[string]string])}
}

// labels returns the labels of a namespace, at most [MaxAge] old. If the API server does not
// answer, soon for a known namespace, it returns what it last answered with the error, for up
// to [HeldFor].
func (n *namespaces) labels(ctx context.Context, name string) (map[string]string, error) {
	s := n.source(name)
	known := func() *answer[map[string]string] {
		if held := s.last(); held != nil && time.Since(held.asked) <= HeldFor {
			return held
		}
		return nil
	}
	limit := requestTimeout + s.interval
	if known() != nil {
		limit = refreshWait
	}
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	a, err := s.after(limited, time.Now().Add(-MaxAge))
	if err == nil {
		return a.value, nil
	}
	if limited.Err() != nil && ctx.Err() == nil {
		err = fmt.Errorf("no answer of the API server within %s", limit)
	}
	held := known()
	if held == nil || ctx.Err() != nil {
		return nil, err
	}
	return held.value, fmt.Errorf("labels of namespace %s are %s old: %w", name, time.Since(held.asked).Round(time.Second), err)
}

func (n *namespaces) source(name string) *source[map[string]string] {
	n.mu.Lock()
	defer n.mu.Unlock()
	s := n.byName[name]
	if s == nil {
		// Those of namespaces whose pods are gone.
		maps.DeleteFunc(n.byName, func(_ string, s *source[map[string]string]) bool { return s.isIdle(HeldFor) })
		s = newSource(n.owner, DefaultPollInterval, func(ctx context.Context) (map[string]string, error) {
			return n.server.namespaceLabels(ctx, name)
		})
		n.byName[name] = s
	}
	return s
}

// newAPIServer returns the client of the cluster's API server.
func newAPIServer(cfg Config) *client {
	host, _, _ := net.SplitHostPort(cfg.APIServer)
	return &client{
		name:       "API server",
		hosts:      "https://" + cfg.APIServer,
		serverName: host,
		files:      files{ca: cfg.APIServerCAFile, token: cfg.TokenFile},
		remedies: remedies{
			unreachable: "check that the pod can reach the API server, or remove namespace_labels",
			ca:          "check the service account's ca.crt",
			serverName:  "check the environment variable KUBERNETES_SERVICE_HOST",
			token:       "give a token of this cluster's API server in token_file",
			forbidden:   "allow get on the resource namespaces to the agent's service account in a ClusterRole, or remove namespace_labels",
		},
	}
}

// maxNamespace bounds the API server's answer, which has the metadata only.
const maxNamespace = 2 << 20

func (c *client) namespaceLabels(ctx context.Context, name string) (map[string]string, error) {
	var namespace struct {
		Metadata struct {
			Name   string
			Labels map[string]string
		}
	}
	const metadataOnly = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
	err := c.get(ctx, "/api/v1/namespaces/"+url.PathEscape(name), metadataOnly, maxNamespace, func(r io.Reader) error {
		if err := json.NewDecoder(r).Decode(&namespace); err != nil {
			return err
		}
		if namespace.Metadata.Name != name {
			return errors.New("it is not the namespace")
		}
		return nil
	})
	return namespace.Metadata.Labels, err
}
