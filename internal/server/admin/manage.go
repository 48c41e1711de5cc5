package admin

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/config"
	"github.com/renewd/renewd/internal/selector"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/spireapi"
)

func auditStates(of map[string]keyset.State) []*api.AuditState {
	var out []*api.AuditState
	for _, id := range slices.Sorted(maps.Keys(of)) {
		out = append(out, &api.AuditState{KeysetId: id, State: states[of[id]]})
	}
	return out
}

// ListAgents implements the service.
func (s *Service) ListAgents(ctx context.Context, req *api.ListAgentsRequest) (*api.ListAgentsResponse, error) {
	d, err := s.find(req)
	if err != nil {
		return nil, err
	}
	agents, err := d.Server.Agents(ctx)
	if err != nil {
		return nil, statusError(err)
	}
	resp := &api.ListAgentsResponse{}
	duplicated := d.Ledger.Duplicated()
	for _, a := range agents {
		out := &api.Agent{Id: a.ID.String(), AttestationType: a.Type, ExpiresAt: protoTime(latestExpiry(a)), Banned: a.Banned, Version: a.Version, Reattestable: a.Reattestable}
		for _, sel := range a.Selectors {
			out.Selectors = append(out.Selectors, sel.Type+":"+sel.Value)
		}
		if c, ok := d.Ledger.Contact(out.Id); ok {
			out.AppliedSequence, out.LastReport = c.Sequence, protoTime(c.At)
		}
		out.Duplicated = slices.Contains(duplicated, out.Id)
		resp.Agents = append(resp.Agents, out)
	}
	return resp, nil
}

// The default and the longest life of a join token.
const (
	defaultTokenTTL = 10 * time.Minute
	maxTokenTTL     = 30 * 24 * time.Hour
)

// CreateJoinToken implements the service.
func (s *Service) CreateJoinToken(ctx context.Context, req *api.CreateJoinTokenRequest) (*api.CreateJoinTokenResponse, error) {
	d, err := s.find(req)
	if err != nil {
		return nil, err
	}
	ttl := defaultTokenTTL
	if req.GetTtl() != nil {
		ttl = req.GetTtl().AsDuration()
	}
	if ttl <= 0 || ttl > maxTokenTTL {
		return nil, status.Errorf(codes.InvalidArgument, "ttl: %v is not above 0 and at most %v", ttl, maxTokenTTL)
	}
	t, err := d.Server.CreateJoinToken(ctx, ttl)
	if err != nil {
		return nil, statusError(err)
	}
	return &api.CreateJoinTokenResponse{Token: t.Value, ExpiresAt: protoTime(t.ExpiresAt)}, nil
}

// BanAgent implements the service.
func (s *Service) BanAgent(ctx context.Context, req *api.BanAgentRequest) (*api.BanAgentResponse, error) {
	d, err := s.find(req)
	if err != nil {
		return nil, err
	}
	id, err := agentID(req.GetAgentId())
	if err != nil {
		return nil, err
	}
	if err := d.Server.BanAgent(ctx, id); err != nil {
		return nil, statusError(err)
	}
	return &api.BanAgentResponse{}, nil
}

// EvictAgent implements the service.
func (s *Service) EvictAgent(ctx context.Context, req *api.EvictAgentRequest) (*api.EvictAgentResponse, error) {
	d, err := s.find(req)
	if err != nil {
		return nil, err
	}
	id, err := agentID(req.GetAgentId())
	if err != nil {
		return nil, err
	}
	if err := d.Server.EvictAgent(ctx, id, req.GetGone()); err != nil {
		return nil, statusError(err)
	}
	return &api.EvictAgentResponse{}, nil
}

func agentID(text string) (spiffeid.ID, error) {
	id, err := spiffeid.FromString(text)
	if err != nil {
		return id, status.Errorf(codes.InvalidArgument, "agent_id: %q is not a SPIFFE ID: %v", text, err)
	}
	return id, nil
}

// ListEntries implements the service.
func (s *Service) ListEntries(ctx context.Context, req *api.ListEntriesRequest) (*api.ListEntriesResponse, error) {
	d, err := s.find(req)
	if err != nil {
		return nil, err
	}
	entries := d.Server.EntrySet().All()
	if req.GetAgentId() != "" {
		id, err := agentID(req.GetAgentId())
		if err != nil {
			return nil, err
		}
		if entries, err = d.Server.EntriesOf(ctx, id); err != nil {
			return nil, statusError(err)
		}
	}
	resp := &api.ListEntriesResponse{}
	for _, e := range entries {
		resp.Entries = append(resp.Entries, protoEntry(&e.Entry))
	}
	return resp, nil
}

