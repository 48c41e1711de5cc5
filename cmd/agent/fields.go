package main

import "github.com/renewd/renewd/internal/config"

// schema describes the configuration for parsing, validation and documentation.
var schema = config.Schema[settings]{Fields: fields, Env: "RENEWD_", Help: "agent help config", Check: validate}

// fields has all fields of the configuration, in the order of the documentation.
var fields = []config.Field[settings]{
	{Path: "trust_domain", Value: func(c *settings) any { return &c.TrustDomain }, Doc: "Trust domain of this node. Required."},
	{Path: "server_address", Value: func(c *settings) any { return &c.ServerAddress }, Doc: "Host and port of the server. Required."},
	{Path: "server_proxy", Value: func(c *settings) any { return &c.ServerProxy }, Secret: true, Doc: "HTTP proxy to the server, by CONNECT: http://HOST:PORT, with USER:PASSWORD@ before HOST for authentication; environment to use HTTPS_PROXY and NO_PROXY; none for no proxy, the default. If HTTPS_PROXY is set and this is not, the agent logs that it ignores the variable."},
	{Path: "deployment_name", Value: func(c *settings) any { return &c.DeploymentName }, Doc: "Deployment whose keysets sign for this node; a label of spirl_application_info."},
	{Path: "trust_bundle_file", Value: func(c *settings) any { return &c.TrustBundleFile }, Doc: "Trust bundle that authenticates the server at the first start, PEM or SPIFFE JSON. Later the agent uses only authorities that are new in the file, and only if it cannot authenticate the server otherwise."},
	{Path: "insecure_bootstrap", Value: func(c *settings) any { return &c.InsecureBootstrap }, Default: "false", Doc: "Trust any server that answers at the first start. Instead of trust_bundle_file, for tests only."},
	{Path: "join_token", Value: func(c *settings) any { return &c.JoinToken }, Secret: true, Doc: "Join token that attests the node at the first start."},
	{Path: "join_token_file", Value: func(c *settings) any { return &c.JoinTokenFile }, Doc: "File with the join token, read at each attestation. Instead of join_token."},
	{Path: "data_dir", Value: func(c *settings) any { return &c.DataDir }, Default: "/var/lib/renewd", Doc: "Directory for the agent SVID, its key and the last bundle, so that a restart needs no new join token."},
	{Path: "runtime_dir", Value: func(c *settings) any { return &c.RuntimeDir }, Doc: "Directory on a memory file system for workload SVIDs and keys, and for the processes that use them, so that they survive a restart of the agent. If it is not set, they are lost; a restarted agent then waits three minutes for the workloads before it reports a taint as settled."},
	{Path: "socket_path", Value: func(c *settings) any { return &c.SocketPath }, Default: "/run/renewd/agent.sock", Doc: "Unix socket of the Workload API."},
	{Path: "socket_mode", Value: func(c *settings) any { return &c.SocketMode }, Default: "0777", Doc: "Permissions of the socket. Attestation does not depend on them."},
	{Path: "log.level", Value: func(c *settings) any { return &c.LogLevel }, Default: "info", Doc: "debug, info, warn or error."},
	{Path: "log.format", Value: func(c *settings) any { return &c.LogFormat }, Default: "auto", Doc: "text, json, or auto: text on a terminal and JSON otherwise."},
	{Path: "metrics.address", Value: func(c *settings) any { return &c.MetricsAddress }, Default: "127.0.0.1:9090", Doc: "Host and port of /metrics, /live and /ready. Empty: not served."},
	{Path: "metrics.web_config_file", Value: func(c *settings) any { return &c.WebConfigFile }, Doc: "Prometheus exporter web configuration file, for TLS and basic auth of metrics.address."},
	{Path: "renewal.taint_delay", Value: func(c *settings) any { return &c.TaintDelay }, Default: "60s", Doc: "Longest random delay before SVIDs of a tainted authority are renewed."},
	{Path: "renewal.taint_rate", Value: func(c *settings) any { return &c.TaintRate }, Default: "20", Doc: "Most SVIDs requested in any second because of a taint, as the server counts them."},
	{Path: "renewal.refresh_interval", Value: func(c *settings) any { return &c.RefreshInterval }, Default: "5s", Doc: "Time between polls of the bundle and of the entries."},
	{Path: "renewal.batch_size", Value: func(c *settings) any { return &c.BatchSize }, Default: "500", Doc: "Most SVIDs requested in one call."},
	{Path: "renewal.key_type", Value: func(c *settings) any { return &c.KeyType }, Default: "ec-p256", Doc: "Keys of the SVIDs: ec-p256, ec-p384 or rsa-2048."},
	{Path: "entry_removal_delay", Value: func(c *settings) any { return &c.EntryRemovalDelay }, Default: "30s", Doc: "How long an entry is served after it disappears from the server's answers. 3m if more than half disappear at once, or after an attestation. In any case a workload can use an SVID that it holds until that expires."},
	{Path: "svid_cache_size", Value: func(c *settings) any { return &c.SVIDCacheSize }, Default: "1000", Doc: "SVIDs that are kept for workloads without an open stream. SVIDs with an open stream are always kept, also above this number."},
	{Path: "jwt.tainted", Value: func(c *settings) any { return &c.JWTTainted }, Default: jwtServe, Doc: "How to serve a cached JWT-SVID whose key is tainted. serve: it is served until half of its life is over or its key is removed. replace: a request also mints a new one in the background; use it if your operators remove JWT keys shortly after the taint."},
	{Path: "unix.discover_path", Value: func(c *settings) any { return &c.DiscoverPath }, Default: "true", Doc: "Whether callers get the selectors unix:path and unix:sha256, which need access to their executables."},
	{Path: "unix.sha256_size_limit", Value: func(c *settings) any { return &c.SHA256Limit }, Default: "1073741824", Doc: "Largest executable, in bytes, that is hashed for unix:sha256. Executables are hashed only while an entry has that selector. 0: none."},
}
