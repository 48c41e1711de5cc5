package kubernetes

import (
	"bytes"
	"context"
	"net"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/attest/cgroup"
)

// Dial replaces the network of the kubelet's client.
func (a *Attestor) Dial(dial func(ctx context.Context, network, address string) (net.Conn, error)) {
	a.kubelet.dial = dial
}

// DialAPIServer replaces the network of the API server's client.
func (a *Attestor) DialAPIServer(dial func(ctx context.Context, network, address string) (net.Conn, error)) {
	a.namespaces.server.dial = dial
}

// Selectors returns the selectors of a process in a container.
func (a *Attestor) Selectors(ctx context.Context, c cgroup.Container) ([]cache.Selector, error) {
	return a.selectors(ctx, c)
}

// Read returns the selectors of a container according to a list, nil if it is not there.
func Read(body []byte, c cgroup.Container) ([]cache.Selector, error) {
	l, err := readPodList(bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	f, err := l.find(c, false)
	if err != nil || f.pod == nil {
		return nil, err
	}
	return f.container.selectors(f.pod.selectors()), nil
}

// Keep reads a list and returns what the attestor keeps of it.
func Keep(body []byte) any {
	l, err := readPodList(bytes.NewReader(body))
	if err != nil {
		panic(err)
	}
	return l
}
