package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/config"
	"github.com/renewd/renewd/internal/server"
	"github.com/renewd/renewd/internal/server/admin"
	"github.com/renewd/renewd/internal/server/federation"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/nodeattest/x509pop"
	"github.com/renewd/renewd/internal/server/rotation"
)

// settings is the server's configuration. Every field has a row in [fields] with its
// names in the file, as a flag and in the environment.
type settings struct {
	TrustDomain          spiffeid.TrustDomain
	DataDir              string
	KeyFile              string
	ListenAddress        string // of the deployment default
	Deployments          map[string]*deployment
	Clusters             map[string]*cluster // of Kubernetes
	AdminSocket          string
	AdminSocketMode      fs.FileMode
	OperatorAddress      string
	Managers             []string
	Readers              []string
	EndpointAddress      string
	EndpointProfile      string
	EndpointCertFile     string
	EndpointKeyFile      string
	RefreshHint          time.Duration
	Federation           map[string]*federated // by trust domain
	Limits               limits
	Networks             map[string]*limits
	Proxies              []string
	MetricsAddress       string
	WebConfigFile        string
	KeysetLifetime       time.Duration
	X509TTL              time.Duration
	JWTTTL               time.Duration
	RotationMode         string
	PreparationThreshold time.Duration
	ActivationThreshold  time.Duration
	TaintThreshold       time.Duration
	LogLevel             slog.Level
	LogFormat            string
}

// federated is the bundle endpoint of a trust domain.
type federated struct{ URL, Profile, ID, File string }

// named returns the value under a name, which is added if it is new.
func named[V any](m *map[string]*V, name string) *V {
	if *m == nil {
		*m = make(map[string]*V)
	}
	if (*m)[name] == nil {
		(*m)[name] = new(V)
	}
	return (*m)[name]
}

func (s *settings) federated(name string) *federated { return named(&s.Federation, name) }

// complete sets the address of the deployment default where it is listen_address or the
// default.
func (s *settings) complete() {
	if s.ListenAddress != "" || len(s.Deployments) == 0 {
		s.deployment(server.DefaultDeployment).ListenAddress = cmp.Or(s.ListenAddress, defaultAddress)
		s.ListenAddress = ""
	}
}

// names returns the names of a section.
func names(s *settings, before string) []string {
	switch before {
	case "deployments":
		return slices.Sorted(maps.Keys(s.Deployments))
	case "kubernetes_clusters":
		return slices.Sorted(maps.Keys(s.Clusters))
	case "federation":
		return slices.Sorted(maps.Keys(s.Federation))
	case "limits.networks":
		return slices.Sorted(maps.Keys(s.Networks))
	}
	panic("section " + before + " has no names")
}

// schema describes the configuration.
var schema = config.Schema[settings]{Fields: fields, Env: "RENEWD_SERVER_", Help: "server help config", Names: names, Check: validate}

const (
	defaultAddress = "0.0.0.0:8081"
	defaultSocket  = "/run/renewd-server/admin.sock"
)

