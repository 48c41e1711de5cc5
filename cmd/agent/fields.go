package main

import "github.com/renewd/renewd/internal/config"

// schema describes how the configuration is written, checked and documented.
var schema = config.Schema[settings]{Fields: fields, Env: "RENEWD_", Help: "agent help config", Check: validate, Probe: probeNode}

// fields are all fields of the configuration in the order of their documentation.
var fields = []config.Field[settings]{
	{Path: "trust_domain", Value: func(c *settings) any { return &c.TrustDomain }, Doc: "Trust domain of this node. Required."},
	{Path: "server_address", Value: func(c *settings) any { return &c.ServerAddress }, Doc: "Host and port of the server. Required."},
	{Path: "server_proxy", Value: func(c *settings) any { return &c.ServerProxy }, Secret: true, Doc: "HTTP proxy for the connection to the server, by CONNECT: http://HOST:PORT, with USER:PASSWORD@ before HOST if it requires them; environment to use HTTPS_PROXY and NO_PROXY; none for no proxy. If it is not set there is no proxy, with one log line if HTTPS_PROXY is set."},
	{Path: "deployment_name", Value: func(c *settings) any { return &c.DeploymentName }, Doc: "Deployment whose keysets sign for this node; a label of spirl_application_info."},
	{Path: "trust_bundle_file", Value: func(c *settings) any { return &c.TrustBundleFile }, Doc: "Trust bundle that authenticates the server at the first start, PEM or SPIFFE JSON. Later the agent uses only authorities that are new in it, and only if it cannot authenticate the server otherwise."},
	{Path: "trust_bundle_url", Value: func(c *settings) any { return &c.TrustBundleURL }, Doc: "URL of the trust bundle, PEM or SPIFFE JSON, instead of trust_bundle_file: https, or unix:///PATH (unix:///PATH:/REQUEST) for a publisher that speaks HTTP on a Unix socket of this node. It is asked at the first start, and later only as rebootstrap says."},
	{Path: "trust_bundle_ca_file", Value: func(c *settings) any { return &c.TrustBundleCAFile }, Doc: "CA certificates (PEM) that the certificate of an https trust_bundle_url must chain to, reloaded at each request. If it is not set, those of the system."},
	{Path: "insecure_bootstrap", Value: func(c *settings) any { return &c.InsecureBootstrap }, Default: "false", Doc: "Trust any server that answers at the first start. Instead of trust_bundle_file, for tests."},
	{Path: "rebootstrap", Value: func(c *settings) any { return &c.Rebootstrap }, Default: "never", Doc: "Whether trust_bundle_file or trust_bundle_url is asked again when the stored bundle does not authenticate the server any longer, such as on a node that was off while all keys were replaced. never: no. auto: yes, if the server lets the node attest again. always: yes, and the agent ends if it does not."},
	{Path: "rebootstrap_delay", Value: func(c *settings) any { return &c.RebootstrapDelay }, Default: "10m", Doc: "How long the server must not have been authenticated before that. One connection to a server that the stored bundle authenticates restarts the delay."},
	{Path: "join_token", Value: func(c *settings) any { return &c.JoinToken }, Secret: true, Doc: "Join token that attests the node at the first start."},
	{Path: "join_token_file", Value: func(c *settings) any { return &c.JoinTokenFile }, Doc: "File with the join token, reloaded at each attempt. Instead of join_token."},
	{Path: "node_attestation.k8s_psat.cluster", Value: func(c *settings) any { return &c.PSATCluster }, Doc: "Name that the server has for the Kubernetes cluster of this node. Attests the node with the projected service account token of the agent's pod, as SPIRE's k8s_psat, instead of a join token."},
	{Path: "node_attestation.k8s_psat.token_path", Value: func(c *settings) any { return &c.PSATTokenPath }, Default: "/var/run/secrets/tokens/spire-agent", Doc: "File of that token, reloaded at each attempt."},
	{Path: "node_attestation.k8s_psat.audience", Value: func(c *settings) any { return &c.PSATAudience }, Default: "spire-server", Doc: "Audience that the token must have, so that no token for the cluster's API is sent. Empty: any."},
	{Path: "node_attestation.x509pop.private_key_path", Value: func(c *settings) any { return &c.PoPKeyPath }, Doc: "Private key (PEM, RSA or ECDSA) of the certificate below. Both attest the node, as SPIRE's x509pop, instead of a join token; they are reloaded at each attempt."},
	{Path: "node_attestation.x509pop.certificate_path", Value: func(c *settings) any { return &c.PoPCertPath }, Doc: "The node's certificate (PEM) with digitalSignature in its key usage. Intermediates may follow it."},
	{Path: "node_attestation.x509pop.intermediates_path", Value: func(c *settings) any { return &c.PoPChainPath }, Doc: "More intermediates (PEM)."},
	{Path: "node_attestation.x509pop.spiffe_endpoint_socket", Value: func(c *settings) any { return &c.PoPEndpoint }, Doc: "Workload API of another agent, such as unix:///run/spire/agent.sock, whose X.509-SVID attests the node at a server in mode spiffe. Instead of the files."},
	{Path: "data_dir", Value: func(c *settings) any { return &c.DataDir }, Default: "/var/lib/renewd", Doc: "Directory for the agent SVID, its key and the last bundle, so that a restart needs no new token."},
	{Path: "runtime_dir", Value: func(c *settings) any { return &c.RuntimeDir }, Doc: "Directory on a memory file system. With it workload SVIDs, their keys and the record of the processes that use them survive a restart of the agent. Without it they are in the agent's memory only, and a restarted agent waits three minutes for the workloads before it reports settled."},
	{Path: "socket_path", Value: func(c *settings) any { return &c.SocketPath }, Default: "/run/renewd/agent.sock", Doc: "Unix socket of the Workload API."},
	{Path: "socket_mode", Value: func(c *settings) any { return &c.SocketMode }, Default: "0777", Doc: "Permissions of the socket. The agent attests each caller in any case."},
	{Path: "log.level", Value: func(c *settings) any { return &c.LogLevel }, Default: "info", Doc: "debug, info, warn or error."},
	{Path: "log.format", Value: func(c *settings) any { return &c.LogFormat }, Default: "auto", Doc: "text, json, or auto: text on a terminal and JSON otherwise."},
	{Path: "metrics.address", Value: func(c *settings) any { return &c.MetricsAddress }, Default: "127.0.0.1:9090", Doc: "Address of /metrics, /live and /ready. Empty: not served."},
	{Path: "metrics.web_config_file", Value: func(c *settings) any { return &c.WebConfigFile }, Doc: "Prometheus exporter web configuration file that enables TLS and basic auth for them."},
	{Path: "renewal.taint_delay", Value: func(c *settings) any { return &c.TaintDelay }, Default: "60s", Doc: "Upper limit of the random delay before SVIDs of a tainted authority are renewed."},
	{Path: "renewal.taint_rate", Value: func(c *settings) any { return &c.TaintRate }, Default: "20", Doc: "Most SVIDs requested in any second because of a taint, as the server counts them."},
	{Path: "renewal.refresh_interval", Value: func(c *settings) any { return &c.RefreshInterval }, Default: "5s", Doc: "Time between polls of the bundle and of the entries."},
	{Path: "renewal.batch_size", Value: func(c *settings) any { return &c.BatchSize }, Default: "500", Doc: "Most SVIDs requested in one call."},
	{Path: "renewal.key_type", Value: func(c *settings) any { return &c.KeyType }, Default: "ec-p256", Doc: "Keys of the SVIDs: ec-p256, ec-p384 or rsa-2048."},
	{Path: "entry_removal_delay", Value: func(c *settings) any { return &c.EntryRemovalDelay }, Default: "30s", Doc: "How long the agent serves an entry that is missing from the server's answers. 3m if more than half are missing, or after an attestation. A workload that holds an SVID keeps its key until it expires in any case."},
	{Path: "svid_cache_size", Value: func(c *settings) any { return &c.SVIDCacheSize }, Default: "1000", Doc: "SVIDs kept for workloads that are not connected. Soft limit: those with an open stream are always kept."},
	{Path: "jwt.tainted", Value: func(c *settings) any { return &c.JWTTainted }, Default: jwtServe, Doc: "What the agent does with a cached JWT-SVID whose key is tainted. serve: it serves the JWT-SVID until half of its lifetime is over, or its key is removed. replace: when a workload asks for it, it serves the JWT-SVID and has another one minted; for servers whose operators remove a JWT key shortly after the taint."},
	{Path: "unix.discover_path", Value: func(c *settings) any { return &c.DiscoverPath }, Default: "true", Doc: "Provide the selectors unix:path and unix:sha256, which need access to the caller's executable."},
	{Path: "unix.sha256_size_limit", Value: func(c *settings) any { return &c.SHA256Limit }, Default: "1073741824", Doc: "Largest executable, in bytes, that is hashed for unix:sha256 while an entry has that selector. 0: none."},
}
