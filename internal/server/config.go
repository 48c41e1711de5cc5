// Package server assembles the signing side of one trust domain. It has one store.
// Each deployment has its own keysets, entries, agents, ledger and automatic rotation,
// served over the SPIRE Server API. The operators' API, the bundle endpoint and the
// metrics cover all deployments. The server command, the demo and the system tests
// run this same assembly.
//
// Each deployment signs with its own keysets and rotates them independently.
// The deployments trust each other: the published trust bundle is the union of all
// their authorities.
package server

import (
	"cmp"
	"context"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/renewd/renewd/internal/server/federation"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/nodeattest/k8spsat"
	"github.com/renewd/renewd/internal/server/nodeattest/x509pop"
	"github.com/renewd/renewd/internal/server/rotation"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// Config configures a [Domain]. Only TrustDomain is required. The program that reads it
// from a file checks the values, so that it can name their places.
type Config struct {
	TrustDomain spiffeid.TrustDomain

	// DataDir is the folder of the store. If empty, the store is temporary and ends with
	// the Domain.
	DataDir string
	// KeyFile holds the key that encrypts the signing keys; empty means
	// the systemd credential renewd-store-key ([seal.CredentialName]). Not used
	// without DataDir.
	KeyFile string

	// Deployments are the deployments to serve; one named default when empty.
	Deployments []DeploymentConfig

	// AdminSocket is the path of the operators' Unix socket; empty means none.
	AdminSocket     string
	AdminSocketMode fs.FileMode // 0660 when zero
	// OperatorAddress is host:port for operators over mTLS; empty means none.
	OperatorAddress string
	// Managers and Readers are the rules that grant operators access; see package
	// admin. Root and the server's own user are managers when both are empty.
	Managers, Readers []string

	// EndpointAddress is host:port of the SPIFFE bundle endpoint; empty means
	// none. EndpointProfile is https_spiffe (the default) or https_web, which
	// needs certificate and key files.
	EndpointAddress, EndpointProfile  string
	EndpointCertFile, EndpointKeyFile string
	// EndpointListener replaces EndpointAddress when set. After a successful [Open]
	// the Domain owns and closes it.
	EndpointListener net.Listener

	// Proxies are the load balancers that send a PROXY protocol header to every listener but
	// AdminSocket and MetricsAddress; see [listen.Proxies].
	Proxies []netip.Prefix
	// Limits are the limits of the agents' addresses; [spireapi.DefaultLimits] when nil.
	Limits *spireapi.ClientLimits

	// Federation are the bundle endpoints of the trust domains to federate with; see
	// [federation.Check].
	Federation []federation.Endpoint

	// RefreshHint tells relying parties and agents how often to ask for the
	// bundle, in whole seconds; no hint when zero.
	RefreshHint time.Duration

	MetricsAddress string // empty means no HTTP listener
	WebConfigFile  string // TLS and basic auth of the HTTP listener

	// KeysetLifetime is the lifetime of a keyset; 90 days when zero. X509TTL and
	// JWTTTL are the lifetimes of SVIDs whose entry sets none; 24 hours when zero.
	KeysetLifetime, X509TTL, JWTTTL time.Duration

	// Rotation is the policy of automatic rotation.
	Rotation rotation.Policy

	Version string
	Log     *slog.Logger
	// Started is called once, when all listeners are open.
	Started func()

	// For a Domain inside another process: ServerOptions are added to the gRPC server
	// of every deployment; Now and Uptime replace the wall clock and the monotonic
	// clock.
	ServerOptions []grpc.ServerOption
	Now           func() time.Time
	Uptime        func() time.Duration
	// FederationDial connects to the endpoints of Federation.
	FederationDial func(ctx context.Context, network, address string) (net.Conn, error)
}

// DeploymentConfig is a deployment to serve.
type DeploymentConfig struct {
	Name string
	// ListenAddress is host:port for agents; ignored when Listener is set. After a
	// successful [Open] the Domain owns and closes the listener.
	ListenAddress string
	Listener      net.Listener
	// X509Pop lets nodes attest with certificates; not when nil. The Domain sets its
	// TrustDomain, TrustBundle, Now and Log.
	X509Pop *x509pop.Config
	// Clusters are the clusters of Kubernetes whose nodes may attest.
	Clusters []k8spsat.Cluster
}

// serves reports whether the deployment serves agents. A deployment that is in the
// store and not configured serves none.
func (c DeploymentConfig) serves() bool { return c.ListenAddress != "" || c.Listener != nil }

// rotation returns the policy of the deployment. One that is not served signs nothing, so it
// needs no new keysets.
func (c DeploymentConfig) rotation(p rotation.Policy) rotation.Policy {
	if !c.serves() {
		p.Mode = rotation.Off
	}
	return p
}

// endpointFiles returns the files of the bundle endpoint's certificate, if it has any.
func (c Config) endpointFiles() (cert, key string) {
	if c.EndpointProfile != ProfileWeb {
		return "", ""
	}
	return c.EndpointCertFile, c.EndpointKeyFile
}

// The profiles of the bundle endpoint (SPIFFE Federation, section 5.2).
const (
	ProfileSPIFFE = federation.ProfileSPIFFE
	ProfileWeb    = federation.ProfileWeb
)

// withDefaults sets the defaults of empty fields.
func (c Config) withDefaults() Config {
	if len(c.Deployments) == 0 {
		c.Deployments = []DeploymentConfig{{Name: DefaultDeployment, ListenAddress: "0.0.0.0:8081"}}
	}
	c.AdminSocketMode = cmp.Or(c.AdminSocketMode, 0o660)
	c.KeysetLifetime = cmp.Or(c.KeysetLifetime, keyset.DefaultLifetime)
	c.EndpointProfile = cmp.Or(c.EndpointProfile, ProfileSPIFFE)
	c.Log = cmp.Or(c.Log, slog.New(slog.DiscardHandler))
	if c.Started == nil {
		c.Started = func() {}
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return c
}

// DefaultDeployment is the name of the one deployment when none is configured.
const DefaultDeployment = "default"
