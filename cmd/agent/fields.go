package main

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// field is one row of the configuration: one place where its names, its
// default and its meaning are written.
type field struct {
	path   string            // in the file; a dot is a section
	value  func(*config) any // a pointer to the field
	def    string            // the default, in the same syntax as in the file
	secret bool              // never printed, and no flag: flags are visible to every process
	doc    string            // one line
}

// fields is the whole configuration, in the order in which it is documented.
var fields = []field{
	{path: "trust_domain", value: func(c *config) any { return &c.TrustDomain }, doc: "Trust domain of this node. Required."},
	{path: "server_address", value: func(c *config) any { return &c.ServerAddress }, doc: "Host and port of the server. Required."},
	{path: "deployment_name", value: func(c *config) any { return &c.DeploymentName }, doc: "Deployment whose keysets sign for this node; a label of spirl_application_info."},
	{path: "trust_bundle_file", value: func(c *config) any { return &c.TrustBundleFile }, doc: "Trust bundle that authenticates the server at the first start, PEM or SPIFFE JSON."},
	{path: "insecure_bootstrap", value: func(c *config) any { return &c.InsecureBootstrap }, def: "false", doc: "Trust whichever server answers at the first start. Instead of trust_bundle_file, for trying out."},
	{path: "join_token", value: func(c *config) any { return &c.JoinToken }, secret: true, doc: "Join token that proves the node at the first start."},
	{path: "join_token_file", value: func(c *config) any { return &c.JoinTokenFile }, doc: "File that holds the join token, read anew at each attempt. Instead of join_token."},
	{path: "data_dir", value: func(c *config) any { return &c.DataDir }, def: "/var/lib/renewd", doc: "Directory for the agent's own key and SVID and the last bundle, so that a restart needs no new token."},
	{path: "runtime_dir", value: func(c *config) any { return &c.RuntimeDir }, doc: "Directory on a memory file system where workload SVIDs and keys survive a restart of the agent. They are kept in memory alone when not set."},
	{path: "socket_path", value: func(c *config) any { return &c.SocketPath }, def: "/run/renewd/agent.sock", doc: "Unix socket of the Workload API."},
	{path: "socket_mode", value: func(c *config) any { return &c.SocketMode }, def: "0777", doc: "Permissions of the socket. Callers are told apart by who they are, not by this."},
	{path: "log.level", value: func(c *config) any { return &c.LogLevel }, def: "info", doc: "debug, info, warn or error."},
	{path: "log.format", value: func(c *config) any { return &c.LogFormat }, def: "auto", doc: "text, json, or auto: text on a terminal and JSON otherwise."},
	{path: "metrics.address", value: func(c *config) any { return &c.MetricsAddress }, def: "127.0.0.1:9090", doc: "Where /metrics, /live and /ready are served. Empty: nowhere."},
	{path: "metrics.web_config_file", value: func(c *config) any { return &c.WebConfigFile }, doc: "Prometheus exporter web configuration file that turns on TLS and basic auth there."},
	{path: "renewal.taint_delay", value: func(c *config) any { return &c.TaintDelay }, def: "60s", doc: "Upper end of the random delay before SVIDs of a tainted authority are renewed."},
	{path: "renewal.taint_rate", value: func(c *config) any { return &c.TaintRate }, def: "20", doc: "Most renewals a second because of a taint."},
	{path: "renewal.refresh_interval", value: func(c *config) any { return &c.RefreshInterval }, def: "5s", doc: "Time between polls of the bundle and of the entries."},
	{path: "renewal.batch_size", value: func(c *config) any { return &c.BatchSize }, def: "500", doc: "Most SVIDs asked for in one call."},
	{path: "renewal.key_type", value: func(c *config) any { return &c.KeyType }, def: "ec-p256", doc: "Keys of the SVIDs: ec-p256, ec-p384 or rsa-2048."},
	{path: "svid_cache_size", value: func(c *config) any { return &c.SVIDCacheSize }, def: "1000", doc: "SVIDs kept for workloads that are not connected. Soft: those with an open stream are always kept."},
	{path: "unix.discover_path", value: func(c *config) any { return &c.DiscoverPath }, def: "true", doc: "Give the selectors unix:path and unix:sha256, which need access to the caller's executable."},
	{path: "unix.sha256_size_limit", value: func(c *config) any { return &c.SHA256Limit }, def: "1073741824", doc: "Largest executable, in bytes, that is hashed for unix:sha256. 0: none is."},
}

