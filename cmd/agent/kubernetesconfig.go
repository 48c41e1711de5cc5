package main

import (
	"cmp"
	"context"
	"net"
	"time"

	"github.com/renewd/renewd/internal/agent/attest/kubernetes"
	"github.com/renewd/renewd/internal/config"
)

const kubernetesSection = "workload_attestation.kubernetes."

// The limits of polls, which kubernetes checks.
const (
	maxPodPolls    = 100
	minPodInterval = 100 * time.Millisecond
	maxPodInterval = 10 * time.Second
)

// kubernetes checks the section of the attestor.
func (c checker) kubernetes() {
	cfg := c.Config
	if cfg.KubeletPort < 1 || cfg.KubeletPort > 65535 {
		c.Bad(kubernetesSection+"kubelet_port", "is not a port", "10250 is usual")
	}
	if cfg.KubeletReadOnly < 0 || cfg.KubeletReadOnly > 65535 {
		c.Bad(kubernetesSection+"kubelet_read_only_port", "is not a port", "10255 is usual; remove it to use HTTPS")
	}
	if cfg.KubeletCAFile == "" && !cfg.KubeletUnverified && cfg.KubeletReadOnly == 0 {
		c.Bad(kubernetesSection+"kubelet_ca_file", "is empty, so the kubelet cannot be authenticated",
			"give the CA of its certificate, or set skip_kubelet_verification: true to accept any")
	}
	if cfg.KubeletCert != "" && cfg.KubeletKey == "" {
		c.Bad(kubernetesSection+"certificate_file", "is of no use without private_key_file", "give both or none")
	}
	if cfg.KubeletKey != "" && cfg.KubeletCert == "" {
		c.Bad(kubernetesSection+"private_key_file", "is of no use without certificate_file", "give both or none")
	}
	if cfg.PodPollAttempts < 1 || cfg.PodPollAttempts > maxPodPolls {
		c.Bad(kubernetesSection+"poll_attempts", "is not from 1 to 100", "5 is usual")
	}
	if cfg.PodPollInterval < minPodInterval || cfg.PodPollInterval > maxPodInterval {
		c.Bad(kubernetesSection+"poll_interval", "is not from "+config.Short(minPodInterval)+" to "+config.Short(maxPodInterval), "500ms is usual")
	}
}

// probeKubelet reports what the attestor would not get on this machine now.
func (c checker) probeKubelet(ctx context.Context, getenv func(string) string) {
	if !c.Config.KubernetesEnabled {
		return
	}
	a, err := kubernetes.New(*kubernetesConfig(c.Config, getenv))
	if err == nil {
		defer a.Close()
		err = a.Check(ctx)
	}
	if err != nil {
		c.Warn(kubernetesSection+"enabled", "cannot work on this machine", err.Error())
	}
}

// kubernetesConfig converts the section to the attestor's configuration. A pod finds the
// API server in its environment.
func kubernetesConfig(cfg *settings, getenv func(string) string) *kubernetes.Config {
	k := &kubernetes.Config{
		NodeName:                nodeName(cfg, getenv),
		KubeletHost:             cfg.KubeletHost,
		KubeletPort:             cfg.KubeletPort,
		KubeletReadOnlyPort:     cfg.KubeletReadOnly,
		KubeletCAFile:           cfg.KubeletCAFile,
		SkipKubeletVerification: cfg.KubeletUnverified,
		TokenFile:               cfg.KubeletToken,
		CertificateFile:         cfg.KubeletCert,
		PrivateKeyFile:          cfg.KubeletKey,
		PollAttempts:            cfg.PodPollAttempts,
		PollInterval:            cfg.PodPollInterval,
		SkipContainer:           cfg.SkipContainer,
		NamespaceLabels:         cfg.NamespaceLabels,
		APIServerCAFile:         kubernetes.DefaultCAFile,
	}
	if host := getenv("KUBERNETES_SERVICE_HOST"); host != "" {
		k.APIServer = net.JoinHostPort(host, cmp.Or(getenv("KUBERNETES_SERVICE_PORT"), "443"))
	}
	return k
}

// nodeName returns the name that Kubernetes has for the node; empty if it is not known.
func nodeName(cfg *settings, getenv func(string) string) string {
	if cfg.NodeName != "" || cfg.NodeNameEnv == "" {
		return cfg.NodeName
	}
	return getenv(cfg.NodeNameEnv)
}
