// Package spire implements [runbook.Backend] for the servers of a SPIRE trust domain,
// through their LocalAuthority services.
//
// SPIRE has no keysets. Each server has X.509 authorities and JWT authorities, and two
// slots for each kind: one holds the active authority, the other a prepared or an old
// one. This package pairs the slots of a server into keys of two generations, the older
// and the newer. A keyset consists of the keys of one generation of all given servers:
// see [Backend]. It differs from a keyset of renewd's server because of SPIRE's rules:
//
//   - There is room for one keyset beside the active one. If another is prepared, SPIRE
//     forgets the authorities in that slot: they stay in the trust bundle until they
//     expire and cannot be tainted, and the X.509 authority cannot be revoked.
//     [Backend.Prepare] therefore fails until the old keyset is removed.
//   - An old authority cannot be activated, and only an old one can be tainted.
//   - A step needs two calls at each server, one for each key. If only some of them
//     succeed, [Backend.Status] shows keys in different states. The same step again
//     makes the missing calls only.
//   - If an upstream authority signs the X.509 authorities, they cannot be tainted or
//     revoked here. Taint and Remove fail with that reason.
//   - SPIRE also rotates automatically and has no lock. If two mutations race, the
//     second one fails with [refusal.ErrBusy].
//   - A server that starts without its keys (KeyManager "memory") makes new ones. Its
//     former authorities stay in the bundle and belong to no keyset. They are
//     [runbook.Status.Unowned], as are those of servers that are not given.
//
// SPIRE does not know which SVIDs are in use. Package prom reads that from Prometheus.
package spire

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/renewd/renewd/internal/operator/prom"
	"github.com/renewd/renewd/internal/operator/runbook"
)

// defaultX509Life is the default of Config.X509Life.
const defaultX509Life = 24 * time.Hour

// Figures returns what the agents hold. *[prom.Client] implements it.
type Figures interface {
	Figures(ctx context.Context, x509AuthorityID, jwtKeyID string, expectedAgents []string) (prom.Figures, error)
}

// Config configures a [Backend]. Sockets or Addresses is required.
type Config struct {
	// Sockets are the paths of the servers' admin sockets (socket_path), Addresses the
	// servers to reach as host:port. Steps go through the sockets and then through the
	// addresses, in this order.
	Sockets, Addresses []string
	// Source has the X.509-SVID that is presented at Addresses, which must be one of an
	// administrator in SPIRE. The Backend does not close it.
	Source *workloadapi.X509Source
	// TrustDomain must be the servers', unless it is empty.
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
	// Notice is called with a sentence for the operator: of each server at which a step
	// is done, if there are several, and of what looks wrong. Nil: no calls.
	Notice func(text string)
}

// Backend implements [runbook.Backend] for the servers of one SPIRE cluster, which share
// a database, or for its only server. It has no state of its own: a step finds out at
// each server what is done, and does what is missing. It is safe for concurrent use.
// Close closes its connections.
//
// A step begins only if all servers answer. If it fails at one of them, the same step
// again completes it; the next step is refused until then.
type Backend struct {
	cfg     Config
	servers []*server
}

var _ runbook.Backend = (*Backend)(nil)

