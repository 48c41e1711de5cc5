package admin

import (
	"cmp"
	"context"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/refusal"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// Figures are the figures of a deployment's keysets and agents.
type Figures struct {
	Keysets []KeysetFigures
	// Sequence is the sequence number of the published bundle. Agents counts attested
	// agents, without banned and expired ones. AgentsBehind counts those that may not
	// apply that bundle yet.
	Sequence             uint64
	Agents, AgentsBehind int
	// Duplicated are the SPIFFE IDs that two agents use. Their SVIDs count until they
	// expire.
	Duplicated []string
	named      []*api.Holder // of the agents that are behind, the first by ID
}

// KeysetFigures describe the SVIDs that depend on a keyset.
type KeysetFigures struct {
	keyset.Keyset
	X509SVIDs, Agents int
	X509Latest        time.Time // expiry of the last X.509-SVID
	JWTLatest         time.Time // expiry of the last JWT-SVID
	X509Safe, JWTSafe bool      // tainted, and no SVID depends on the key
}

// Figures returns the figures of a deployment, with the keysets that this process signs
// with and publishes. It returns NotFound if there is no such deployment.
func (s *Service) Figures(ctx context.Context, deployment string) (Figures, error) {
	d, err := s.find(&api.ListKeysetsRequest{Scope: &api.Scope{Deployment: deployment}})
	if err != nil {
		return Figures{}, err
	}
	return s.figures(ctx, d, d.Keysets.Status().Keysets)
}

func (s *Service) figures(ctx context.Context, d *Deployment, list []keyset.Keyset) (Figures, error) {
	f := Figures{Sequence: s.config.Published().Sequence}
	for _, k := range list {
		f.Keysets = append(f.Keysets, d.keysetFigures(k))
	}
	n, err := s.count(ctx, d)
	if err != nil {
		return Figures{}, err
	}
	f.Agents, f.AgentsBehind, f.Duplicated, f.named = n.agents, n.behind, n.duplicated, n.named
	return f, nil
}

// latestExpiry returns the expiry of the agent's last agent SVID.
func latestExpiry(a spireapi.Agent) time.Time {
	if a.NextExpiresAt.After(a.ExpiresAt) {
		return a.NextExpiresAt
	}
	return a.ExpiresAt
}

// keysetFigures returns the figures of a keyset.
func (d *Deployment) keysetFigures(k keyset.Keyset) KeysetFigures {
	tainted := k.State == keyset.Tainted
	x509 := d.Ledger.X509(k.X509AuthorityID, tainted)
	jwt, jwtClear := d.Ledger.JWT(k.JWTKeyID, tainted)
	return KeysetFigures{
		Keyset: k, X509SVIDs: x509.SVIDs, Agents: x509.Agents, X509Latest: x509.Latest, JWTLatest: jwt,
		X509Safe: tainted && x509.Clear, JWTSafe: tainted && jwtClear,
	}
}

var states = map[keyset.State]api.KeysetState{
	keyset.Prepared: api.KeysetState_PREPARED, keyset.Active: api.KeysetState_ACTIVE, keyset.Tainted: api.KeysetState_TAINTED,
}

func protoKeyset(k KeysetFigures) *api.Keyset {
	return &api.Keyset{
		Id: k.ID, State: states[k.State], IssuedAt: protoTime(k.IssuedAt), ExpiresAt: protoTime(k.ExpiresAt),
		X509AuthorityId: k.X509AuthorityID, JwtKeyId: k.JWTKeyID, TaintedAt: protoTime(k.TaintedAt), SteppedDownAt: protoTime(k.SteppedDownAt),
		LiveX509Svids: int64(k.X509SVIDs), AgentsHolding: int64(k.Agents), X509LatestExpiry: protoTime(k.X509Latest),
		JwtLatestExpiry: protoTime(k.JWTLatest), X509Safe: k.X509Safe, JwtSafe: k.JWTSafe,
	}
}

// protoTime returns nil for the zero time, which means not known.
func protoTime(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// ListKeysets implements the service. It reads the keysets from storage, so it shows the
// outcome of a mutation.
func (s *Service) ListKeysets(ctx context.Context, req *api.ListKeysetsRequest) (*api.ListKeysetsResponse, error) {
	d, err := s.find(req)
	if err != nil {
		return nil, err
	}
	list, err := d.Keysets.List(ctx)
	if err != nil {
		return nil, statusError(err)
	}
	f, err := s.figures(ctx, d, list)
	if err != nil {
		return nil, statusError(err)
	}
	resp := &api.ListKeysetsResponse{
		Scope:    &api.Scope{TrustDomain: s.config.TrustDomain.Name(), Deployment: d.Name},
		Sequence: f.Sequence, Agents: int64(f.Agents), AgentsBehind: int64(f.AgentsBehind), AgentsDuplicated: f.Duplicated,
		Clock: s.clock(), ServerStartedAt: protoTime(s.config.Clock.Start()), BundleEndpoint: s.config.RefreshHint != nil,
	}
	if resp.BundleEndpoint {
		if hint := s.config.RefreshHint(); hint > 0 {
			resp.BundleRefreshHint = durationpb.New(hint)
		}
	}
	// Agents of other deployments verify the SVIDs of this one, too.
	for i := range s.config.Deployments {
		other := &s.config.Deployments[i]
		if other == d || other.Retired {
			continue
		}
		n, err := s.count(ctx, other)
		if err != nil {
			return nil, statusError(err)
		}
		resp.Agents += int64(n.agents)
		resp.AgentsBehind += int64(n.behind)
		f.named = append(f.named, n.named...)
		resp.AgentsDuplicated = append(resp.AgentsDuplicated, n.duplicated...)
	}
	slices.Sort(resp.AgentsDuplicated)
	slices.SortFunc(f.named, func(a, b *api.Holder) int { return cmp.Compare(a.GetAgentId(), b.GetAgentId()) })
	resp.Behind = f.named[:min(len(f.named), maxBehind)]
	for _, k := range f.Keysets {
		resp.Keysets = append(resp.Keysets, protoKeyset(k))
	}
	if d.Automatic != nil {
		a := d.Automatic()
		resp.Automatic = &api.Automatic{Mode: a.Mode, Next: a.Next, At: protoTime(a.At), WaitsFor: a.WaitsFor}
	}
	return resp, nil
}

// ListHolders implements the service.
func (s *Service) ListHolders(ctx context.Context, req *api.ListHoldersRequest) (*api.ListHoldersResponse, error) {
	d, err := s.find(req)
	if err != nil {
		return nil, err
	}
	list, err := d.Keysets.List(ctx)
	if err != nil {
		return nil, statusError(err)
	}
	i := slices.IndexFunc(list, func(k keyset.Keyset) bool { return k.ID == req.GetKeysetId() })
	if i < 0 {
		return nil, statusError(refusal.ErrNotFound)
	}
	agents, err := d.Server.Agents(ctx)
	if err != nil {
		return nil, statusError(err)
	}
	byID := make(map[string]*spireapi.Agent, len(agents))
	for i := range agents {
		byID[agents[i].ID.String()] = &agents[i]
	}
	resp := &api.ListHoldersResponse{ServerStartedAt: protoTime(s.config.Clock.Start())}
	// This call also notifies the ledger of a taint.
	k := d.keysetFigures(list[i])
	for _, h := range d.Ledger.Holders(k.X509AuthorityID) {
		out := &api.Holder{
			AgentId: h.Agent, Svids: int64(h.SVIDs), Streams: int64(h.Streams),
			LatestExpiry: protoTime(h.Latest), LastReport: protoTime(h.LastReport), AppliedSequence: h.Sequence,
			Reason: h.Reason, BeginsAt: protoTime(h.BeginsAt), Rate: h.Rate,
		}
		if a := byID[h.Agent]; a != nil {
			out.Version, out.Hostname, out.Label = a.Version, a.Hostname, a.Label
		}
		resp.Holders = append(resp.Holders, out)
	}
	return resp, nil
}