// ApplyEntries implements the service.
func (s *Service) ApplyEntries(ctx context.Context, req *api.ApplyEntriesRequest) (*api.ApplyEntriesResponse, error) {
	d, err := s.find(req)
	if err != nil {
		return nil, err
	}
	entries := make([]spireapi.Entry, len(req.GetEntries()))
	var wrong spireapi.EntryErrors
	for i, e := range req.GetEntries() {
		var bad *spireapi.EntryError
		if entries[i], bad = parseEntry(e); bad != nil {
			if e.GetId() == "" {
				bad.Place = i + 1
			}
			wrong = append(wrong, bad)
		}
	}
	if len(wrong) > 0 {
		return nil, statusError(wrong)
	}
	warnings := s.warnings(entries)
	diff, err := d.Server.ApplyEntriesIf(ctx, entries, req.GetDryRun(), func(diff spireapi.Diff) error {
		err := checkRemoval(diff, req.Remove)
		if err != nil && req.Remove == nil && req.GetDryRun() {
			warnings = append(warnings, err.Error())
			return nil
		}
		return err
	})
	if err != nil {
		return nil, statusError(err)
	}
	resp := &api.ApplyEntriesResponse{Unchanged: int64(diff.Unchanged), Warnings: warnings}
	for _, c := range diff.Changes {
		resp.Changes = append(resp.Changes, protoChange(c))
	}
	return resp, nil
}

// A list that removes more than manyRemoved entries, or more than someRemoved and a tenth
// of them, or all, is more likely a mistake than intended.
const (
	manyRemoved = 20
	someRemoved = 5
)

// removalError says that a change removes an unexpected number of entries.
type removalError string

func (e removalError) Error() string { return string(e) }

// checkRemoval returns an error if the change does not remove the expected number of
// entries, or removes many without an expected number. It guards against a truncated file
// and one of another deployment.
func checkRemoval(diff spireapi.Diff, expected *int64) error {
	removed, before := diff.Removed()
	switch {
	case expected != nil && *expected != int64(removed):
		return removalError(fmt.Sprintf("this removes %d of %d entries, not %d as --remove says: check the changes with --dry-run", removed, before, *expected))
	case expected != nil || removed == 0:
		return nil
	case removed == before:
		return removalError(fmt.Sprintf("this removes all %d entries: check the changes with --dry-run; if they are intended, give --remove %d", removed, removed))
	case removed > manyRemoved || removed > someRemoved && removed*10 > before:
		return removalError(fmt.Sprintf("this removes %d of %d entries: check the changes with --dry-run; if they are intended, give --remove %d", removed, before, removed))
	}
	return nil
}

// PutEntry implements the service.
func (s *Service) PutEntry(ctx context.Context, req *api.PutEntryRequest) (*api.PutEntryResponse, error) {
	d, err := s.find(req)
	if err != nil {
		return nil, err
	}
	e, wrong := parseEntry(req.GetEntry())
	if wrong != nil {
		return nil, statusError(wrong)
	}
	c, err := d.Server.UpsertEntry(ctx, e)
	if err != nil {
		return nil, statusError(err)
	}
	return &api.PutEntryResponse{Change: protoChange(c), Warnings: s.warnings([]spireapi.Entry{e})}, nil
}

// warnings names the entries whose selectors never match, and those that federate with trust
// domains whose bundles the server does not fetch.
func (s *Service) warnings(entries []spireapi.Entry) []string {
	out := selector.Warnings(func(yield func(selector.Entry) bool) {
		for _, e := range entries {
			of := selector.Entry{Name: e.Name(), Alias: e.IsAlias()}
			for _, sel := range e.Selectors {
				of.Selectors = append(of.Selectors, sel.Type+":"+sel.Value)
			}
			if !yield(of) {
				return
			}
		}
	})
	if s.config.Follows == nil {
		return out
	}
	unknown := make(map[string][]string) // entries by trust domain
	for _, e := range entries {
		for _, td := range e.FederatesWith {
			if !s.config.Follows(td) {
				unknown[td.Name()] = append(unknown[td.Name()], e.Name())
			}
		}
	}
	for _, td := range slices.Sorted(maps.Keys(unknown)) {
		out = append(out, fmt.Sprintf("entries that federate with %q: the server does not fetch its bundle, so workloads do not get it: set federation.%s in the server's configuration, or correct %s",
			td, td, selector.List(unknown[td])))
	}
	return out
}

