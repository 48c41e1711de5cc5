// Package agent puts the rooms of the house together: node, upstream, bundle,
// cache, renew, workload and metrics, with the adapters between packages that
// must not know each other. The daemon, the demo and the whole-agent drills
// all run this same assembly.
package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/attest"
	"github.com/renewd/renewd/renew"
	"github.com/renewd/renewd/renew/wave"
)

// Config is what an [Agent] needs. TrustDomain, ServerAddress, DataDir and one
// of the sources of trust are required; everything else has a default.
type Config struct {
	TrustDomain   spiffeid.TrustDomain
	ServerAddress string // host:port of the SPIRE Server API
	// ServerProxy is the HTTP proxy through which the server is reached, as
	// http://HOST:PORT. Nil: directly, whatever the environment says.
	ServerProxy *url.URL

	// Trust in the server comes from a bundle that was kept from the last run
	// together with a still valid own SVID, else from exactly one of these.
	TrustBundleFile   string         // PEM or SPIFFE JSON
	TrustBundle       *bundle.Bundle // given directly
	InsecureBootstrap bool           // taken from whoever answers first

	// JoinToken or JoinTokenFile proves the node; not needed while the own
	// SVID in DataDir is valid.
	JoinToken, JoinTokenFile string

	// DataDir keeps key, own SVID and bundle over a restart.
	DataDir string
	// RuntimeDir keeps workload SVIDs and keys over a restart; it must be on a
	// memory file system. Empty means that they are minted anew.
	RuntimeDir string

	SocketPath string // of the Workload API; ignored when Listener is set
	SocketMode fs.FileMode
	// Options of the unix workload attestor.
	DiscoverPath bool  // give unix:path and unix:sha256
	SHA256Limit  int64 // hash programs up to this many bytes; 0 means no unix:sha256

	MetricsAddress string // empty means no HTTP listener
	WebConfigFile  string // TLS and basic auth of the HTTP listener

	DeploymentName, Version string // labels of spirl_application_info

	// ReplaceTaintedJWT has a JWT-SVID of a tainted key that is held minted again
	// when a workload asks for it. It is handed out meanwhile.
	ReplaceTaintedJWT bool

	TaintDelay      time.Duration // the most random delay after a taint
	TaintRate       int           // taint renewals a second
	RefreshInterval time.Duration // between bundle refreshes and entry syncs
	// EntryRemovalDelay is how long an entry that is missing from the server's
	// answers is served; 30 s when zero.
	EntryRemovalDelay time.Duration
	BatchSize         int
	KeyType           renew.KeyType
	CacheSize         int // soft limit of SVIDs that nobody streams

	Log *slog.Logger
	// Started is called once, when the Workload API and the metrics are listened
	// on. Bundle, entries and SVIDs may still be under way.
	Started func()

	// Dial, Listener, Attestors, Peers, Life and Now replace
	// what the operating system gives, for running inside another process.
	Dial      func(ctx context.Context, address string) (net.Conn, error)
	Listener  net.Listener
	Attestors []attest.Attestor
	Peers     func(net.Conn) (*attest.Peer, error)
	Life      func(cache.Process) cache.Life
	Now       func() time.Time
}

// DefaultSocketPath is where workloads find the Workload API.
const DefaultSocketPath = "/run/renewd/agent.sock"

// withDefaults checks the configuration and fills in what is left open. The
// errors name the field and the remedy.
func (c Config) withDefaults() (Config, error) {
	var errs []error
	if c.TrustDomain.IsZero() {
		errs = append(errs, errors.New("trust_domain is not set: give the name of the SPIFFE trust domain, such as example.org"))
	}
	if c.ServerAddress == "" {
		errs = append(errs, errors.New("server_address is not set: give host:port of the server"))
	}
	if c.DataDir == "" {
		errs = append(errs, errors.New("data_dir is not set: give a folder that survives a restart"))
	}
	sources := 0
	for _, set := range []bool{c.TrustBundleFile != "", c.TrustBundle != nil, c.InsecureBootstrap} {
		if set {
			sources++
		}
	}
	if sources != 1 {
		errs = append(errs, errors.New("trust in the server needs exactly one of trust_bundle_file and insecure_bootstrap"))
	}
	if c.KeyType == "" {
		c.KeyType = renew.ECP256
	}
	if !slices.Contains(renew.KeyTypes, c.KeyType) {
		errs = append(errs, fmt.Errorf("key_type is %q: use one of %v", c.KeyType, renew.KeyTypes))
	}
	if c.BatchSize < 0 || c.BatchSize > renew.DefaultBatchSize {
		errs = append(errs, fmt.Errorf("batch_size is %d: use 1 to %d, which is the server's limit", c.BatchSize, renew.DefaultBatchSize))
	}
	if c.TaintDelay < 0 || c.TaintRate < 0 || c.RefreshInterval < 0 || c.EntryRemovalDelay < 0 || c.CacheSize < 0 {
		errs = append(errs, errors.New("taint_delay, taint_rate, refresh_interval, entry_removal_delay and svid_cache_size must not be negative"))
	}
	if c.SocketPath == "" {
		c.SocketPath = DefaultSocketPath
	}
	if c.SocketMode == 0 {
		c.SocketMode = 0o777
	}
	if c.RefreshInterval == 0 {
		c.RefreshInterval = bundle.DefaultInterval
	}
	if c.EntryRemovalDelay == 0 {
		c.EntryRemovalDelay = 30 * time.Second
	}
	if c.TaintRate == 0 {
		c.TaintRate = wave.DefaultRate
	}
	if c.CacheSize == 0 {
		c.CacheSize = cache.DefaultLimit
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Life == nil {
		c.Life = attest.Life
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return c, errors.Join(errs...)
}
