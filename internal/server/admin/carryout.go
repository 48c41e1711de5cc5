package admin

import (
	"cmp"
	"context"
	"path"
	"strings"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/server/detach"
	"github.com/renewd/renewd/internal/server/detach/rpc"
	"github.com/renewd/renewd/internal/server/keyset"
)

// mutationTimeout limits the calls of managers, including backups. Package keyset limits its
// steps likewise, for other callers.
const mutationTimeout = 120 * time.Second

// interceptUnary limits calls in time and logs mutations. If the caller disconnects before
// a change is stored, it is not made.
func (s *Service) interceptUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if sentAt, ok := api.SentAt(ctx); ok {
		s.config.Heard(keyset.Actor(ctx), sentAt)
	}
	ctx, cancel := context.WithTimeout(ctx, mutationTimeout)
	defer cancel()
	if roles[info.FullMethod] != Manager {
		resp, err := detach.Do(ctx, &s.calls, func() (any, error) { return handler(ctx, req) })
		return resp, rpc.Error(err)
	}
	if strings.HasPrefix(info.FullMethod, "/"+entryv1.Entry_ServiceDesc.ServiceName+"/") {
		ctx = keyset.WithNote(ctx, "SPIRE's Entry API")
	}
	begin := s.now()
	// Wait for the result even if the caller disconnects, and log it.
	deadline, _ := ctx.Deadline()
	waitCtx, cancelWait := context.WithDeadline(context.WithoutCancel(ctx), deadline)
	defer cancelWait()
	resp, err := detach.Do(waitCtx, &s.calls, func() (any, error) { return handler(ctx, req) })
	err = rpc.Error(err)
	log := s.log.With("actor", keyset.Actor(ctx), "operation", path.Base(info.FullMethod))
	log = log.With(s.logAttrs(req, resp)...).With("outcome", status.Code(err).String(), "duration", s.now().Sub(begin))
	if err != nil {
		log.Warn("operator change failed", "error", status.Convert(err).Message())
		return nil, err
	}
	log.Info("operator change completed")
	return resp, nil
}

// logAttrs returns the log attributes of a mutation.
func (s *Service) logAttrs(req, resp any) (attrs []any) {
	if r, ok := req.(scoped); ok {
		name := r.GetScope().GetDeployment()
		if d, err := s.find(r); err == nil {
			name = d.Name
		}
		attrs = append(attrs, "deployment", name)
	}
	if r, ok := req.(interface{ GetKeysetId() string }); ok {
		attrs = append(attrs, "keyset_id", r.GetKeysetId())
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
		attrs = append(attrs, "entry_id", r.GetEntry().GetId())
	case *api.DeleteEntryRequest:
		attrs = append(attrs, "entry_id", r.GetId())
	case *api.ApplyEntriesRequest:
		attrs = append(attrs, "entries", len(r.GetEntries()), "dry_run", r.GetDryRun())
		if r.Remove != nil {
			attrs = append(attrs, "remove", r.GetRemove())
		}
	}
	switch r := resp.(type) {
	case *entryv1.BatchCreateEntryResponse:
		attrs = append(attrs, batchAttrs(s, r.GetResults(), func(r *entryv1.BatchCreateEntryResponse_Result) string { return r.GetEntry().GetId() })...)
	case *entryv1.BatchUpdateEntryResponse:
		attrs = append(attrs, batchAttrs(s, r.GetResults(), func(r *entryv1.BatchUpdateEntryResponse_Result) string { return r.GetEntry().GetId() })...)
	case *entryv1.BatchDeleteEntryResponse:
		attrs = append(attrs, batchAttrs(s, r.GetResults(), (*entryv1.BatchDeleteEntryResponse_Result).GetId)...)
	case *api.PrepareKeysetResponse:
		attrs = append(attrs, "keyset_id", r.GetKeyset().GetId())
	case *api.ApplyEntriesResponse:
		attrs = append(attrs, "changed", len(r.GetChanges()))
	}
	return attrs
}

// maxLoggedEntries is how many entries of a batch a log line names.
const maxLoggedEntries = 10

// batchAttrs returns the log attributes of a batch of SPIRE's Entry API: the first entries that
// it changed, and how many items failed, with the first failure.
func batchAttrs[R interface{ GetStatus() *types.Status }](s *Service, results []R, id func(R) string) (attrs []any) {
	var ids []string
	failed, failure := 0, ""
	for _, r := range results {
		if st := r.GetStatus(); codes.Code(st.GetCode()) != codes.OK {
			failed, failure = failed+1, cmp.Or(failure, st.GetMessage())
		} else if len(ids) < maxLoggedEntries {
			ids = append(ids, id(r))
		}
	}
	if d, err := s.spireDeployment(); err == nil {
		attrs = append(attrs, "deployment", d.Name)
	}
	attrs = append(attrs, "entries", len(results), "entry_ids", strings.Join(ids, " "))
	if failed > 0 {
		attrs = append(attrs, "failed", failed, "error", failure)
	}
	return attrs
}
