package spire

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/renewd/renewd/internal/operator/prom"
	"github.com/renewd/renewd/internal/operator/runbook"
)

// The reasons for unknown figures.
const (
	noFigures       = "SPIRE does not know what agents hold: give --prometheus"
	upstreamFigures = "an upstream authority signs the X.509 authorities, and agents report figures for that one"
)

// automatic describes SPIRE's rotation, whose next time the API does not say.
const automatic = "SPIRE prepares the next keyset after half of the active one's life, replaces the old keyset by it, and activates it near the end"

// endpointHint is the refresh hint of a SPIRE server's bundle endpoint unless its
// configuration has another. The API does not tell it.
const endpointHint = 5 * time.Minute

// evict is the command that makes the server forget an agent; see [runbook.Status].
const evict = "spire-server agent evict -spiffeID ID"

// Status implements [runbook.Backend]. If an authority of a keyset does not exist, its
// ID is empty. If the figures are not known, each keyset says why.
//
// If some servers do not answer, it returns what the others know, and a
// [runbook.UnreachableError].
func (b *Backend) Status(ctx context.Context) (runbook.Status, error) {
	s, err := b.read(ctx)
	if _, some := errors.AsType[*runbook.UnreachableError](err); err != nil && !some {
		return runbook.Status{}, err
	}
	out, readErr := b.status(ctx, s)
	if readErr != nil {
		return runbook.Status{}, readErr
	}
	return out, err
}

func (b *Backend) status(ctx context.Context, s clusterState) (runbook.Status, error) {
	agents, err := b.expectedAgents(ctx, s.answered[0])
	if err != nil {
		return runbook.Status{}, err
	}
	follow, err := b.followers(ctx, s.answered[0])
	if err != nil {
		return runbook.Status{}, err
	}
	out := runbook.Status{
		TrustDomain: s.servers[0].trustDomain, Deployment: b.cfg.Deployment,
		Agents: len(agents), AgentsBehind: -1, Automatic: automatic, Unowned: s.unowned, FollowersWait: follow,
		Evict: evict, EvictGone: evict,
	}
	for _, v := range s.servers {
		out.Sequence = max(out.Sequence, v.sequence)
	}
	for _, set := range s.keysets {
		k := s.toRunbook(set)
		k.X509SVIDs, k.X509Safe, k.JWTSafe = 0, true, true
		for i, p := range set {
			m := runbook.Member{Server: s.answered[i].name, Keyset: keyset{p}.toRunbook()}
			if !p.exists() {
				if p != (pair{}) { // revoked
					m.ID, m.State = p.id(), runbook.Removed
					k.Members = append(k.Members, m)
				}
				continue
			}
			f, err := b.figures(ctx, s.servers[i], p, agents)
			if err != nil {
				m.Unknown, m.Unknowable = err.Error(), b.cfg.Figures == nil
			} else {
				out.Agents, out.AgentsBehind = f.Expected, f.Behind(out.Sequence)
				addFigures(&m.Keyset, p, s.servers[i], f)
			}
			k.Add(m.Keyset)
			k.Members = append(k.Members, m)
		}
		if len(b.servers) == 1 {
			k.Members = nil
		}
		out.Keysets = append(out.Keysets, k)
	}
	return out, nil
}

// followers returns how long relying parties of other trust domains may lack a new key.
// SPIRE does not say who asks its bundle endpoint, or with which hint. There are such
// relying parties if the servers follow other trust domains or have bundles of them.
func (b *Backend) followers(ctx context.Context, from *server) (time.Duration, error) {
	relations, err := from.domains.ListFederationRelationships(ctx, &trustdomainv1.ListFederationRelationshipsRequest{
		OutputMask: &types.FederationRelationshipMask{}, PageSize: 1,
	})
	if err != nil {
		return 0, fmt.Errorf("list federation relationships of the SPIRE server at %s: %w", from.name, err)
	}
	if len(relations.FederationRelationships) > 0 {
		return runbook.FollowersWait(endpointHint), nil
	}
	bundles, err := from.bundles.ListFederatedBundles(ctx, &bundlev1.ListFederatedBundlesRequest{OutputMask: &types.BundleMask{}, PageSize: 1})
	if err != nil {
		return 0, fmt.Errorf("list federated bundles of the SPIRE server at %s: %w", from.name, err)
	}
	if len(bundles.Bundles) > 0 {
		return runbook.FollowersWait(endpointHint), nil
	}
	return 0, nil
}