func fieldByPath(path string) *field {
	if i := fieldIndex(path); i >= 0 {
		return &fields[i]
	}
	return nil
}

func fieldIndex(path string) int {
	return slices.IndexFunc(fields, func(f field) bool { return f.path == path })
}

// flag is the field's flag without the dash, or "" when it has none.
func (f *field) flag() string {
	if f.secret {
		return ""
	}
	return strings.NewReplacer(".", "-", "_", "-").Replace(f.path)
}

// env is the field's environment variable.
func (f *field) env() string {
	return "RENEWD_" + strings.ToUpper(strings.ReplaceAll(f.path, ".", "_"))
}

// kind is the type of the field's value as an operator would call it.
func (f *field) kind() string {
	switch f.value(new(config)).(type) {
	case *bool:
		return "true or false"
	case *int, *int64:
		return "whole number"
	case *time.Duration:
		return "duration"
	case *fs.FileMode:
		return "octal mode"
	case *slog.Level:
		return "level"
	default:
		return "text"
	}
}

// parse stores text in cfg. The error says what text should be and does not
// repeat it.
func (f *field) parse(cfg *config, text string) error {
	var err error
	switch p := f.value(cfg).(type) {
	case *string:
		*p = text
	case *bool:
		if text != "true" && text != "false" {
			return errors.New("is neither true nor false")
		}
		*p = text == "true"
	case *int:
		if *p, err = strconv.Atoi(text); err != nil {
			return errors.New("is not a whole number")
		}
	case *int64:
		if *p, err = strconv.ParseInt(text, 10, 64); err != nil {
			return errors.New("is not a whole number")
		}
	case *time.Duration:
		if *p, err = time.ParseDuration(text); err != nil {
			return errors.New("is not a duration such as 500ms, 60s or 5m")
		}
	case *fs.FileMode:
		n, err := strconv.ParseUint(text, 8, 32)
		if err != nil || n > 0o777 {
			return errors.New("is not an octal mode such as 0770")
		}
		*p = fs.FileMode(n)
	case *slog.Level:
		levels := map[string]slog.Level{"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError}
		level, ok := levels[text]
		if !ok {
			return errors.New("is not debug, info, warn or error")
		}
		*p = level
	case *spiffeid.TrustDomain:
		if *p, err = spiffeid.TrustDomainFromString(text); err != nil {
			return errors.New("is not a trust domain such as example.org")
		}
	default:
		panic(fmt.Sprintf("field %s has type %T", f.path, p))
	}
	return nil
}

// show prints the field's value, or nothing of a secret.
func (f *field) show(cfg *config) string {
	if f.secret {
		return ""
	}
	switch p := f.value(cfg).(type) {
	case *string:
		return strconv.Quote(*p)
	case *bool:
		return strconv.FormatBool(*p)
	case *int:
		return strconv.Itoa(*p)
	case *int64:
		return strconv.FormatInt(*p, 10)
	case *time.Duration:
		return short(*p)
	case *fs.FileMode:
		return fmt.Sprintf("%04o", *p)
	case *slog.Level:
		return strings.ToLower(p.String())
	case *spiffeid.TrustDomain:
		return p.Name()
	}
	return ""
}

// defaults returns the configuration of an agent that nobody told anything.
func defaults() *config {
	cfg := new(config)
	for i := range fields {
		if f := &fields[i]; f.def != "" {
			if err := f.parse(cfg, f.def); err != nil {
				panic(fmt.Sprintf("default of %s %v", f.path, err))
			}
		}
	}
	return cfg
}