// DeleteEntry implements the service.
func (s *Service) DeleteEntry(ctx context.Context, req *api.DeleteEntryRequest) (*api.DeleteEntryResponse, error) {
	d, err := s.find(req)
	if err != nil {
		return nil, err
	}
	if err := d.Server.DeleteEntry(ctx, req.GetId()); err != nil {
		return nil, statusError(err)
	}
	return &api.DeleteEntryResponse{}, nil
}

// GetBundle implements the service. All deployments publish the same bundle, so the request
// need not name one.
func (s *Service) GetBundle(_ context.Context, req *api.GetBundleRequest) (*api.GetBundleResponse, error) {
	if scope := req.GetScope(); scope.GetDeployment() == "" {
		if err := s.checkTrustDomain(scope.GetTrustDomain()); err != nil {
			return nil, err
		}
	} else if _, err := s.find(req); err != nil {
		return nil, err
	}
	b := s.config.Published()
	return &api.GetBundleResponse{Pem: b.PEM(), Sequence: b.Sequence}, nil
}

func protoChange(c spireapi.EntryChange) *api.EntryChange {
	return &api.EntryChange{Before: protoEntry(c.Before), After: protoEntry(c.After)}
}

func protoEntry(e *spireapi.Entry) *api.Entry {
	if e == nil {
		return nil
	}
	out := &api.Entry{Id: e.ID, SpiffeId: e.SPIFFEID.String(), Hint: e.Hint, DnsNames: e.DNSNames, Operator: e.Operator,
		DisableX509SvidPrefetch: e.DisableX509SVIDPrefetch, JwtSvidIncludeJti: e.JWTSVIDIncludeJTI}
	if !e.ParentID.IsZero() {
		out.ParentId = e.ParentID.String()
	}
	for _, sel := range e.Selectors {
		out.Selectors = append(out.Selectors, &api.Selector{Type: sel.Type, Value: sel.Value})
	}
	for _, td := range e.FederatesWith {
		out.FederatesWith = append(out.FederatesWith, td.Name())
	}
	if e.X509TTL != 0 {
		out.X509Ttl = durationpb.New(e.X509TTL)
	}
	if e.JWTTTL != 0 {
		out.JwtTtl = durationpb.New(e.JWTTTL)
	}
	out.ExpiresAt = protoTime(e.ExpiresAt)
	return out
}

// parseEntry parses the fields of an entry. Package spireapi validates it.
func parseEntry(p *api.Entry) (spireapi.Entry, *spireapi.EntryError) {
	wrong := func(field, value string, err error) (spireapi.Entry, *spireapi.EntryError) {
		return spireapi.Entry{}, &spireapi.EntryError{Entry: cmp.Or(p.GetId(), p.GetSpiffeId()), Field: field, Problem: fmt.Sprintf("%q: %v", value, err)}
	}
	e := spireapi.Entry{
		ID: p.GetId(), Operator: p.GetOperator(), Hint: p.GetHint(), DNSNames: p.GetDnsNames(),
		X509TTL: p.GetX509Ttl().AsDuration(), JWTTTL: p.GetJwtTtl().AsDuration(),
		DisableX509SVIDPrefetch: p.GetDisableX509SvidPrefetch(), JWTSVIDIncludeJTI: p.GetJwtSvidIncludeJti(),
	}
	var err error
	if e.SPIFFEID, err = spiffeid.FromString(p.GetSpiffeId()); err != nil {
		return wrong("spiffe_id", p.GetSpiffeId(), err)
	}
	if p.GetParentId() != "" {
		if e.ParentID, err = spiffeid.FromString(p.GetParentId()); err != nil {
			return wrong("parent_id", p.GetParentId(), err)
		}
	}
	for _, sel := range p.GetSelectors() {
		e.Selectors = append(e.Selectors, spireapi.Selector{Type: sel.GetType(), Value: sel.GetValue()})
	}
	for _, name := range p.GetFederatesWith() {
		td, err := spiffeid.TrustDomainFromString(name)
		if err == nil {
			err = config.CheckTrustDomain(name)
		}
		if err != nil {
			return wrong("federates_with", name, err)
		}
		e.FederatesWith = append(e.FederatesWith, td)
	}
	if at := p.GetExpiresAt(); at != nil {
		e.ExpiresAt = at.AsTime()
	}
	return e, nil
}
