package main

import "github.com/renewd/renewd/internal/config"

// schema describes how the configuration is written, checked and documented.
var schema = config.Schema[settings]{Fields: fields, Env: "RENEWD_", Help: "agent help config", Check: validate}

// fields are all fields of the configuration in the order of their documentation.
var fields = []config.Field[settings]{
	{Path: "trust_domain", Value: func(c *settings) any { return &c.TrustDomain }, Doc: "Trust domain of this node. Required."},
	{Path: "server_address", Value: func(c *settings) any { return &c.ServerAddress }, Doc: "Host and port of the server. Required."},
	{Path: "server_proxy", Value: func(c *settings) any { return &c.ServerProxy }, Secret: true, Doc: "HTTP proxy for the connection to the server, by CONNECT: http://HOST:PORT, with USER:PASSWORD@ before HOST if it requires them; environment to use HTTPS_PROXY and NO_PROXY; none for no proxy. If it is not set there is no proxy, with one log line if HTTPS_PROXY is set."},
	{Path: "deployment_name", Value: func(c *settings) any { return &c.DeploymentName }, Doc: "Deployment whose keysets sign for this node; a label of spirl_application_info."},
	{Path: "trust_bundle_file", Value: func(c *settings) any { return &c.TrustBundleFile }, Doc: "Trust bundle that authenticates the server at the first start, PEM or SPIFFE JSON. Later the agent uses only authorities that are new in it, and only if it cannot authenticate the server otherwise."},
	{Path: "insecure_bootstrap", Value: func(c *settings) any { return &c.InsecureBootstrap }, Default: "false", Doc: "Trust any server that answers at the first start. Instead of trust_bundle_file, for tests."},
	{Path: "join_token", Value: func(c *settings) any { return &c.JoinToken }, Secret: true, Doc: "Join token that attests the node at the first start."},
	{Path: "join_token_file", Value: func(c *settings) any { return &c.JoinTokenFile }, Doc: "File with the join token, reloaded at each attempt. Instead of join_token."},
	{Path: "data_dir", Value: func(c *settings) any { return &c.DataDir }, Default: "/var/lib/renewd", Doc: "Directory for the agent SVID, its key and the last bundle, so that a restart needs no new token."},
	{Path: "runtime_dir", Value: func(c *settings) any { return &c.RuntimeDir }, Doc: "Directory on a memory file system. With it workload SVIDs, their keys and the record of the processes that use them survive a restart of the agent. Without it they are in the agent's memory only, and a restarted agent waits three minutes for the workloads before it reports settled."},
	{Path: "socket_path", Value: func(c *settings) any { return &c.SocketPath }, Default: "/run/renewd/agent.sock", Doc: "Unix socket of the Workload API."},
	{Path: "socket_mode", Value: func(c *settings) any { return &c.SocketMode }, Default: "0777", Doc: "Permissions of the socket. The agent attests each caller in any case."},
	{Path: "admin_socket_path", Value: func(c *settings) any { return &c.AdminSocket }, Doc: "Unix socket for agent attest, for root and the agent's own user. If it is not set, it is beside socket_path, with a name like agent-admin.sock."},
	{Path: "log.level", Value: func(c *settings) any { return &c.LogLevel }, Default: "info", Doc: "debug, info, warn or error."},
	{Path: "log.format", Value: func(c *settings) any { return &c.LogFormat }, Default: "auto", Doc: "text, json, or auto: text on a terminal and JSON otherwise."},
	{Path: "log_selectors", Value: func(c *settings) any { return &c.LogSelectors }, Default: "unix", Doc: "Types of selectors whose values may be logged, or prefixes such as docker:label. Of others the log has the type only: labels and variables may be secrets."},
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
	{Path: "workload_attestation.docker.enabled", Value: func(c *settings) any { return &c.DockerEnabled }, Default: "false", Doc: "Provide docker selectors of containers of Docker Engine and Podman."},
	{Path: "workload_attestation.docker.socket_path", Value: func(c *settings) any { return &c.DockerSocket }, Default: "/var/run/docker.sock", Doc: "Socket of Docker Engine."},
	{Path: "workload_attestation.docker.podman_socket_path", Value: func(c *settings) any { return &c.PodmanSocket }, Default: "/run/podman/podman.sock", Doc: "Socket of Podman as root."},
	{Path: "workload_attestation.docker.rootless_podman_socket_path", Value: func(c *settings) any { return &c.RootlessPodman }, Doc: "Socket of a user's Podman, with %d for the user ID, such as /run/user/%d/podman/podman.sock. With it any user can give a process any docker selector: every entry with docker selectors should name the user, too. Empty: no selectors for rootless containers."},
	{Path: "workload_attestation.systemd.enabled", Value: func(c *settings) any { return &c.SystemdEnabled }, Default: "false", Doc: "Provide systemd selectors: the unit of the process."},
	{Path: "workload_attestation.systemd.socket_path", Value: func(c *settings) any { return &c.SystemdSocket }, Default: "/run/dbus/system_bus_socket", Doc: "Socket of the system bus (D-Bus)."},
}
