// Package spire implements [runbook.Backend] for a SPIRE server, through the
// LocalAuthority service on the server's admin socket.
//
// SPIRE has no keysets. It has X.509 authorities and JWT authorities, and two slots for
// each kind: one holds the active authority, the other a prepared or an old one. This
// package pairs the slots into keysets. It differs from renewd's server because of
// SPIRE's rules:
//
//   - There is room for one keyset beside the active one. If another is prepared, SPIRE
//     forgets the authorities in that slot: they stay in the trust bundle until they
//     expire and cannot be tainted, and the X.509 authority cannot be revoked.
//     [Backend.Prepare] therefore fails until the old keyset is removed.
//   - An old authority cannot be activated, and only an old one can be tainted.
//   - A step needs two calls, one for each key. If only one of them succeeds,
//     [Backend.Status] shows keys in different states. The same step again makes the
//     missing call only.
//   - If an upstream authority signs the X.509 authorities, they cannot be tainted or
//     revoked here. Taint and Remove fail with that reason.
//   - SPIRE also rotates automatically and has no lock. If two mutations race, the
//     second one fails with [refusal.ErrBusy].
//   - A server that starts without its keys (KeyManager "memory") makes new ones. Its
//     former authorities stay in the bundle and belong to no keyset.
//
// Each server of a cluster has its own keysets. Of the authorities of other servers
// only tainted ones are shown.
//
// SPIRE does not know which SVIDs are in use. Package prom reads that from Prometheus.
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

// defaultX509Life is the default of Config.X509Life.
const defaultX509Life = 24 * time.Hour

// Figures returns what the agents hold. *[prom.Client] implements it.
type Figures interface {
	Figures(ctx context.Context, x509AuthorityID, jwtKeyID string, expectedAgents []string) (prom.Figures, error)
}

// Config configures a [Backend]. Only Socket is required.
type Config struct {
	// Socket is the path of the server's admin socket (socket_path).
	Socket string
	// TrustDomain must be the server's, unless it is empty.
	TrustDomain string
	// Deployment is only displayed, because SPIRE has no deployments. The default is
	// "default".
	Deployment string
	// Figures is the source of the agents' figures. If it is nil, no keyset is known
	// to be safe.
	Figures Figures
	// X509Life is the longest life of an X.509-SVID; 24 hours when 0. An agent counts
	// for that long after its agent SVID expired, because its workloads may have valid
	// SVIDs.
	X509Life time.Duration
	// Now is the clock; time.Now when nil.
	Now func() time.Time
}

// Backend implements [runbook.Backend] for one SPIRE server. It is safe for concurrent
// use. Close closes its connection.
type Backend struct {
	cfg     Config
	conn    *grpc.ClientConn
	local   localv1.LocalAuthorityClient
	bundles bundlev1.BundleClient
	agents  agentv1.AgentClient
}

var _ runbook.Backend = (*Backend)(nil)

// New returns a Backend, or an error if the configuration is invalid. It does not
// connect.
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
	// gRPC would parse a path in the target as a URL.
	dialer := func(ctx context.Context, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", c.Socket)
	}
	// The socket has no TLS; its file mode protects it.
	conn, err := grpc.NewClient("passthrough:///spire-socket", grpc.WithContextDialer(dialer),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableRetry(),
		// A wait polls every few seconds, but gRPC's default backoff grows to two
		// minutes.
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

// expectedAgents returns the SPIFFE IDs of the agents that may hold SVIDs: those that
// are not banned and whose agent SVID expired less than X509Life ago, or is valid.
func (b *Backend) expectedAgents(ctx context.Context) ([]string, error) {
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