// fields are all fields, in the order of the documentation.
var fields = slices.Concat([]config.Field[settings]{
	{Path: "trust_domain", Value: func(c *settings) any { return &c.TrustDomain }, Doc: "Trust domain that the server signs for. Required. It cannot be changed later."},
	{Path: "data_dir", Value: func(c *settings) any { return &c.DataDir }, Default: "/var/lib/renewd-server", Doc: "Directory of the store: keysets, entries, agents, tokens, the ledger of issued SVIDs, and the audit log."},
	{Path: "key_file", Value: func(c *settings) any { return &c.KeyFile }, Doc: "File with the key that encrypts the signing keys in the store, created with \"server key new\". The systemd credential renewd-store-key when not set."},
	{Path: "listen_address", Value: func(c *settings) any { return &c.ListenAddress }, Doc: "Host and port for agents: deployments.default.listen_address, which is 0.0.0.0:8081 when neither is set. Not used with deployments of other names."},
	{Path: "deployments.NAME.listen_address", Named: func(c *settings, name string) any { return &c.deployment(name).ListenAddress }, Default: defaultAddress, Doc: "Host and port for the agents of the deployment NAME. Each deployment has its own keysets, entries and agents. When none is set, there is one named default, and listen_address is its address."},
	{Path: "deployments.NAME.node_attestation.x509pop.ca_bundle_files", Named: func(c *settings, name string) any { return &c.deployment(name).X509Pop.CABundleFiles }, Reload: true, Doc: "PEM files with the CAs of the nodes' certificates. A node with such a certificate, whose key it has, may attest with x509pop. Reloaded when they change."},
	{Path: "deployments.NAME.node_attestation.x509pop.mode", Named: func(c *settings, name string) any { return &c.deployment(name).X509Pop.Mode }, Default: x509pop.ModeExternalPKI, Reload: true, Doc: "external_pki: the CAs are in ca_bundle_files. spiffe: a node exchanges an X.509-SVID of the trust domain for its agent SVID."},
	{Path: "deployments.NAME.node_attestation.x509pop.svid_prefix", Named: func(c *settings, name string) any { return &c.deployment(name).X509Pop.SVIDPrefix }, Reload: true, Doc: "For mode: spiffe, what the path of such an X.509-SVID begins with; /spire-exchange when not set, and / allows every path."},
	{Path: "deployments.NAME.node_attestation.x509pop.agent_path_template", Named: func(c *settings, name string) any { return &c.deployment(name).X509Pop.AgentPathTemplate }, Reload: true, Doc: "Path of the agent's SPIFFE ID after /spire/agent, a text/template with fields of the certificate, as in SPIRE: `/x509pop/{{ .Fingerprint }}` when not set, `/x509pop/{{ .SVIDPathTrimmed }}` for mode: spiffe. Two nodes must not get the same."},
	{Path: "deployments.NAME.node_attestation.x509pop.max_intermediates", Named: func(c *settings, name string) any { return &c.deployment(name).X509Pop.MaxIntermediates }, Default: strconv.Itoa(x509pop.DefaultMaxIntermediates), Reload: true, Doc: "Most certificates between a node's and its CA."},
	{Path: "deployments.NAME.node_attestation.x509pop.max_rsa_key_size", Named: func(c *settings, name string) any { return &c.deployment(name).X509Pop.MaxRSAKeySize }, Default: strconv.Itoa(x509pop.DefaultMaxRSAKeySize), Reload: true, Doc: "Most bits of an RSA key in these certificates."},
	{Path: "deployments.NAME.node_attestation.x509pop.verify_client_ip", Named: func(c *settings, name string) any { return &c.deployment(name).X509Pop.VerifyClientIP }, Reload: true, Doc: "Whether the agent has to connect from an IP address that its certificate names."},
	{Path: "deployments.NAME.node_attestation.k8s_psat.clusters", Named: func(c *settings, name string) any { return &c.deployment(name).Clusters }, Reload: true, Doc: "Names of the clusters of kubernetes_clusters whose nodes may attest with k8s_psat."},
	{Path: "kubernetes_clusters.CLUSTER.service_account_allow_list", Named: func(c *settings, name string) any { return &c.cluster(name).ServiceAccounts }, Reload: true, Doc: "Service accounts, NAMESPACE:NAME each, whose pods are agents. CLUSTER is the name that these agents give; it is in their SPIFFE IDs. Several may be of one API server."},
	{Path: "kubernetes_clusters.CLUSTER.audience", Named: func(c *settings, name string) any { return &c.cluster(name).Audiences }, Reload: true, Doc: "Audiences of which an agent's token has to have one; [spire-server] when not set. []: that of the API server."},
	{Path: "kubernetes_clusters.CLUSTER.kube_config_file", Named: func(c *settings, name string) any { return &c.cluster(name).Kubeconfig }, Reload: true, Doc: "kubeconfig with the API server and a user who may create tokenreviews and get pods and nodes. Not set: the server runs in a pod of the cluster."},
	{Path: "kubernetes_clusters.CLUSTER.allowed_node_label_keys", Named: func(c *settings, name string) any { return &c.cluster(name).NodeLabels }, Reload: true, Doc: "Labels of nodes that become selectors, agent_node_label:KEY:VALUE."},
	{Path: "kubernetes_clusters.CLUSTER.allowed_pod_label_keys", Named: func(c *settings, name string) any { return &c.cluster(name).PodLabels }, Reload: true, Doc: "Labels of the agents' pods that become selectors, agent_pod_label:KEY:VALUE."},
	{Path: "kubernetes_clusters.CLUSTER.use_pod_uid_for_agent_id", Named: func(c *settings, name string) any { return &c.cluster(name).PodUIDs }, Reload: true, Doc: "Whether the agents' SPIFFE IDs have the pod's UID instead of the node's, for agents of which several run on a node."},
	{Path: "admin_socket", Value: func(c *settings) any { return &c.AdminSocket }, Default: defaultSocket, Doc: "Unix socket for operators on this machine."},
	{Path: "admin_socket_mode", Value: func(c *settings) any { return &c.AdminSocketMode }, Default: "0660", Doc: "Permissions of the socket. With 0660 root and the server's group can connect, with 0666 everybody. operators.managers and operators.readers set what they may do."},
	{Path: "operators.address", Value: func(c *settings) any { return &c.OperatorAddress }, Doc: "Host and port for remote operators, who connect with X.509-SVIDs of the trust domain. Empty: not served."},
	{Path: "operators.managers", Value: func(c *settings) any { return &c.Managers }, Reload: true, Doc: "Operators who may read and change everything: unix:uid:0, unix:user:NAME, unix:gid:N or unix:group:NAME on the socket, spiffe://… over the network. The entry of such a SPIFFE ID needs the parent_id of an agent, or operator: true. Root and the server's own user when both lists are empty."},
	{Path: "operators.readers", Value: func(c *settings) any { return &c.Readers }, Reload: true, Doc: "Operators who may only read, in the same syntax. Managers may read, too."},
	{Path: "bundle_endpoint.address", Value: func(c *settings) any { return &c.EndpointAddress }, Doc: "Host and port where relying parties get the trust bundle (/bundle) and the keys of JWT-SVIDs (/keys) over HTTPS. Empty: not served."},
	{Path: "bundle_endpoint.profile", Value: func(c *settings) any { return &c.EndpointProfile }, Default: server.ProfileSPIFFE, Doc: "https_spiffe: the certificate is the server's X.509-SVID. https_web: the certificate is in files."},
	{Path: "bundle_endpoint.cert_file", Value: func(c *settings) any { return &c.EndpointCertFile }, Reload: true, Doc: "Certificate chain (PEM) for https_web, reloaded when it changes."},
	{Path: "bundle_endpoint.key_file", Value: func(c *settings) any { return &c.EndpointKeyFile }, Reload: true, Doc: "Its private key (PEM)."},
	{Path: "bundle_endpoint.refresh_hint", Value: func(c *settings) any { return &c.RefreshHint }, Default: "5m", Reload: true, Doc: "Refresh hint of the bundle: how often relying parties should ask for it, in whole seconds. 0s: no hint."},
	{Path: "federation.TRUSTDOMAIN.endpoint_url", Named: func(c *settings, name string) any { return &c.federated(name).URL }, Reload: true, Doc: "https URL of the bundle endpoint of the trust domain TRUSTDOMAIN. The server keeps that bundle current, and workloads whose entries federate with TRUSTDOMAIN get it. When the field is removed, the bundle is deleted."},
	{Path: "federation.TRUSTDOMAIN.profile", Named: func(c *settings, name string) any { return &c.federated(name).Profile }, Reload: true, Doc: "https_web: the endpoint is verified like a web server, with the root certificates of this machine. https_spiffe: it is verified by its X.509-SVID."},
	{Path: "federation.TRUSTDOMAIN.endpoint_spiffe_id", Named: func(c *settings, name string) any { return &c.federated(name).ID }, Reload: true, Doc: "SPIFFE ID of an endpoint with https_spiffe, in TRUSTDOMAIN itself, in trust_domain or in another trust domain of federation."},
	{Path: "federation.TRUSTDOMAIN.bundle_file", Named: func(c *settings, name string) any { return &c.federated(name).File }, Reload: true, Doc: "File with the initial bundle, in SPIFFE's format or PEM. It is required to verify an endpoint in TRUSTDOMAIN itself for the first time. A fetched bundle takes precedence, until the authorities in the file change."},
}, limitRows(), []config.Field[settings]{
	{Path: "proxy_protocol.trusted_cidrs", Value: func(c *settings) any { return &c.Proxies }, Reload: true, Doc: "Networks of load balancers that send a PROXY protocol header, version 1 or 2, to every address of agents, operators and the bundle endpoint: the server sees the addresses of their clients. A connection from there without a header is refused. No header is accepted from elsewhere."},
	{Path: "metrics.address", Value: func(c *settings) any { return &c.MetricsAddress }, Default: "127.0.0.1:9091", Doc: "Host and port of /metrics, /live and /ready. Empty: not served."},
	{Path: "metrics.web_config_file", Value: func(c *settings) any { return &c.WebConfigFile }, Doc: "Prometheus exporter web configuration file, for TLS and basic auth of metrics.address. Reloaded at each connection."},
	{Path: "keysets.lifetime", Value: func(c *settings) any { return &c.KeysetLifetime }, Default: "2160h", Doc: "Lifetime of a new keyset; the default is 90 days."},
	{Path: "keysets.x509_ttl", Value: func(c *settings) any { return &c.X509TTL }, Default: "24h", Doc: "Lifetime of X.509-SVIDs whose entry sets none, 1h to 168h."},
	{Path: "keysets.jwt_ttl", Value: func(c *settings) any { return &c.JWTTTL }, Default: "24h", Doc: "Lifetime of JWT-SVIDs whose entry sets none."},
	{Path: "rotation.mode", Value: func(c *settings) any { return &c.RotationMode }, Default: "on", Reload: true, Doc: "Automatic rotation: off, on, or paused, which shows and logs the next step and does not carry it out."},
	{Path: "rotation.preparation_threshold", Value: func(c *settings) any { return &c.PreparationThreshold }, Reload: true, Doc: "How long before the active keyset expires its successor is prepared, at most half of keysets.lifetime. 14/90 of the lifetime when not set, which is 14 days of 90."},
	{Path: "rotation.activation_threshold", Value: func(c *settings) any { return &c.ActivationThreshold }, Reload: true, Doc: "Minimum age of a keyset at its activation, so that every verifier has its authorities by then. 1/90 of the lifetime when not set, which is a day of 90."},
	{Path: "rotation.taint_threshold", Value: func(c *settings) any { return &c.TaintThreshold }, Reload: true, Doc: "How long after its replacement a keyset is tainted. It is removed when that is safe. 1/90 of the lifetime when not set."},
	{Path: "log.level", Value: func(c *settings) any { return &c.LogLevel }, Default: "info", Reload: true, Doc: "debug, info, warn or error."},
	{Path: "log.format", Value: func(c *settings) any { return &c.LogFormat }, Default: "auto", Doc: "text, json, or auto: text on a terminal and JSON otherwise."},
})

