package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/server"
	"github.com/renewd/renewd/internal/server/nodeattest/k8spsat"
	"github.com/renewd/renewd/internal/server/nodeattest/x509pop"
)

// deployment is a deployment, and how nodes attest to it beside join tokens.
type deployment struct {
	ListenAddress string
	X509Pop       x509pop.Config
	Clusters      []string // of k8s_psat
}

// cluster is a cluster of Kubernetes. Its name is its key.
type cluster struct{ k8spsat.Cluster }

func (s *settings) deployment(name string) *deployment { return named(&s.Deployments, name) }
func (s *settings) cluster(name string) *cluster       { return named(&s.Clusters, name) }

// The limits of x509pop that make sense: nobody has more intermediates, and Go verifies no
// longer keys.
const (
	maxIntermediates = 100
	minRSAKeySize    = 1024
	maxRSAKeySize    = 16384
)

// nodeAttestation checks how nodes attest.
func (c checker) nodeAttestation() {
	used := make(map[string]bool)
	for _, name := range slices.Sorted(maps.Keys(c.Config.Deployments)) {
		prefix := "deployments." + name + ".node_attestation."
		if !plainName.MatchString(name) {
			continue // reported with its address
		}
		c.x509pop(prefix+"x509pop.", &c.Config.Deployments[name].X509Pop)
		clusters := c.Config.Deployments[name].Clusters
		for i, cluster := range clusters {
			path := fmt.Sprintf("%sk8s_psat.clusters[%d]", prefix, i)
			switch {
			case c.Config.Clusters[cluster] == nil:
				c.Bad(path, "is no cluster of kubernetes_clusters", "add kubernetes_clusters."+cluster+" or remove it")
			case slices.Contains(clusters[:i], cluster):
				c.Bad(path, "is given twice", "keep one of the two")
			}
			used[cluster] = true
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.Config.Clusters)) {
		c.cluster("kubernetes_clusters."+name+".", name, used[name])
	}
}

// x509pop checks the fields of x509pop, if one is set.
func (c checker) x509pop(prefix string, x *x509pop.Config) {
	isSet := func(field string) bool { return c.Origin(prefix+field) != "" }
	if !slices.ContainsFunc([]string{
		"ca_bundle_files", "mode", "svid_prefix", "agent_path_template", "max_intermediates", "max_rsa_key_size", "verify_client_ip",
	}, isSet) || !c.OneOf(prefix+"mode", "is not a mode", []string{x509pop.ModeExternalPKI, x509pop.ModeSPIFFE}) {
		return
	}
	spiffe := x.Mode == x509pop.ModeSPIFFE
	switch {
	case !spiffe && !isSet("ca_bundle_files"):
		c.Missing(prefix+"ca_bundle_files", "is not set and x509pop needs it", "give a PEM file with the CAs of the nodes, or set mode: "+x509pop.ModeSPIFFE)
	case !spiffe && len(x.CABundleFiles) == 0:
		c.Bad(prefix+"ca_bundle_files", "is empty", "give a PEM file with the CAs of the nodes, or remove x509pop")
	case spiffe && isSet("ca_bundle_files"):
		c.Bad(prefix+"ca_bundle_files", "is not used with mode: "+x509pop.ModeSPIFFE, "remove it or set mode: "+x509pop.ModeExternalPKI)
	}
	switch {
	case !isSet("svid_prefix"):
	case !spiffe:
		c.Bad(prefix+"svid_prefix", "is not used with mode: "+x509pop.ModeExternalPKI, "remove it or set mode: "+x509pop.ModeSPIFFE)
	case !strings.HasPrefix(x.SVIDPrefix, "/"):
		c.Bad(prefix+"svid_prefix", "does not begin with a slash", "write it as "+x509pop.DefaultSVIDPrefix+", or / for every path")
	}
	if _, err := x509pop.ParseTemplate(x.AgentPathTemplate); err != nil || isSet("agent_path_template") && !strings.HasPrefix(x.AgentPathTemplate, "/") {
		c.Bad(prefix+"agent_path_template", "is not a template of a path", "write it as /x509pop/cn/{{ .Subject.CommonName }}")
	}
	if x.MaxIntermediates < 1 || x.MaxIntermediates > maxIntermediates {
		c.Bad(prefix+"max_intermediates", fmt.Sprintf("is not from 1 to %d", maxIntermediates), fmt.Sprintf("%d is usual", x509pop.DefaultMaxIntermediates))
	}
	if x.MaxRSAKeySize < minRSAKeySize || x.MaxRSAKeySize > maxRSAKeySize {
		c.Bad(prefix+"max_rsa_key_size", fmt.Sprintf("is not from %d to %d", minRSAKeySize, maxRSAKeySize), fmt.Sprintf("%d is usual", x509pop.DefaultMaxRSAKeySize))
	}
}

// cluster checks a cluster of Kubernetes. used says whether a deployment has it.
func (c checker) cluster(prefix, name string, used bool) {
	accounts := prefix + "service_account_allow_list"
	k := c.Config.Clusters[name]
	switch {
	case spiffeid.ValidatePathSegment(name) != nil:
		c.Missing(strings.TrimSuffix(prefix, "."), "has a name that cannot be in a SPIFFE ID", "use letters, digits, -, _ and dots")
	case !used:
		c.Missing(strings.TrimSuffix(prefix, "."), "is in no deployment", "add it to deployments.NAME.node_attestation.k8s_psat.clusters or remove it")
	}
	switch {
	case c.Origin(accounts) == "":
		c.Missing(accounts, "is not set", "give the service accounts of the agents' pods, such as [renewd:renewd-agent]")
	case len(k.ServiceAccounts) == 0:
		c.Bad(accounts, "is empty", "give the service accounts of the agents' pods, such as [renewd:renewd-agent]")
	}
	for i, account := range k.ServiceAccounts {
		if namespace, name, ok := strings.Cut(account, ":"); !ok || namespace == "" || name == "" || strings.Contains(name, ":") {
			c.Bad(fmt.Sprintf("%s[%d]", accounts, i), "is not a service account", "write it as NAMESPACE:NAME")
		}
	}
	if c.Origin(prefix+"kube_config_file") != "" && k.Kubeconfig == "" {
		c.Bad(prefix+"kube_config_file", "is empty", "give a file or remove it")
	}
}

// deployments returns the deployments with their verifiers' configuration.
func (s *settings) deployments() []server.DeploymentConfig {
	var out []server.DeploymentConfig
	for _, name := range slices.Sorted(maps.Keys(s.Deployments)) {
		d := s.Deployments[name]
		c := server.DeploymentConfig{Name: name, ListenAddress: d.ListenAddress}
		if x := d.X509Pop; len(x.CABundleFiles) > 0 || x.Mode == x509pop.ModeSPIFFE {
			c.X509Pop = &x
		}
		for _, name := range d.Clusters {
			k := s.Clusters[name].Cluster
			k.Name = name
			c.Clusters = append(c.Clusters, k)
		}
		out = append(out, c)
	}
	return out
}
