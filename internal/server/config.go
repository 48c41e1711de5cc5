// Package server puts the signing side of one trust domain together: the
// store, and for each deployment its keysets, entries, agents, ledger and
// automatic rotation, behind the SPIRE Server API; over all of them the
// operators' API, the bundle endpoint and the metrics. The server command, the
// demo and the whole-system tests run this same assembly.
//
// The deployments of a trust domain sign with keysets of their own, rotated
// each on its own, and trust each other: the published trust bundle is the union
// of all their authorities.
package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/renewd/renewd/internal/server/federation"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/rotation"
)

// Config is what a [Domain] needs. TrustDomain is required; everything else
// has a default.
type Config struct {
	TrustDomain spiffeid.TrustDomain

	// DataDir keeps the store over a restart; empty means that everything ends
	// with the process.
	DataDir string
	// KeyFile holds the key that signing keys are encrypted under; empty means
	// the systemd credential renewd-store-key ([seal.CredentialName]). Not used
	// without DataDir.
	KeyFile string

	// Deployments are those that are served; one, named default, when empty.
	Deployments []DeploymentConfig

	// AdminSocket is the path of the operators' Unix socket; empty means none.
	AdminSocket     string
	AdminSocketMode fs.FileMode // 0660 when zero
	// OperatorAddress is host:port for operators over mTLS; empty means none.
	OperatorAddress string
	// Managers and Readers say who may; see package admin. Root and the
	// server's own user are managers when both are empty.
	Managers, Readers []string

	// EndpointAddress is host:port of the SPIFFE bundle endpoint; empty means
	// none. EndpointProfile is https_spiffe (the default) or https_web, which
	// needs certificate and key files.
	EndpointAddress, EndpointProfile  string
	EndpointCertFile, EndpointKeyFile string
	// EndpointListener is used in the place of EndpointAddress when set; it belongs
	// to the Domain from a successful [Open] on.
	EndpointListener net.Listener

	// Federation are the bundle endpoints of other trust domains that are
	// followed; see [federation.Check].
	Federation []federation.Endpoint

	// RefreshHint tells relying parties and agents how often to ask for the
	// bundle, in whole seconds; no hint when zero.
	RefreshHint time.Duration

	MetricsAddress string // empty means no HTTP listener
	WebConfigFile  string // TLS and basic auth of the HTTP listener

	// KeysetLifetime is how long a keyset lives; 90 days when zero. X509TTL and
	// JWTTTL are the lifetimes of SVIDs whose entry names none; 24 hours when
	// zero.
	KeysetLifetime, X509TTL, JWTTTL time.Duration

	// Rotation says when keysets are rotated by themselves.
	Rotation rotation.Policy

	Version string
	Log     *slog.Logger
	// Started is called once, when all addresses and sockets are listened on.
	Started func()

	// ServerOptions are added to the gRPC server of every deployment, and Now and
	// Uptime replace the wall clock and the monotonic one, for running inside another
	// process.
	ServerOptions []grpc.ServerOption
	Now           func() time.Time
	Uptime        func() time.Duration
	// FederationDial connects to the endpoints of Federation.
	FederationDial func(ctx context.Context, network, address string) (net.Conn, error)
}

// DeploymentConfig is a deployment that is served.
type DeploymentConfig struct {
	Name string
	// ListenAddress is host:port for agents; ignored when Listener is set. A
	// listener belongs to the Domain from a successful [Open] on.
	ListenAddress string
	Listener      net.Listener
}

// serves reports whether the deployment has agents. One that only the store
// knows has none.
func (c DeploymentConfig) serves() bool { return c.ListenAddress != "" || c.Listener != nil }

// The profiles of the bundle endpoint (SPIFFE Federation, section 5.2).
const (
	ProfileSPIFFE = federation.ProfileSPIFFE
	ProfileWeb    = federation.ProfileWeb
)

// withDefaults checks the configuration and fills in what is left open. The
// errors name the field and the remedy.
func (c Config) withDefaults() (Config, error) {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.TrustDomain.IsZero() {
		fail("trust_domain is not set: give the name of the SPIFFE trust domain, such as example.org")
	}
	if len(c.Deployments) == 0 {
		c.Deployments = []DeploymentConfig{{Name: DefaultDeployment, ListenAddress: "0.0.0.0:8081"}}
	}
	c.Deployments = slices.Clone(c.Deployments)
	seen := map[string]bool{}
	for i, d := range c.Deployments {
		switch {
		case d.Name == "":
			fail("deployments[%d] has no name: give one", i)
		case seen[d.Name]:
			fail("deployments.%s is given twice: give each deployment a name of its own", d.Name)
		case !d.serves():
			fail("deployments.%s.listen_address is not set: give host:port for its agents", d.Name)
		}
		seen[d.Name] = true
	}
	if c.AdminSocketMode == 0 {
		c.AdminSocketMode = 0o660
	}
	if c.KeysetLifetime == 0 {
		c.KeysetLifetime = keyset.DefaultLifetime
	}
	if c.EndpointProfile == "" {
		c.EndpointProfile = ProfileSPIFFE
	}
	switch c.EndpointProfile {
	case ProfileSPIFFE:
		if c.EndpointCertFile != "" || c.EndpointKeyFile != "" {
			fail("bundle_endpoint.cert_file and key_file are of no use with profile %s: remove them or use %s", ProfileSPIFFE, ProfileWeb)
		}
	case ProfileWeb:
		if c.EndpointCertFile == "" || c.EndpointKeyFile == "" {
			fail("bundle_endpoint.profile is %s: give cert_file and key_file", ProfileWeb)
		}
	default:
		fail("bundle_endpoint.profile is %q: use %s or %s", c.EndpointProfile, ProfileSPIFFE, ProfileWeb)
	}
	if err := federation.Check(c.TrustDomain, c.Federation); err != nil {
		errs = append(errs, err)
	}
	if c.RefreshHint < 0 || c.RefreshHint%time.Second != 0 {
		fail("bundle_endpoint.refresh_hint is %v: give whole seconds", c.RefreshHint)
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return c, errors.Join(errs...)
}

// DefaultDeployment is the name of a deployment that nobody named.
const DefaultDeployment = "default"
