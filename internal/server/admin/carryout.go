package admin

import (
	"context"
	"path"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/server/detach"
	"github.com/renewd/renewd/internal/server/detach/rpc"
	"github.com/renewd/renewd/internal/server/keyset"
)

// mutationTime bounds whatever a manager asks for, a backup included. Package keyset bounds its
// steps likewise, for those who do not come this way.
const mutationTime = 120 * time.Second

// carryOut bounds a mutation and writes its line in the log. A caller that is
// lost before the change is stored takes it back; after that it has happened.
func (s *Service) carryOut(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if sentAt, ok := api.SentAt(ctx); ok {
		s.config.Heard(keyset.Actor(ctx), sentAt)
	}
	ctx, cancel := context.WithTimeout(ctx, mutationTime)
	defer cancel()
	if roles[info.FullMethod] != Manager {
		resp, err := detach.Do(ctx, &s.calls, func() (any, error) { return handler(ctx, req) })
		return resp, rpc.Error(err)
	}
	begin := s.now()
	// A caller who is gone does not end the wait: how it ended is worth its line.
	deadline, _ := ctx.Deadline()
	stays, leaves := context.WithDeadline(context.WithoutCancel(ctx), deadline)
	defer leaves()
	resp, err := detach.Do(stays, &s.calls, func() (any, error) { return handler(ctx, req) })
	err = rpc.Error(err)
	log := s.log.With("actor", keyset.Actor(ctx), "operation", path.Base(info.FullMethod))
	log = log.With(s.about(req, resp)...).With("outcome", status.Code(err).String(), "took", s.now().Sub(begin))
	if err != nil {
		log.Warn("operator's change failed", "error", status.Convert(err).Message())
		return nil, err
	}
	log.Info("operator's change done")
	return resp, nil
}

// about names what a mutation was about, for the log.
func (s *Service) about(req, resp any) (attrs []any) {
	if r, ok := req.(scoped); ok {
		name := r.GetScope().GetDeployment()
		if d, err := s.find(r); err == nil {
			name = d.Name
		}
		attrs = append(attrs, "deployment", name)
	}
	if r, ok := req.(interface{ GetKeysetId() string }); ok {
		attrs = append(attrs, "keyset", r.GetKeysetId())
	}
	if r, ok := req.(interface{ GetAgentId() string }); ok {
		attrs = append(attrs, "agent_id", r.GetAgentId())
	}
	switch r := req.(type) {
	case *api.RemoveKeysetRequest:
		attrs = append(attrs, "force", r.GetForce())
	case *api.EvictAgentRequest:
		attrs = append(attrs, "gone", r.GetGone())
	case *api.PutEntryRequest:
		attrs = append(attrs, "entry", r.GetEntry().GetId())
	case *api.DeleteEntryRequest:
		attrs = append(attrs, "entry", r.GetId())
	case *api.ApplyEntriesRequest:
		attrs = append(attrs, "entries", len(r.GetEntries()), "dry_run", r.GetDryRun())
		if r.Remove != nil {
			attrs = append(attrs, "remove", r.GetRemove())
		}
	}
	switch r := resp.(type) {
	case *api.PrepareKeysetResponse:
		attrs = append(attrs, "keyset", r.GetKeyset().GetId())
	case *api.ApplyEntriesResponse:
		attrs = append(attrs, "changed", len(r.GetChanges()))
	}
	return attrs
}
