package main

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/renewd/renewd/internal/api"
)

// fake is an Operator service during a rotation, with times far in the past and future.
// The zero fake has an expired keyset and nothing else.
type fake struct {
	api.UnimplementedOperatorServer
	busy bool

	mu      sync.Mutex
	entries map[string]*api.Entry
}

var (
	past   = time.Date(2020, 1, 2, 3, 4, 5, 0, time.UTC)
	future = time.Date(2999, 1, 2, 3, 4, 5, 0, time.UTC)
)

func newFake() *fake { return &fake{busy: true, entries: map[string]*api.Entry{}} }

func (f *fake) ListDeployments(_ context.Context, r *api.ListDeploymentsRequest) (*api.ListDeploymentsResponse, error) {
	if td := r.GetTrustDomain(); td != "" && td != "example.org" {
		return nil, status.Errorf(codes.NotFound, "trust domain %q is not served here", td)
	}
	return &api.ListDeploymentsResponse{TrustDomain: "example.org", Deployments: []string{"east", "west"}}, nil
}

func (f *fake) ListKeysets(_ context.Context, r *api.ListKeysetsRequest) (*api.ListKeysetsResponse, error) {
	if !f.busy {
		return &api.ListKeysetsResponse{Keysets: []*api.Keyset{{Id: "ks_old", State: api.KeysetState_ACTIVE, ExpiresAt: timestamppb.New(past)}}}, nil
	}
	return &api.ListKeysetsResponse{Agents: 3, AgentsBehind: 1, Automatic: &api.Automatic{Mode: "paused"}, Keysets: []*api.Keyset{
		{Id: "ks_a", State: api.KeysetState_TAINTED, ExpiresAt: timestamppb.New(past)},
		{Id: "ks_" + r.GetScope().GetDeployment(), State: api.KeysetState_ACTIVE, ExpiresAt: timestamppb.New(future)},
	}}, nil
}

// ReadAudit has records of each kind and returns two at a time.
func (f *fake) ReadAudit(_ context.Context, r *api.ReadAuditRequest) (*api.ReadAuditResponse, error) {
	state := func(id string, s api.KeysetState) *api.AuditState { return &api.AuditState{KeysetId: id, State: s} }
	all := []*api.AuditRecord{
		{Number: 1, Actor: "server", Operation: "prepare", KeysetId: "ks_a", After: []*api.AuditState{state("ks_a", api.KeysetState_PREPARED)}},
		{
			Number: 2, Actor: "unix:uid:1000", Operation: "activate", KeysetId: "ks_b",
			Before: []*api.AuditState{state("ks_a", api.KeysetState_ACTIVE), state("ks_b", api.KeysetState_PREPARED)},
			After:  []*api.AuditState{state("ks_a", api.KeysetState_PREPARED), state("ks_b", api.KeysetState_ACTIVE)},
		},
		{
			Number: 3, Actor: "spiffe://example.org/ops", Operation: "remove", KeysetId: "ks_a", Note: "forced: 2 agents",
			Before: []*api.AuditState{state("ks_a", api.KeysetState_TAINTED), state("ks_b", api.KeysetState_ACTIVE)},
			After:  []*api.AuditState{state("ks_b", api.KeysetState_ACTIVE)},
		},
		{Number: 4, Actor: "unix:uid:1000", Operation: "add entry", Kind: "entries", Note: "apply", Entry: &api.EntryChange{After: &api.Entry{Id: "web", SpiffeId: "spiffe://example.org/web"}}},
		{Number: 5, Actor: "unix:uid:1000", Operation: "change entry", Kind: "entries", Note: "SPIRE's Entry API", Entry: &api.EntryChange{
			Before: &api.Entry{Id: "web", SpiffeId: "spiffe://example.org/web"},
			After:  &api.Entry{Id: "web", SpiffeId: "spiffe://example.org/web", Hint: "a\x1bb", Selectors: []*api.Selector{{Type: "unix", Value: "uid:0"}}},
		}},
		{Number: 6, Actor: "server", Operation: "remove entry", Kind: "entries", Note: "expired", Entry: &api.EntryChange{Before: &api.Entry{Id: "web", SpiffeId: "spiffe://example.org/web"}}},
		{Number: 7, Actor: "unix:uid:1000", Operation: "create token", Kind: "tokens", Token: &api.AuditToken{Label: "rack 1", ExpiresAt: timestamppb.New(future)}},
		{Number: 8, Actor: "spiffe://example.org/operators/alice", Operation: "ban agent", Kind: "agents", Agent: &api.AuditAgent{Id: agentID, Before: "attested", After: "banned", Hostname: "node-1", Label: "rack 1"}},
		{Number: 9, Actor: "unix:uid:1000", Operation: "evict agent", Kind: "agents", Agent: &api.AuditAgent{Id: agentID, Before: "banned", Gone: true}},
		{Number: 12, Actor: "unix:uid:1000", Operation: "backup", Kind: "backups", Note: "a note that is longer than a terminal of 80 columns is wide, so that it continues below, and a word that is longer than that is not broken: https://example.org/0123456789012345678901234567890123456789012345678901234567890123456789"},
	}
	if slices.Contains(r.GetKinds(), "entry") {
		return nil, status.Error(codes.InvalidArgument, `kinds: there is no kind "entry", only ["keysets" "entries"]`)
	}
	var out []*api.AuditRecord
	for _, rec := range all {
		rec.At = timestamppb.New(past)
		rec.Kind = cmp.Or(rec.GetKind(), "keysets")
		if !slices.Contains(r.GetKinds(), rec.GetKind()) && len(r.GetKinds()) > 0 {
			continue
		}
		if rec.GetNumber() > r.GetAfter() && len(out) < 2 {
			out = append(out, rec)
		}
	}
	return &api.ReadAuditResponse{Records: out}, nil
}