var (
	profiles  = []string{server.ProfileSPIFFE, server.ProfileWeb}
	modes     = []string{string(rotation.Off), string(rotation.On), string(rotation.Paused)}
	plainName = regexp.MustCompile(`^[A-Za-z0-9_-]{1,63}$`)
)

// checker collects the problems of the configuration.
type checker struct{ *config.Checker[settings] }

// validate reports all problems of the configuration.
func validate(shared *config.Checker[settings]) {
	c := checker{shared}
	if c.Origin("trust_domain") == "" {
		c.Missing("trust_domain", "is not set", "give the trust domain to sign for, such as example.org")
	}
	c.NotEmpty("data_dir", "admin_socket")
	c.listeners()
	c.limits()
	c.operators()
	c.endpoint()
	c.nodeAttestation()
	c.federation()
	c.lifetimes()
	c.OneOf("log.format", "is not a format", cli.LogFormats)
}

// listeners checks the socket and the addresses, and that no address is used twice.
func (c checker) listeners() {
	if n := len(c.Config.AdminSocket); n > config.MaxSocketPath {
		c.Bad("admin_socket", "is longer than the kernel's limit of 107 bytes", "choose a shorter path")
	}
	if c.Config.AdminSocketMode&0o600 != 0o600 {
		c.Bad("admin_socket_mode", "does not let its owner connect", "set at least 0600")
	}
	taken := map[string]string{}
	listener := func(path, address, example string) {
		if reason := config.BadAddress(address, false); reason != "" {
			c.Bad(path, reason, "write it as host:port, such as "+example)
		} else if other, dup := taken[address]; dup && !strings.HasSuffix(address, ":0") { // 0: a free one each
			c.Bad(path, "is also the address of "+other, "use different addresses")
		} else {
			taken[address] = path
		}
	}
	const standard = "deployments." + server.DefaultDeployment + ".listen_address"
	_, hasDefault := c.Config.Deployments[server.DefaultDeployment]
	switch {
	case c.Origin("listen_address") == "":
		if len(c.Config.Deployments) == 0 {
			taken[defaultAddress] = "deployment " + server.DefaultDeployment
		}
	case c.Origin(standard) != "":
		c.Bad("listen_address", "is set, and "+standard+", too", "remove one of the two")
	case len(c.Config.Deployments) > 0 && !hasDefault:
		c.Bad("listen_address", "is for the deployment "+server.DefaultDeployment+", which is not in deployments", "set deployments.NAME.listen_address instead")
	default:
		listener("listen_address", c.Config.ListenAddress, defaultAddress)
	}
	for _, name := range slices.Sorted(maps.Keys(c.Config.Deployments)) {
		path := "deployments." + name + ".listen_address"
		if !plainName.MatchString(name) {
			c.Bad(path, "belongs to a deployment with an invalid name", "use up to 63 letters, digits, - and _")
			continue
		}
		if path != standard || c.Origin("listen_address") == "" {
			listener(path, c.Config.Deployments[name].ListenAddress, defaultAddress)
		}
	}
	for _, l := range []struct{ path, address, example string }{
		{"operators.address", c.Config.OperatorAddress, "0.0.0.0:8082"},
		{"bundle_endpoint.address", c.Config.EndpointAddress, "0.0.0.0:8443"},
		{"metrics.address", c.Config.MetricsAddress, "127.0.0.1:9091"},
	} {
		if l.address != "" {
			listener(l.path, l.address, l.example)
		}
	}
	if c.Config.MetricsAddress == "" && c.Config.WebConfigFile != "" {
		c.Bad("metrics.web_config_file", "is not used without metrics.address", "set metrics.address or remove it")
	}
}

