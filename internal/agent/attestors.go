package agent

import (
	"fmt"
	"time"

	"github.com/renewd/renewd/internal/agent/attest"
	"github.com/renewd/renewd/internal/agent/attest/cgroup"
	"github.com/renewd/renewd/internal/agent/attest/docker"
	"github.com/renewd/renewd/internal/agent/attest/kubernetes"
	"github.com/renewd/renewd/internal/agent/attest/systemd"
	"github.com/renewd/renewd/internal/agent/attest/unix"
)

// AttestorLimit is how long a workload attestor may take that asks another program of the
// node.
const AttestorLimit = 5 * time.Second

// openAttestors returns the workload attestors: unix, which reads what the kernel knows and
// takes as long as its caller waits, and those that are configured. a.closers close them.
func (a *Agent) openAttestors() ([]attest.Attestor, error) {
	cfg := a.cfg
	if cfg.Attestors != nil {
		return cfg.Attestors, nil
	}
	c := unix.Config{SkipPath: !cfg.DiscoverPath, SHA256Needed: func() bool { return a.hashNeeded() != 0 }}
	if cfg.DiscoverPath {
		c.SHA256Limit = cfg.SHA256Limit
	}
	processes := unix.New(c)
	a.closers = append(a.closers, processes)
	all := []attest.Attestor{processes}
	if cfg.Kubernetes != nil {
		pods, err := kubernetes.New(*cfg.Kubernetes) // has a limit of its own
		if err != nil {
			return nil, fmt.Errorf("set up the attestor %s: %w", kubernetes.Name, err)
		}
		a.closers = append(a.closers, pods)
		all = append(all, pods)
	}
	if cfg.Docker != nil {
		view, err := cgroup.Self()
		if err != nil {
			return nil, err
		}
		engines := *cfg.Docker
		engines.Container = view.Read
		all = append(all, attest.Limit(docker.New(engines), AttestorLimit))
	}
	if cfg.SystemdSocket != "" {
		units := systemd.New(cfg.SystemdSocket)
		a.closers = append(a.closers, units)
		all = append(all, attest.Limit(units, AttestorLimit))
	}
	return all, nil
}
