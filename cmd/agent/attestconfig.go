package main

import (
	"context"
	"path/filepath"

	"github.com/renewd/renewd/internal/agent"
	"github.com/renewd/renewd/internal/agent/attest/docker"
	"github.com/renewd/renewd/internal/agent/attest/systemd"
)

// attestation checks the workload attestors.
func (c checker) attestation() {
	c.kubernetes()
	for _, path := range []struct{ field, value string }{
		{"workload_attestation.docker.socket_path", c.Config.DockerSocket},
		{"workload_attestation.docker.podman_socket_path", c.Config.PodmanSocket},
		{"workload_attestation.systemd.socket_path", c.Config.SystemdSocket},
	} {
		if !filepath.IsAbs(path.value) {
			c.Bad(path.field, "is not an absolute path", "write the path of the socket, without unix://")
		}
	}
	if template := c.Config.RootlessPodman; template != "" {
		if err := docker.CheckTemplate(template); err != nil || !filepath.IsAbs(template) {
			c.Bad("workload_attestation.docker.rootless_podman_socket_path", "is not an absolute path with %d once, the place of the user ID",
				"write it like /run/user/%d/podman/podman.sock, without unix://")
		}
	}
}

// probeAttestors reports the workload attestors that cannot work on this machine now.
func (c checker) probeAttestors(ctx context.Context, getenv func(string) string) {
	c.probeKubelet(ctx, getenv)
	ctx, cancel := context.WithTimeout(ctx, agent.AttestorLimit)
	defer cancel()
	if c.Config.DockerEnabled {
		// A node may have one of the two.
		err := docker.Reach(ctx, c.Config.DockerSocket)
		if err != nil && docker.Reach(ctx, c.Config.PodmanSocket) != nil {
			c.Warn("workload_attestation.docker.enabled", "cannot work on this machine", err.Error())
		}
	}
	if c.Config.SystemdEnabled {
		if err := systemd.Reach(ctx, c.Config.SystemdSocket); err != nil {
			c.Warn("workload_attestation.systemd.enabled", "cannot work on this machine", err.Error())
		}
	}
}

// setAttestors sets the workload attestors in the configuration of [agent.New].
func setAttestors(to *agent.Config, cfg *settings, getenv func(string) string) {
	if cfg.KubernetesEnabled {
		to.Kubernetes = kubernetesConfig(cfg, getenv)
	}
	if cfg.DockerEnabled {
		to.Docker = &docker.Config{Socket: cfg.DockerSocket, Podman: cfg.PodmanSocket, RootlessPodman: cfg.RootlessPodman}
	}
	if cfg.SystemdEnabled {
		to.SystemdSocket = cfg.SystemdSocket
	}
}