// endpoint checks the bundle endpoint.
func (c checker) endpoint() {
	web := c.Config.EndpointProfile == server.ProfileWeb
	if !c.OneOf("bundle_endpoint.profile", "is not a profile", profiles) {
		return
	}
	for path, file := range map[string]string{"bundle_endpoint.cert_file": c.Config.EndpointCertFile, "bundle_endpoint.key_file": c.Config.EndpointKeyFile} {
		switch {
		case web && file == "":
			c.Missing(path, "is not set and profile "+server.ProfileWeb+" needs it", "give the PEM file")
		case !web && file != "":
			c.Bad(path, "is not used with profile "+server.ProfileSPIFFE, "remove it or set bundle_endpoint.profile: "+server.ProfileWeb)
		}
	}
	if c.Config.RefreshHint < 0 || c.Config.RefreshHint%time.Second != 0 {
		c.Bad("bundle_endpoint.refresh_hint", "is not in whole seconds", "5m is usual")
	}
}

// federation checks the endpoints of other trust domains.
func (c checker) federation() {
	readable := true
	bad := func(name, field, what, remedy string) {
		c.Bad("federation."+name+"."+field, what, remedy)
		readable = false
	}
	for _, name := range slices.Sorted(maps.Keys(c.Config.Federation)) {
		for _, field := range c.Config.Federation[name].fields() {
			if c.Origin("federation."+name+"."+field.name) == "" {
				continue
			}
			if err := config.CheckTrustDomain(name); err != nil {
				bad(name, field.name, fmt.Sprintf("is for the trust domain %q, which %v", name, err), "")
			} else if field.value == "" {
				bad(name, field.name, "is empty", "give a value or remove it")
			} else if _, err := spiffeid.FromString(field.value); field.name == "endpoint_spiffe_id" && err != nil {
				bad(name, field.name, "is not a SPIFFE ID", "write it as spiffe://"+name+"/spire/server")
			}
		}
	}
	if readable {
		c.endpoints(federation.Check(c.Config.TrustDomain, c.Config.endpoints()))
	}
}

