package admin

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/server/keyset"
)

const (
	// maxAudit limits the records in an answer, and how many are read at a time.
	maxAudit = 1000
	// maxAuditBytes is when an answer ends before that: clients of gRPC accept messages
	// of 4 MiB by default. A record that is larger is an answer of its own.
	maxAuditBytes = 1 << 20
)

// The kinds of records.
const (
	kindKeysets = "keysets"
	kindClock   = "clock"
	kindBackups = "backups"
	kindEntries = "entries"
	kindTokens  = "tokens"
	kindAgents  = "agents"
)

var kinds = []string{kindKeysets, kindEntries, kindTokens, kindAgents, kindBackups, kindClock}

func (r *AuditRecord) kind() string {
	switch {
	case r.Entry != nil:
		return kindEntries
	case r.Token != nil:
		return kindTokens
	case r.Agent != nil:
		return kindAgents
	case r.Operation == "confirm clock":
		return kindClock
	case r.Operation == "backup" || r.Operation == "restore":
		return kindBackups
	}
	return kindKeysets
}

// ReadAudit implements the service.
func (s *Service) ReadAudit(ctx context.Context, req *api.ReadAuditRequest) (*api.ReadAuditResponse, error) {
	d, err := s.find(req)
	if err != nil {
		return nil, err
	}
	for _, kind := range req.GetKinds() {
		if !slices.Contains(kinds, kind) {
			return nil, status.Errorf(codes.InvalidArgument, "kinds: there is no kind %.64q, only %q", kind, kinds)
		}
	}
	limit := int(req.GetLimit())
	if limit == 0 || limit > maxAudit {
		limit = maxAudit
	}
	resp, bytes := &api.ReadAuditResponse{}, 0
	for after := req.GetAfter(); ; {
		records, err := d.Audit(ctx, after, maxAudit)
		if err != nil {
			return nil, statusError(fmt.Errorf("read the audit log: %w", err))
		}
		for i := range records {
			r := &records[i]
			if len(req.GetKinds()) > 0 && !slices.Contains(req.GetKinds(), r.kind()) {
				continue
			}
			out := protoAudit(r)
			bytes += proto.Size(out)
			if n := len(resp.Records); n == limit || n > 0 && bytes > maxAuditBytes {
				return resp, nil
			}
			resp.Records = append(resp.Records, out)
		}
		if len(records) < maxAudit {
			return resp, nil
		}
		after = records[len(records)-1].Number
	}
}

func protoAudit(r *AuditRecord) *api.AuditRecord {
	out := &api.AuditRecord{
		Number: r.Number, At: protoTime(r.At), Actor: r.Actor, Operation: r.Operation, KeysetId: r.KeysetID,
		Before: auditStates(r.Before), After: auditStates(r.After), Note: r.Note, Kind: r.kind(),
	}
	if c := r.Entry; c != nil {
		out.Entry = protoChange(*c)
	}
	if t := r.Token; t != nil {
		out.Token = &api.AuditToken{Label: t.Label, ExpiresAt: protoTime(t.ExpiresAt)}
	}
	if a := r.Agent; a != nil {
		out.Agent = &api.AuditAgent{Id: a.ID, Before: a.Before, After: a.After, Gone: a.Gone, Hostname: a.Hostname, Label: a.Label}
	}
	return out
}

func auditStates(of map[string]keyset.State) []*api.AuditState {
	var out []*api.AuditState
	for _, id := range slices.Sorted(maps.Keys(of)) {
		out = append(out, &api.AuditState{KeysetId: id, State: states[of[id]]})
	}
	return out
}