// New returns a Backend, or an error if the configuration is invalid. It does not
// connect.
func New(c Config) (*Backend, error) {
	if len(c.Sockets)+len(c.Addresses) == 0 {
		return nil, errors.New("spire: no path of a server's admin socket and no address of a server")
	}
	if len(c.Addresses) > 0 && c.Source == nil {
		return nil, errors.New("spire: no X.509-SVID to present to the servers")
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
	if c.Notice == nil {
		c.Notice = func(string) {}
	}
	b := &Backend{cfg: c}
	add := func(v *server, err error) error {
		if err != nil {
			return errors.Join(err, b.Close())
		}
		b.servers = append(b.servers, v)
		return nil
	}
	for _, path := range c.Sockets {
		if err := add(socketServer(path)); err != nil {
			return nil, err
		}
	}
	for _, address := range c.Addresses {
		if err := add(remoteServer(address, c.Source)); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// Close closes the connections.
func (b *Backend) Close() error {
	var errs []error
	for _, v := range b.servers {
		if err := v.conn.Close(); err != nil {
			errs = append(errs, fmt.Errorf("spire: close: %w", err))
		}
	}
	return errors.Join(errs...)
}

// clusterState is the state of the servers at one moment.
type clusterState struct {
	servers  []serverState
	answered []*server // by index of servers
	keysets  []keyset  // in order of issue
	unowned  []runbook.Authority
}

// upstream reports whether an upstream authority signs the X.509 authorities of a server.
func (s clusterState) upstream() bool {
	return slices.ContainsFunc(s.servers, func(v serverState) bool { return v.upstream != "" })
}

// cacheTime is how long a SPIRE server may answer with a bundle that another server has
// changed: it keeps it for a second.
const cacheTime = 1500 * time.Millisecond

// read reads all servers at the same time. If some do not answer it returns the state of
// those that do and a [runbook.UnreachableError].
func (b *Backend) read(ctx context.Context) (clusterState, error) {
	s, err := b.readOnce(ctx)
	if _, foreign := errors.AsType[otherClusterError](err); foreign {
		select {
		case <-ctx.Done():
			return s, ctx.Err()
		case <-time.After(cacheTime):
			return b.readOnce(ctx)
		}
	}
	return s, err
}

func (b *Backend) readOnce(ctx context.Context) (clusterState, error) {
	states, errs := make([]serverState, len(b.servers)), make([]error, len(b.servers))
	var reads sync.WaitGroup
	for i, v := range b.servers {
		reads.Go(func() { states[i], errs[i] = v.read(ctx, b.cfg.TrustDomain) })
	}
	reads.Wait()
	var s clusterState
	var failed []error
	for i, err := range errs {
		if err != nil {
			failed = append(failed, fmt.Errorf("SPIRE server at %s: %w", b.servers[i].name, err))
			continue
		}
		s.servers, s.answered = append(s.servers, states[i]), append(s.answered, b.servers[i])
	}
	if len(s.servers) == 0 {
		return s, errors.Join(failed...)
	}
	if err := s.checkOneCluster(); err != nil {
		return s, err
	}
	s.keysets, s.unowned = keysets(s.servers), unowned(s.servers, b.cfg.Now())
	if len(failed) > 0 {
		return s, &runbook.UnreachableError{Servers: len(b.servers), Err: errors.Join(failed...)}
	}
	return s, nil
}

// otherClusterError says that two servers have different bundles.
type otherClusterError string

func (e otherClusterError) Error() string { return string(e) }

// checkOneCluster returns an error unless the servers are different servers of one trust
// domain that share its bundle: each has the active authorities of the others in it.
func (s clusterState) checkOneCluster() error {
	for i, a := range s.servers {
		for j, other := range s.servers {
			nameA, nameB := s.answered[i].name, s.answered[j].name
			switch {
			case i == j:
			case a.trustDomain != other.trustDomain:
				return &runbook.PermanentError{Err: fmt.Errorf("%s serves the trust domain %q and %s serves %q: give the servers of one", nameA, a.trustDomain, nameB, other.trustDomain)}
			case a.x509Slots.active.id == other.x509Slots.active.id:
				return &runbook.PermanentError{Err: fmt.Errorf("%s and %s are the same server: give each server once", nameA, nameB)}
			case a.upstream == "" && !has(other.x509, a.x509Slots.active.id), !a.noJWT && !has(other.jwt, a.jwtSlots.active.id):
				return otherClusterError(fmt.Sprintf("%s and %s do not share a trust bundle, because that of %s lacks an active authority of %s: give the servers of one database", nameA, nameB, nameB, nameA))
			}
		}
	}
	return nil
}

func has(bundle []authority, id string) bool {
	return slices.ContainsFunc(bundle, func(h authority) bool { return h.id == id })
}

// expectedAgents returns the SPIFFE IDs of the agents that may hold SVIDs: those that
// are not banned and whose agent SVID expired less than X509Life ago, or is valid. The
// servers share them.
func (b *Backend) expectedAgents(ctx context.Context, from *server) ([]string, error) {
	limit := b.cfg.Now().Add(-b.cfg.X509Life).Unix()
	var ids []string
	token := ""
	for {
		res, err := from.agents.ListAgents(ctx, &agentv1.ListAgentsRequest{
			OutputMask: &types.AgentMask{X509SvidExpiresAt: true, Banned: true}, PageSize: 1000, PageToken: token,
		})
		if err != nil {
			return nil, fmt.Errorf("list agents of the SPIRE server at %s: %w", from.name, err)
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