// endpoints reports each invalid field of an endpoint.
func (c checker) endpoints(err error) {
	if all, ok := err.(interface{ Unwrap() []error }); ok {
		for _, err := range all.Unwrap() {
			c.endpoints(err)
		}
		return
	}
	if p, ok := errors.AsType[*federation.EndpointError](err); ok {
		path := "federation." + p.TrustDomain.Name() + "." + p.Field
		if c.Origin(path) == "" {
			c.Missing(path, p.Problem, p.Remedy)
		} else {
			c.Bad(path, p.Problem, p.Remedy)
		}
	}
}

// federatedField is a field of federation.
type federatedField struct{ name, value string }

func (f *federated) fields() []federatedField {
	return []federatedField{{"endpoint_url", f.URL}, {"profile", f.Profile}, {"endpoint_spiffe_id", f.ID}, {"bundle_file", f.File}}
}

// endpoints returns the bundle endpoints of federation.
func (s *settings) endpoints() []federation.Endpoint {
	var out []federation.Endpoint
	for _, name := range slices.Sorted(maps.Keys(s.Federation)) {
		f := s.Federation[name]
		e := federation.Endpoint{URL: f.URL, Profile: f.Profile, BundleFile: f.File}
		e.TrustDomain, _ = spiffeid.TrustDomainFromString(name)
		e.ID, _ = spiffeid.FromString(f.ID)
		out = append(out, e)
	}
	return out
}

