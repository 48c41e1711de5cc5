package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"

	"github.com/renewd/renewd/internal/agent/node"
	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/config"
	"github.com/renewd/renewd/internal/listen"
	"github.com/renewd/renewd/internal/socket"
	"github.com/renewd/renewd/metrics"
	"github.com/renewd/renewd/renew"
)

// settings is the agent's whole configuration. Every field has one row in
// [fields], which names it in the file, as a flag and in the environment.
type settings struct {
	TrustDomain       spiffeid.TrustDomain
	ServerAddress     string
	ServerProxy       string
	DeploymentName    string
	TrustBundleFile   string
	TrustBundleURL    string
	TrustBundleCAFile string
	InsecureBootstrap bool
	Rebootstrap       string
	RebootstrapDelay  time.Duration
	JoinToken         string
	JoinTokenFile     string
	PSATCluster       string
	PSATTokenPath     string
	PSATAudience      string
	PoPKeyPath        string
	PoPCertPath       string
	PoPChainPath      string
	PoPEndpoint       string
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
	EntryRemovalDelay time.Duration
	BatchSize         int
	KeyType           string
	SVIDCacheSize     int
	JWTTainted        string
	DiscoverPath      bool
	SHA256Limit       int64
	DockerEnabled     bool
	DockerSocket      string
	PodmanSocket      string
	RootlessPodman    string
	SystemdEnabled    bool
	SystemdSocket     string
	KubernetesEnabled bool
	NodeName          string
	NodeNameEnv       string
	KubeletHost       string
	KubeletPort       int
	KubeletReadOnly   int
	KubeletCAFile     string
	KubeletUnverified bool
	KubeletToken      string
	KubeletCert       string
	KubeletKey        string
	PodPollAttempts   int
	PodPollInterval   time.Duration
	SkipContainer     bool
	NamespaceLabels   bool
	LogSelectors      []string
	AdminSocket       string
}

// The limits of values, which validate checks.
const (
	maxBatch      = renew.DefaultBatchSize // a server answers ResourceExhausted above it
	maxTaintDelay = time.Hour
	minRefresh    = time.Second
	maxRefresh    = 10 * time.Minute
	minRemoval    = time.Second
	maxRemoval    = time.Hour
)

// The values of jwt.tainted.
const (
	jwtServe   = "serve"
	jwtReplace = "replace"
)

var jwtTainted = []string{jwtServe, jwtReplace}

var keyTypes = []string{"ec-p256", "ec-p384", "rsa-2048"}

// checker collects the problems of the configuration.
type checker struct{ *config.Checker[settings] }

// validate reports every problem of the configuration.
func validate(shared *config.Checker[settings]) {
	c := checker{shared}
	c.identity()
	c.paths()
	c.renewal()
	c.attestation()
}

// probeMachine reports what the agent would find on this machine.
func probeMachine(ctx context.Context, getenv func(string) string, shared *config.Checker[settings]) {
	c := checker{shared}
	c.probeNode(ctx)
	c.probePaths()
	c.probeAttestors(ctx, getenv)
}

// identity checks the trust domain, the server and how agent and server authenticate
// each other.
func (c checker) identity() {
	if c.Origin("trust_domain") == "" {
		c.Missing("trust_domain", "is not set", "give the trust domain of the server, such as example.org")
	}
	if c.Origin("server_address") == "" {
		c.Missing("server_address", "is not set", "give the server's host and port, such as server.example.org:8081")
	} else if reason := config.BadAddress(c.Config.ServerAddress, true); reason != "" {
		c.Bad("server_address", reason, "write it as host:port, such as server.example.org:8081")
	}
	if _, err := parseProxy(c.Config.ServerProxy); err != nil {
		c.Bad("server_proxy", err.Error(), "write it as http://proxy.example.org:3128, environment or none")
	}
	c.trustBootstrap()
	c.nodeAttestation()
}

