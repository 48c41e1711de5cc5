package main

import "github.com/renewd/renewd/internal/config"

// schema is how the configuration is written, checked and documented.
var schema = config.Schema[settings]{Fields: fields, Env: "RENEWD_", Help: "agent help config", Check: validate}

// fields is the whole configuration, in the order in which it is documented.
var fields = []config.Field[settings]{
	{Path: "trust_domain", Value: func(c *settings) any { return &c.TrustDomain }, Doc: "Trust domain of this node. Required."},
	{Path: "server_address", Value: func(c *settings) any { return &c.ServerAddress }, Doc: "Host and port of the server. Required."},
	{Path: "server_proxy", Value: func(c *settings) any { return &c.ServerProxy }, Secret: true, Doc: "HTTP proxy through which the server is reached, by CONNECT: http://HOST:PORT, with USER:PASSWORD@ before HOST if it wants them; environment for what HTTPS_PROXY and NO_PROXY say; none for no proxy. Not set, it is none, and the log says so once if HTTPS_PROXY is set."},
	{Path: "deployment_name", Value: func(c *settings) any { return &c.DeploymentName }, Doc: "Deployment whose keysets sign for this node; a label of spirl_application_info."},
	{Path: "trust_bundle_file", Value: func(c *settings) any { return &c.TrustBundleFile }, Doc: "Trust bundle that authenticates the server at the first start, PEM or SPIFFE JSON. Later only an authority that is new in it counts, when the server cannot be authenticated otherwise."},
	{Path: "insecure_bootstrap", Value: func(c *settings) any { return &c.InsecureBootstrap }, Default: "false", Doc: "Trust whichever server answers at the first start. Instead of trust_bundle_file, for trying out."},
	{Path: "join_token", Value: func(c *settings) any { return &c.JoinToken }, Secret: true, Doc: "Join token that proves the node at the first start."},
	{Path: "join_token_file", Value: func(c *settings) any { return &c.JoinTokenFile }, Doc: "File that holds the join token, read anew at each attempt. Instead of join_token."},
	{Path: "data_dir", Value: func(c *settings) any { return &c.DataDir }, Default: "/var/lib/renewd", Doc: "Directory for the agent's own key and SVID and the last bundle, so that a restart needs no new token."},
	{Path: "runtime_dir", Value: func(c *settings) any { return &c.RuntimeDir }, Doc: "Directory on a memory file system where workload SVIDs and keys, and which processes use them, survive a restart of the agent. They are kept in memory alone when not set; a restarted agent then only waits three minutes for the workloads before it says settled."},
	{Path: "socket_path", Value: func(c *settings) any { return &c.SocketPath }, Default: "/run/renewd/agent.sock", Doc: "Unix socket of the Workload API."},
	{Path: "socket_mode", Value: func(c *settings) any { return &c.SocketMode }, Default: "0777", Doc: "Permissions of the socket. Callers are told apart by who they are, not by this."},
	{Path: "log.level", Value: func(c *settings) any { return &c.LogLevel }, Default: "info", Doc: "debug, info, warn or error."},
	{Path: "log.format", Value: func(c *settings) any { return &c.LogFormat }, Default: "auto", Doc: "text, json, or auto: text on a terminal and JSON otherwise."},
	{Path: "metrics.address", Value: func(c *settings) any { return &c.MetricsAddress }, Default: "127.0.0.1:9090", Doc: "Where /metrics, /live and /ready are served. Empty: nowhere."},
	{Path: "metrics.web_config_file", Value: func(c *settings) any { return &c.WebConfigFile }, Doc: "Prometheus exporter web configuration file that turns on TLS and basic auth there."},
	{Path: "renewal.taint_delay", Value: func(c *settings) any { return &c.TaintDelay }, Default: "60s", Doc: "Upper end of the random delay before SVIDs of a tainted authority are renewed."},
	{Path: "renewal.taint_rate", Value: func(c *settings) any { return &c.TaintRate }, Default: "20", Doc: "Most SVIDs asked for in any second because of a taint, as the server counts them."},
	{Path: "renewal.refresh_interval", Value: func(c *settings) any { return &c.RefreshInterval }, Default: "5s", Doc: "Time between polls of the bundle and of the entries."},
	{Path: "renewal.batch_size", Value: func(c *settings) any { return &c.BatchSize }, Default: "500", Doc: "Most SVIDs asked for in one call."},
	{Path: "renewal.key_type", Value: func(c *settings) any { return &c.KeyType }, Default: "ec-p256", Doc: "Keys of the SVIDs: ec-p256, ec-p384 or rsa-2048."},
	{Path: "entry_removal_delay", Value: func(c *settings) any { return &c.EntryRemovalDelay }, Default: "30s", Doc: "How long an entry that is missing from the server's answers is still served. 3m if more than half are missing, or after an attestation. A workload that holds an SVID keeps its key until it expires in any case."},
	{Path: "svid_cache_size", Value: func(c *settings) any { return &c.SVIDCacheSize }, Default: "1000", Doc: "SVIDs kept for workloads that are not connected. Soft: those with an open stream are always kept."},
	{Path: "jwt.tainted", Value: func(c *settings) any { return &c.JWTTainted }, Default: jwtServe, Doc: "What becomes of a JWT-SVID that is held when its key is tainted. serve: it is handed out until half of its life is over, or its key is removed. replace: it is minted again when a workload asks for it, and handed out meanwhile; for servers whose operators remove a JWT key shortly after the taint."},
	{Path: "unix.discover_path", Value: func(c *settings) any { return &c.DiscoverPath }, Default: "true", Doc: "Give the selectors unix:path and unix:sha256, which need access to the caller's executable."},
	{Path: "unix.sha256_size_limit", Value: func(c *settings) any { return &c.SHA256Limit }, Default: "1073741824", Doc: "Largest executable, in bytes, that is hashed for unix:sha256, which happens while an entry has that selector. 0: none is."},
}