// lifetimes checks the durations of keysets, SVIDs and automatic rotation.
func (c checker) lifetimes() {
	s := c.Config
	if s.KeysetLifetime <= s.X509TTL {
		c.Bad("keysets.lifetime", "is not longer than keysets.x509_ttl, "+config.Short(s.X509TTL), "2160h, 90 days, is usual")
	}
	if s.X509TTL < keyset.MinX509TTL || s.X509TTL > keyset.MaxX509TTL {
		c.Bad("keysets.x509_ttl", "is not from "+config.Short(keyset.MinX509TTL)+" to "+config.Short(keyset.MaxX509TTL), "24h is usual")
	}
	if s.JWTTTL < time.Second {
		c.Bad("keysets.jwt_ttl", "is shorter than a second", "24h is usual")
	}
	if !c.OneOf("rotation.mode", "is not a mode", modes) {
		return
	}
	if _, err := s.policy().For(s.KeysetLifetime); err != nil {
		c.rotation(err)
	}
}

func (s *settings) policy() rotation.Policy {
	return rotation.Policy{
		Mode: rotation.Mode(s.RotationMode), PreparationThreshold: s.PreparationThreshold,
		ActivationThreshold: s.ActivationThreshold, TaintThreshold: s.TaintThreshold,
	}
}

// rotation reports invalid thresholds.
func (c checker) rotation(err error) {
	if all, ok := err.(interface{ Unwrap() []error }); ok {
		for _, err := range all.Unwrap() {
			c.rotation(err)
		}
		return
	}
	if p, ok := errors.AsType[*rotation.PolicyError](err); ok {
		c.Bad("rotation."+p.Field, p.Problem, p.Remedy)
	}
}

// operators checks each rule as the server will parse it.
func (c checker) operators() {
	if c.Config.TrustDomain.IsZero() {
		return
	}
	for path, rules := range map[string][]string{"operators.managers": c.Config.Managers, "operators.readers": c.Config.Readers} {
		for i, rule := range rules {
			if _, err := admin.ParseRules(c.Config.TrustDomain, []string{rule}, nil); err != nil {
				// The error begins with the rule's place in the list passed to ParseRules.
				_, what, _ := strings.Cut(err.Error(), strconv.Quote(rule)+" ")
				c.Bad(fmt.Sprintf("%s[%d]", path, i), what, "")
			}
		}
	}
}