// paths checks directories, sockets and addresses.
func (c checker) paths() {
	if c.Config.RuntimeDir != "" {
		if filepath.Clean(c.Config.RuntimeDir) == filepath.Clean(c.Config.DataDir) {
			c.Bad("runtime_dir", "is the same as data_dir", "give it a directory of its own on a memory file system, or remove it")
		} else if reason := notInMemory(c.Config.RuntimeDir); reason != "" {
			c.Bad("runtime_dir", reason, "private keys are kept there: use a directory on tmpfs, such as one under /run, or remove it")
		}
	}
	for _, socket := range []struct{ field, path string }{{"socket_path", c.Config.SocketPath}, {"admin_socket_path", c.Config.AdminSocket}} {
		if n := len(socket.path); n > config.MaxSocketPath {
			c.Bad(socket.field, fmt.Sprintf("is %d bytes long, and the kernel takes at most %d", n, config.MaxSocketPath), "choose a shorter path")
		}
	}
	if n := len(c.Config.SocketPath); n <= config.MaxSocketPath && len(adminSocket(c.Config.AdminSocket, c.Config.SocketPath)) > config.MaxSocketPath {
		c.Bad("socket_path", fmt.Sprintf("is %d bytes long, too long for the admin socket beside it", n), "choose a shorter path, or set admin_socket_path")
	}
	if c.Config.AdminSocket != "" && filepath.Clean(c.Config.AdminSocket) == filepath.Clean(c.Config.SocketPath) {
		c.Bad("admin_socket_path", "is the same as socket_path", "give it a path of its own")
	}
	for _, private := range []struct{ field, dir string }{{"data_dir", c.Config.DataDir}, {"runtime_dir", c.Config.RuntimeDir}} {
		if private.dir != "" && inside(private.dir, c.Config.SocketPath) {
			c.Bad("socket_path", "is inside of "+private.field+", which only the agent may enter",
				"keep them apart, such as in /run/renewd/agent.sock and /run/renewd/svids")
		}
	}
	if c.Config.SocketMode&0o600 != 0o600 {
		c.Bad("socket_mode", "does not let its owner connect", "set at least 0600; 0777 lets every workload connect")
	}
	if reason := config.BadAddress(c.Config.MetricsAddress, false); reason != "" && c.Config.MetricsAddress != "" {
		c.Bad("metrics.address", reason, "write it as host:port, such as 127.0.0.1:9090")
	} else if c.Config.MetricsAddress == "" && c.Config.WebConfigFile != "" {
		c.Bad("metrics.web_config_file", "is of no use without metrics.address", "set metrics.address or remove it")
	}
	c.NotEmpty("data_dir", "socket_path")
	c.OneOf("log.format", "is not a format", cli.LogFormats)
}

// probePaths looks at the directories, sockets and addresses that the agent would open.
func (c checker) probePaths() {
	c.File("data_dir", node.CheckFolder(c.Config.DataDir), "")
	c.Listens("socket_path", socket.Check(c.Config.SocketPath))
	c.Listens("admin_socket_path", socket.Check(adminSocket(c.Config.AdminSocket, c.Config.SocketPath)))
	c.Listens("metrics.address", listen.Check(c.Config.MetricsAddress))
	if c.Config.WebConfigFile != "" {
		c.File("metrics.web_config_file", config.FileError(metrics.CheckWebConfig(c.Config.WebConfigFile)), "install it before the start")
	}
}

// adminSocket returns the path of the admin socket: the one that is set, or else one beside
// the Workload API's socket.
func adminSocket(set, workloadAPI string) string {
	if set != "" {
		return set
	}
	name, isSock := strings.CutSuffix(workloadAPI, ".sock")
	if !isSock {
		return name + "-admin"
	}
	return name + "-admin.sock"
}

// renewal checks the limits of the renewal policy and of the caches.
func (c checker) renewal() {
	if c.Config.TaintDelay < 0 || c.Config.TaintDelay > maxTaintDelay {
		c.Bad("renewal.taint_delay", "is not from 0s to "+config.Short(maxTaintDelay), "60s spreads a fleet over a minute")
	}
	if c.Config.TaintRate <= 0 {
		c.Bad("renewal.taint_rate", "would never renew anything", "set 1 or more renewals a second; 20 is usual")
	}
	if c.Config.RefreshInterval < minRefresh || c.Config.RefreshInterval > maxRefresh {
		c.Bad("renewal.refresh_interval", "is not from "+config.Short(minRefresh)+" to "+config.Short(maxRefresh), "5s is usual")
	}
	if c.Config.EntryRemovalDelay < minRemoval || c.Config.EntryRemovalDelay > maxRemoval {
		c.Bad("entry_removal_delay", "is not from "+config.Short(minRemoval)+" to "+config.Short(maxRemoval), "30s is usual")
	}
	if c.Config.BatchSize < 1 || c.Config.BatchSize > maxBatch {
		c.Bad("renewal.batch_size", fmt.Sprintf("is not from 1 to %d, the most that a server accepts", maxBatch), fmt.Sprintf("set %d or less", maxBatch))
	}
	c.OneOf("renewal.key_type", "is not a key type", keyTypes)
	c.OneOf("jwt.tainted", "is not one of the two", jwtTainted)
	if c.Config.SVIDCacheSize < 1 {
		c.Bad("svid_cache_size", "keeps nothing", "set 1 or more; 1000 is usual")
	}
	if c.Config.SHA256Limit < 0 {
		c.Bad("unix.sha256_size_limit", "is negative", "give a number of bytes, or 0 to hash none")
	}
}

// inside reports whether path is below dir.
func inside(dir, path string) bool {
	dir, dirErr := filepath.Abs(dir)
	path, pathErr := filepath.Abs(path)
	rel, err := filepath.Rel(dir, path)
	return errors.Join(dirErr, pathErr, err) == nil && filepath.IsLocal(rel)
}

// notInMemory returns "" if dir is on a memory file system, and the reason if not. For
// a directory that does not exist it checks the nearest parent that does.
func notInMemory(dir string) string {
	for {
		var st unix.Statfs_t
		err := unix.Statfs(dir, &st)
		switch {
		case errors.Is(err, unix.ENOENT) && filepath.Dir(dir) != dir:
			dir = filepath.Dir(dir)
			continue
		case err != nil:
			return "cannot be checked: " + err.Error()
		case st.Type == unix.TMPFS_MAGIC || st.Type == unix.RAMFS_MAGIC:
			return ""
		}
		return "is not on a memory file system"
	}
}
