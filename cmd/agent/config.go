package main

import (
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// config is the agent's whole configuration. Every field has one row in
// [fields], which names it in the file, as a flag and in the environment.
type config struct {
	TrustDomain       spiffeid.TrustDomain
	ServerAddress     string
	DeploymentName    string
	TrustBundleFile   string
	InsecureBootstrap bool
	JoinToken         string
	JoinTokenFile     string
	DataDir           string
	RuntimeDir        string
	SocketPath        string
	SocketMode        fs.FileMode
	LogLevel          slog.Level
	LogFormat         string
	MetricsAddress    string
	WebConfigFile     string
	TaintDelay        time.Duration
	TaintRate         int
	RefreshInterval   time.Duration
	BatchSize         int
	KeyType           string
	SVIDCacheSize     int
	DiscoverPath      bool
	SHA256Limit       int64
}

// The limits that validate holds the values to.
const (
	maxBatch        = 500 // a server answers ResourceExhausted above it
	maxTaintDelay   = time.Hour
	minRefresh      = time.Second
	maxRefresh      = 10 * time.Minute
	maxSocketLength = 107 // sun_path of unix(7) without its closing NUL
)

var (
	keyTypes   = []string{"ec-p256", "ec-p384", "rsa-2048"}
	logFormats = []string{"auto", "text", "json"}
)

// checker collects what is wrong with a config, each problem with the place
// its value came from.
type checker struct {
	cfg     *config
	origins map[string]string // where a field was set, by path; absent: the default
	out     []problem
}

// add reports the value of the field at path.
func (c *checker) add(path, what, remedy string) {
	f := fieldByPath(path)
	c.out = append(c.out, problem{
		where: c.origins[path], path: path, value: f.show(c.cfg), what: what, remedy: remedy,
	})
}

// missing reports a field that has no value and needs one. file is where the
// rest of the configuration comes from, and may be empty.
func (c *checker) missing(file, path, what, remedy string) {
	c.out = append(c.out, problem{where: file, path: path, what: what, remedy: remedy})
}

func (c *checker) set(path string) bool { return c.origins[path] != "" }

// validate reports everything about cfg that cannot work, in the order of
// [fields]. file names the configuration file for what is missing.
func validate(cfg *config, origins map[string]string, file string) []problem {
	c := &checker{cfg: cfg, origins: origins}
	c.identity(file)
	c.places()
	c.renewal()
	slices.SortStableFunc(c.out, func(a, b problem) int { return fieldIndex(a.path) - fieldIndex(b.path) })
	return c.out
}

// identity checks who the agent is, whom it trusts and how it proves its node.
func (c *checker) identity(file string) {
	if !c.set("trust_domain") {
		c.missing(file, "trust_domain", "is not set", "give the trust domain of the server, such as example.org")
	}
	if !c.set("server_address") {
		c.missing(file, "server_address", "is not set", "give the server's host and port, such as server.example.org:8081")
	} else if reason := badAddress(c.cfg.ServerAddress, true); reason != "" {
		c.add("server_address", reason, "write it as host:port, such as server.example.org:8081")
	}
	switch {
	case c.cfg.TrustBundleFile != "" && c.cfg.InsecureBootstrap:
		c.add("insecure_bootstrap", "contradicts trust_bundle_file ("+c.origins["trust_bundle_file"]+")",
			"remove insecure_bootstrap: with a bundle file the first connection is authenticated")
	case c.cfg.TrustBundleFile == "" && !c.cfg.InsecureBootstrap:
		c.missing(file, "trust_bundle_file", "is not set, so the server cannot be authenticated",
			"give the server's trust bundle (PEM or SPIFFE JSON), or set insecure_bootstrap: true to trust the first server that answers")
	}
	if c.cfg.JoinToken != "" && c.cfg.JoinTokenFile != "" {
		c.add("join_token", "contradicts join_token_file ("+c.origins["join_token_file"]+")", "keep one of the two")
	}
	if strings.ContainsAny(c.cfg.JoinToken, " \t\r\n") {
		c.add("join_token", "contains white space", "give the token alone, as the server printed it")
	}
}

// places checks directories, sockets and addresses.
func (c *checker) places() {
	if c.cfg.RuntimeDir != "" {
		if filepath.Clean(c.cfg.RuntimeDir) == filepath.Clean(c.cfg.DataDir) {
			c.add("runtime_dir", "is the same as data_dir", "give it a directory of its own on a memory file system, or remove it")
		} else if reason := notInMemory(c.cfg.RuntimeDir); reason != "" {
			c.add("runtime_dir", reason, "private keys are kept there: use a directory on tmpfs, such as one under /run, or remove it")
		}
	}
	if n := len(c.cfg.SocketPath); n > maxSocketLength {
		c.add("socket_path", fmt.Sprintf("is %d bytes long, and the kernel takes at most %d", n, maxSocketLength), "choose a shorter path")
	}
	if c.cfg.SocketMode&0o600 != 0o600 {
		c.add("socket_mode", "does not let its owner connect", "set at least 0600; 0777 lets every workload connect")
	}
	if reason := badAddress(c.cfg.MetricsAddress, false); reason != "" && c.cfg.MetricsAddress != "" {
		c.add("metrics.address", reason, "write it as host:port, such as 127.0.0.1:9090")
	} else if c.cfg.MetricsAddress == "" && c.cfg.WebConfigFile != "" {
		c.add("metrics.web_config_file", "is of no use without metrics.address", "set metrics.address or remove it")
	}
	for _, path := range []string{"data_dir", "socket_path"} {
		if f := fieldByPath(path); *f.value(c.cfg).(*string) == "" {
			c.add(path, "is empty", "remove it for the default, "+f.def)
		}
	}
	if !slices.Contains(logFormats, c.cfg.LogFormat) {
		c.add("log.format", "is not a format", "use "+oneOf(logFormats))
	}
}

// renewal checks the figures of the renewal policy and of the caches.
func (c *checker) renewal() {
	if c.cfg.TaintDelay < 0 || c.cfg.TaintDelay > maxTaintDelay {
		c.add("renewal.taint_delay", "is not from 0s to "+short(maxTaintDelay), "60s spreads a fleet over a minute")
	}
	if c.cfg.TaintRate <= 0 {
		c.add("renewal.taint_rate", "would never renew anything", "set 1 or more renewals a second; 20 is usual")
	}
	if c.cfg.RefreshInterval < minRefresh || c.cfg.RefreshInterval > maxRefresh {
		c.add("renewal.refresh_interval", "is not from "+short(minRefresh)+" to "+short(maxRefresh), "5s is usual")
	}
	if c.cfg.BatchSize < 1 || c.cfg.BatchSize > maxBatch {
		c.add("renewal.batch_size", fmt.Sprintf("is not from 1 to %d, the most that a server accepts", maxBatch), fmt.Sprintf("set %d or less", maxBatch))
	}
	if !slices.Contains(keyTypes, c.cfg.KeyType) {
		c.add("renewal.key_type", "is not a key type", "use "+oneOf(keyTypes))
	}
	if c.cfg.SVIDCacheSize < 1 {
		c.add("svid_cache_size", "keeps nothing", "set 1 or more; 1000 is usual")
	}
	if c.cfg.SHA256Limit < 0 {
		c.add("unix.sha256_size_limit", "is negative", "give a number of bytes, or 0 to hash none")
	}
}

// badAddress says what is wrong with a host:port, or "". A server to connect
// to needs a host; a listener may leave it out.
func badAddress(s string, needHost bool) string {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return "is not host:port"
	}
	if host == "" && needHost {
		return "has no host"
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || (n == 0 && needHost) {
		return "has no valid port"
	}
	return ""
}

func oneOf(values []string) string {
	last := len(values) - 1
	return strings.Join(values[:last], ", ") + " or " + values[last]
}

// short prints a duration without its zero parts: 1m, not 1m0s.
func short(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}
