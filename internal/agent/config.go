// Package agent assembles a node's daemon from node, upstream, bundle, cache, renew,
// workload and metrics, with adapters between packages that do not import each other.
// The daemon, the demo and the tests of the whole agent use it.
package agent

import (
	"cmp"
	"context"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/attest"
	"github.com/renewd/renewd/internal/agent/attest/docker"
	"github.com/renewd/renewd/internal/agent/attest/kubernetes"
	"github.com/renewd/renewd/internal/agent/node"
	"github.com/renewd/renewd/renew"
	"github.com/renewd/renewd/renew/wave"
)

// Config is what an [Agent] needs. TrustDomain, ServerAddress, DataDir and one
// of the sources of trust are required; everything else has a default. The program that
// reads it from a file checks the values, so that it can name their places.
type Config struct {
	TrustDomain   spiffeid.TrustDomain
	ServerAddress string // host:port of the SPIRE Server API
	// ServerProxy is the HTTP proxy through which the server is reached, as
	// http://HOST:PORT. Nil: directly, whatever the environment says.
	ServerProxy *url.URL

	// The first connection trusts exactly one of these. A restart with a stored
	// agent SVID trusts the stored bundle instead.
	TrustBundleFile   string         // PEM or SPIFFE JSON
	TrustSource       TrustSource    // such as a [bootstrap.URL]
	TrustBundle       *bundle.Bundle // as it is
	InsecureBootstrap bool           // trust the first server that answers

	// Rebootstrap says whether TrustBundleFile or TrustSource is asked again when the
	// bundle in force has not verified the server for RebootstrapDelay; never when empty,
	// and 10 minutes when zero.
	Rebootstrap      Rebootstrap
	RebootstrapDelay time.Duration

	// Attestor attests the node. Without it JoinToken or JoinTokenFile does. None is
	// needed while DataDir has a valid agent SVID.
	Attestor                 node.Attestor
	JoinToken, JoinTokenFile string

	// DataDir stores the agent SVID with its key, and the bundles.
	DataDir string
	// RuntimeDir stores workload SVIDs with their keys; it must be on a memory file
	// system. Empty means that a restarted agent mints all SVIDs again.
	RuntimeDir string

	SocketPath string // of the Workload API; ignored when Listener is set
	SocketMode fs.FileMode
	// Options of the unix workload attestor.
	DiscoverPath bool  // add selectors unix:path and unix:sha256
	SHA256Limit  int64 // largest program to hash, in bytes; 0 means no unix:sha256

	// Kubernetes is for the attestor k8s. Nil: it is not used.
	Kubernetes *kubernetes.Config
	// Docker and SystemdSocket, the path of the system bus's socket, are for the
	// attestors of these names. Empty: they are not used. Docker.Container is not needed.
	Docker        *docker.Config
	SystemdSocket string
	// LogSelectors are the types of selectors whose values may be logged, or prefixes.
	LogSelectors []string
	AdminSocket  string // empty means that it is not served

	MetricsAddress string // empty means no HTTP listener
	WebConfigFile  string // TLS and basic auth of the HTTP listener

	DeploymentName, Version string // labels of spirl_application_info
	// Hostname is what operators recognize the node by, in reports and metrics; that of
	// the operating system when empty.
	Hostname string

	// ReplaceTaintedJWT replaces a cached JWT-SVID of a tainted key when a workload
	// requests it. The cached one is still returned to that request.
	ReplaceTaintedJWT bool

	TaintDelay      time.Duration // the longest random delay after a taint
	TaintRate       int           // taint renewals a second
	RefreshInterval time.Duration // between bundle refreshes and entry syncs
	// EntryRemovalDelay is how long an entry is still served after it is missing
	// from the server's answers; 30 s when zero.
	EntryRemovalDelay time.Duration
	BatchSize         int
	KeyType           renew.KeyType
	CacheSize         int // soft limit of SVIDs without a stream

	Log *slog.Logger
	// Started is called once, when the listeners of the Workload API and the metrics
	// are open. Bundle, entries and SVIDs may arrive later.
	Started func()

	// Dial, Listener, Attestors, Peers, Life and Now replace the operating system's,
	// for an agent inside another process.
	Dial      func(ctx context.Context, address string) (net.Conn, error)
	Listener  net.Listener
	Attestors []attest.Attestor
	Peers     func(net.Conn) (*attest.Peer, error)
	Life      func(cache.Process) cache.Life
	Now       func() time.Time
}

// withDefaults sets the defaults of empty fields.
func (c Config) withDefaults() Config {
	c.KeyType = cmp.Or(c.KeyType, renew.ECP256)
	c.Hostname = hostname(c.Hostname)
	c.SocketPath = cmp.Or(c.SocketPath, "/run/renewd/agent.sock")
	c.SocketMode = cmp.Or(c.SocketMode, 0o777)
	c.RefreshInterval = cmp.Or(c.RefreshInterval, bundle.DefaultInterval)
	c.Rebootstrap = cmp.Or(c.Rebootstrap, RebootstrapNever)
	c.RebootstrapDelay = cmp.Or(c.RebootstrapDelay, 10*time.Minute)
	if c.Attestor == nil {
		c.Attestor = node.JoinToken(c.JoinToken, c.JoinTokenFile)
	}
	c.EntryRemovalDelay = cmp.Or(c.EntryRemovalDelay, 30*time.Second)
	c.TaintRate = cmp.Or(c.TaintRate, wave.DefaultRate)
	c.CacheSize = cmp.Or(c.CacheSize, cache.DefaultLimit)
	c.Log = cmp.Or(c.Log, slog.New(slog.DiscardHandler))
	if c.Life == nil {
		c.Life = attest.Life
	}
	if c.Started == nil {
		c.Started = func() {}
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return c
}

// maxHostname is the most characters in a hostname that the server accepts.
const maxHostname = 255

// hostname returns the hostname to report: the given one, or that of the operating system.
func hostname(name string) string {
	if name == "" {
		name, _ = os.Hostname() // without it the agent has only its ID
	}
	characters := []rune(strings.ToValidUTF8(name, "\uFFFD"))
	return string(characters[:min(len(characters), maxHostname)])
}