// addFigures adds the figures of a server's key to k. An authority that does not exist is
// safe.
func addFigures(k *runbook.Keyset, p pair, s serverState, f prom.Figures) {
	k.JWTExpiry = f.JWTExpiry
	k.JWTSafe = !p.jwt.exists() || (p.jwt.tainted && f.JWTSafe)
	if s.upstream != "" {
		k.Unknown, k.Unknowable = upstreamFigures, true
		return
	}
	k.X509SVIDs = f.X509SVIDs
	k.X509Safe = !p.x509.exists() || (p.x509.tainted && f.X509Safe)
}

func (b *Backend) figures(ctx context.Context, s serverState, p pair, agents []string) (prom.Figures, error) {
	if b.cfg.Figures == nil {
		return prom.Figures{}, errors.New(noFigures)
	}
	var x509ID, jwtID string
	if p.x509.exists() && s.upstream == "" {
		x509ID = p.x509.id
	}
	if p.jwt.exists() {
		jwtID = p.jwt.id
	}
	return b.cfg.Figures.Figures(ctx, x509ID, jwtID, agents)
}

// Holders implements [runbook.Backend]. The holders of an active keyset have the reason
// signing.
func (b *Backend) Holders(ctx context.Context, id string) ([]runbook.Holder, error) {
	s, err := b.read(ctx)
	if err != nil {
		return nil, err
	}
	k, err := s.find(id)
	if err != nil {
		return nil, err
	}
	if s.upstream() {
		return nil, errors.New(upstreamFigures)
	}
	agents, err := b.expectedAgents(ctx, s.answered[0])
	if err != nil {
		return nil, err
	}
	var all []runbook.Holder
	for i, p := range k {
		if !p.x509.exists() {
			continue
		}
		f, err := b.figures(ctx, s.servers[i], p, agents)
		if err != nil {
			return nil, err
		}
		for _, h := range f.Holders {
			if p.x509.slot == active {
				if h.SVIDs == 0 {
					continue
				}
				h.Reason = "signing"
			}
			all = mergeHolder(all, h)
		}
	}
	return all, nil
}

// reasons are the reasons of holders, the one that lasts the longest first.
var reasons = []string{"silent", "unidentified", "duplicated", "behind", "renewing", "streams", "settling", "signing"}

// mergeHolder adds a holder of another authority of the keyset. An agent that holds SVIDs
// of several is one holder.
func mergeHolder(all []runbook.Holder, h runbook.Holder) []runbook.Holder {
	i := slices.IndexFunc(all, func(o runbook.Holder) bool { return o.Agent == h.Agent })
	if i < 0 {
		return append(all, h)
	}
	o := &all[i]
	o.SVIDs, o.Streams = o.SVIDs+h.SVIDs, o.Streams+h.Streams
	if slices.Index(reasons, h.Reason) < slices.Index(reasons, o.Reason) {
		o.Reason = h.Reason
	}
	o.Version = cmp.Or(o.Version, h.Version)
	return all
}

// checkSafe returns an error unless no SVID depends on the keyset's X.509 authorities.
// JWT-SVIDs do not matter to it.
func (b *Backend) checkSafe(ctx context.Context, s clusterState, k keyset) error {
	agents, err := b.expectedAgents(ctx, s.answered[0])
	if err != nil {
		return err
	}
	for i, p := range k {
		if !p.x509.exists() {
			continue
		}
		f, err := b.figures(ctx, s.servers[i], p, agents)
		if err != nil {
			return &runbook.NotSafeError{Keyset: k.id(), Message: err.Error()}
		}
		if !f.X509Safe {
			return &runbook.NotSafeError{Keyset: k.id(), Message: fmt.Sprintf(
				"%d of %d agents may still hold X.509-SVIDs of %s", f.Holding, f.Expected, p.id())}
		}
	}
	return nil
}