// GetClock returns a clock in doubt if the fake is busy.
func (f *fake) GetClock(context.Context, *api.GetClockRequest) (*api.GetClockResponse, error) {
	c := &api.Clock{Shows: timestamppb.New(past.Add(91 * 24 * time.Hour)), AtLeast: timestamppb.New(past)}
	if f.busy {
		c.Doubt, c.SteadyFor, c.RotationWaits = durationpb.New(91*24*time.Hour), durationpb.New(90*time.Second), true
	}
	return &api.GetClockResponse{Clock: c}, nil
}

// ConfirmClock accepts one time.
func (f *fake) ConfirmClock(_ context.Context, r *api.ConfirmClockRequest) (*api.ConfirmClockResponse, error) {
	if !r.GetTime().AsTime().Equal(past.Truncate(time.Minute)) {
		return nil, status.Errorf(codes.FailedPrecondition, "the server's clock does not show %s", r.GetTime().AsTime())
	}
	return &api.ConfirmClockResponse{Clock: &api.Clock{Shows: timestamppb.New(past), AtLeast: timestamppb.New(past)}}, nil
}

// Backup sends data that is not a store, incomplete unless the fake is busy.
func (f *fake) Backup(_ *api.BackupRequest, stream grpc.ServerStreamingServer[api.BackupResponse]) error {
	if err := stream.Send(&api.BackupResponse{Data: make([]byte, 9000)}); err != nil || !f.busy {
		return err
	}
	return stream.Send(&api.BackupResponse{Size: 9000})
}

const agentID = "spiffe://example.org/spire/agent/join_token/T1"

func (f *fake) ListAgents(context.Context, *api.ListAgentsRequest) (*api.ListAgentsResponse, error) {
	if !f.busy {
		return &api.ListAgentsResponse{}, nil
	}
	return &api.ListAgentsResponse{ServerStartedAt: timestamppb.New(past), Agents: []*api.Agent{
		{Id: agentID, AttestationType: "join_token", Hostname: "node-1\x1b", Label: "rack 1", ExpiresAt: timestamppb.New(future), Version: "v1.2.3\x1b[31m", AppliedSequence: 7, LastReport: timestamppb.New(past)},
		{Id: agentID + "4", AttestationType: "join_token", ExpiresAt: timestamppb.New(future), Duplicated: true},
		{Id: "spiffe://example.org/spire/agent/x509pop/0abc", AttestationType: "x509pop", ExpiresAt: timestamppb.New(future), Reattestable: true, Selectors: []string{"x509pop:serialnumber:0abc", "x509pop:subject:cn:node-1"}},
		{Id: agentID + "2", AttestationType: "join_token", ExpiresAt: timestamppb.New(past)},
		{Id: agentID + "3", AttestationType: "join_token", ExpiresAt: timestamppb.New(future), Banned: true},
	}}, nil
}

