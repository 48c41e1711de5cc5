// Package spire lets the runbook work on a SPIRE server, through the
// LocalAuthority service on the server's admin socket.
//
// SPIRE knows no keysets. It has X.509 authorities and JWT authorities, and for
// each kind two slots: one that signs, and one that is either prepared or old.
// This package pairs the slots into keysets. What differs from renewd's own
// server follows from SPIRE's rules:
//
//   - There is room for one keyset beside the active one. Preparing another
//     makes SPIRE lose hold of the one in that place: it stays in the trust
//     bundle until it expires, and cannot be tainted, nor its X.509 authority
//     revoked. [Backend.Prepare] therefore refuses until the old one is removed.
//   - What has stepped down cannot be activated again, and only what has stepped
//     down can be tainted.
//   - The two keys of a keyset are moved by two calls. Between them the keyset is
//     half moved, which [Backend.Status] shows; the same step again moves the
//     other half and leaves alone what was moved.
//   - Where an upstream authority signs the X.509 authorities they cannot be
//     tainted or revoked here; Taint and Remove say so.
//   - SPIRE also rotates by itself, and knows no lock: whoever comes second finds
//     another state than it has read, and is refused with [refusal.ErrBusy].
//   - A server that starts without its keys (KeyManager "memory") makes new ones;
//     those from before stay in the bundle and are no keysets of it any more.
//
// Keysets are those of this server. In a cluster every server has its own; of
// the authorities of others only tainted ones are shown.
//
// What is signed and held SPIRE does not know; that comes from Prometheus
// (package prom).
package spire

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	localv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/renewd/renewd/internal/operator/prom"
	"github.com/renewd/renewd/internal/operator/runbook"
)

// defaultX509Life is how long X.509-SVIDs live at the most unless the Config
// says otherwise.
const defaultX509Life = 24 * time.Hour

// Figures say what the fleet's agents hold; *[prom.Client] is one.
type Figures interface {
	Figures(ctx context.Context, x509AuthorityID, jwtKeyID string, expectedAgents []string) (prom.Figures, error)
}

// Config says which SPIRE server to work on. Only Socket is required.
type Config struct {
	// Socket is the path of the server's admin socket (socket_path).
	Socket string
	// TrustDomain, when not empty, must be the one that the server serves.
	TrustDomain string
	// Deployment is shown as given; SPIRE has no such thing. "default" when
	// empty.
	Deployment string
	// Figures are the agents' figures; when nil nothing is known to be safe.
	Figures Figures
	// X509Life is the longest life of an X.509-SVID; 24 hours when 0. For so
	// long after its own SVID has ended, an agent's workloads may have valid
	// ones, and the agent counts.
	X509Life time.Duration
	// Now is the clock; time.Now when nil.
	Now func() time.Time
}

// Backend works on one SPIRE server. Its methods may be called concurrently.
// Close ends it.
type Backend struct {
	cfg     Config
	conn    *grpc.ClientConn
	local   localv1.LocalAuthorityClient
	bundles bundlev1.BundleClient
	agents  agentv1.AgentClient
}

var _ runbook.Backend = (*Backend)(nil)

// New checks the configuration. It does not connect.
func New(c Config) (*Backend, error) {
	if c.Socket == "" {
		return nil, errors.New("spire: no path of the server's admin socket")
	}
	if c.TrustDomain != "" {
		if _, err := spiffeid.TrustDomainFromString(c.TrustDomain); err != nil {
			return nil, fmt.Errorf("spire: trust domain %q: %w", c.TrustDomain, err)
		}
	}
	if c.X509Life < 0 {
		return nil, errors.New("spire: the life of X.509-SVIDs cannot be negative")
	}
	if c.Deployment == "" {
		c.Deployment = "default"
	}
	if c.X509Life == 0 {
		c.X509Life = defaultX509Life
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	// A dialer of our own, since a path in a gRPC target is parsed as a URL.
	dialer := func(ctx context.Context, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", c.Socket)
	}
	// The socket's file mode is what protects it; there is no TLS on it. No
	// call waits for a server to come, and none is made twice.
	conn, err := grpc.NewClient("passthrough:///spire-socket", grpc.WithContextDialer(dialer),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableRetry(),
		// A long wait looks every few seconds; gRPC's own pause after a server
		// that was away grows to two minutes.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: 5 * time.Second,
		}))
	if err != nil {
		return nil, fmt.Errorf("spire: socket %s: %w", c.Socket, err)
	}
	return &Backend{
		cfg: c, conn: conn,
		local: localv1.NewLocalAuthorityClient(conn), bundles: bundlev1.NewBundleClient(conn), agents: agentv1.NewAgentClient(conn),
	}, nil
}

// Close closes the connection.
func (b *Backend) Close() error {
	if err := b.conn.Close(); err != nil {
		return fmt.Errorf("spire: close: %w", err)
	}
	return nil
}

// expected returns the SPIFFE IDs of the agents that could hold SVIDs: those that
// are not banned and whose own SVID is valid, or ended so recently that SVIDs
// which it had for its workloads may be valid still.
func (b *Backend) expected(ctx context.Context) ([]string, error) {
	limit := b.cfg.Now().Add(-b.cfg.X509Life).Unix()
	var ids []string
	token := ""
	for {
		res, err := b.agents.ListAgents(ctx, &agentv1.ListAgentsRequest{
			OutputMask: &types.AgentMask{X509SvidExpiresAt: true, Banned: true}, PageSize: 1000, PageToken: token,
		})
		if err != nil {
			return nil, fmt.Errorf("list agents of the SPIRE server: %w", err)
		}
		for _, a := range res.Agents {
			if !a.Banned && a.X509SvidExpiresAt > limit {
				ids = append(ids, "spiffe://"+a.Id.GetTrustDomain()+a.Id.GetPath())
			}
		}
		if token = res.NextPageToken; token == "" {
			return ids, nil
		}
	}
}