func known(id string) error {
	if id != agentID {
		return status.Errorf(codes.NotFound, "agent %q is not attested", id)
	}
	return nil
}

func (f *fake) BanAgent(_ context.Context, r *api.BanAgentRequest) (*api.BanAgentResponse, error) {
	return &api.BanAgentResponse{}, known(r.GetAgentId())
}

func (f *fake) EvictAgent(_ context.Context, r *api.EvictAgentRequest) (*api.EvictAgentResponse, error) {
	if r.GetGone() {
		return &api.EvictAgentResponse{}, nil
	}
	return &api.EvictAgentResponse{}, known(r.GetAgentId())
}

func (f *fake) CreateJoinToken(_ context.Context, r *api.CreateJoinTokenRequest) (*api.CreateJoinTokenResponse, error) {
	if r.GetLabel() == "a\nb" {
		return nil, status.Errorf(codes.InvalidArgument, "label: %q has control characters or more than 255 characters", r.GetLabel())
	}
	return &api.CreateJoinTokenResponse{Token: "T-" + r.GetLabel() + r.GetScope().GetDeployment() + "-" + r.GetTtl().AsDuration().String(), ExpiresAt: timestamppb.New(future)}, nil
}

func (f *fake) GetBundle(context.Context, *api.GetBundleRequest) (*api.GetBundleResponse, error) {
	return &api.GetBundleResponse{Pem: []byte("-----BEGIN CERTIFICATE-----\n"), Sequence: 9}, nil
}

func (f *fake) ListEntries(_ context.Context, r *api.ListEntriesRequest) (*api.ListEntriesResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := &api.ListEntriesResponse{}
	if _, err := spiffeid.FromString(r.GetAgentId()); r.GetAgentId() != "" && err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "agent_id: %q is not a SPIFFE ID", r.GetAgentId())
	}
	for _, id := range slices.Sorted(maps.Keys(f.entries)) {
		if e := f.entries[id]; r.GetAgentId() == "" || e.GetParentId() == r.GetAgentId() {
			out.Entries = append(out.Entries, e)
		}
	}
	return out, nil
}

func (f *fake) ApplyEntries(_ context.Context, r *api.ApplyEntriesRequest) (*api.ApplyEntriesResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	out, next := &api.ApplyEntriesResponse{}, map[string]*api.Entry{}
	for _, e := range r.GetEntries() {
		next[e.GetId()] = e
		if slices.Contains(e.GetFederatesWith(), "unknown.example") {
			out.Warnings = append(out.Warnings, "entry "+e.GetId()+" is\nodd")
		}
	}
	ids := maps.Clone(next)
	maps.Copy(ids, f.entries)
	for _, id := range slices.Sorted(maps.Keys(ids)) {
		if proto.Equal(f.entries[id], next[id]) {
			out.Unchanged++
			continue
		}
		out.Changes = append(out.Changes, &api.EntryChange{Before: f.entries[id], After: next[id]})
	}
	if !r.GetDryRun() {
		f.entries = next
	}
	return out, nil
}

// strict rejects everything.
type strict struct {
	api.UnimplementedOperatorServer
}

func (strict) ListAgents(context.Context, *api.ListAgentsRequest) (*api.ListAgentsResponse, error) {
	return nil, status.Error(codes.PermissionDenied, "unix:uid:1000 is no reader")
}

func (strict) ApplyEntries(ctx context.Context, _ *api.ApplyEntriesRequest) (*api.ApplyEntriesResponse, error) {
	<-ctx.Done()
	return nil, status.FromContextError(ctx.Err()).Err()
}

func (strict) ListDeployments(context.Context, *api.ListDeploymentsRequest) (*api.ListDeploymentsResponse, error) {
	return &api.ListDeploymentsResponse{TrustDomain: "example.org"}, nil
}

func (strict) Backup(*api.BackupRequest, grpc.ServerStreamingServer[api.BackupResponse]) error {
	return status.Error(codes.PermissionDenied, "unix:uid:1000 is not in operators.managers")
}

func (strict) CreateJoinToken(context.Context, *api.CreateJoinTokenRequest) (*api.CreateJoinTokenResponse, error) {
	return nil, status.Error(codes.InvalidArgument, "there are several deployments: name one of east, west")
}
