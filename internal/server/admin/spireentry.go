package admin

import (
	"context"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/renewd/renewd/internal/server/spireapi"
)

// entryService is the part of SPIRE's Entry API that administrators use, so that
// "spire-server entry" and spire-controller-manager work with the admin socket. Statuses and
// their messages are those of SPIRE 1.13.3 (pkg/server/api/entry/v1 and its SQL datastore)
// where the entries of both servers are alike. A batch is stored in one step: each item has
// a status of its own, and if storage fails, so does the call.
type entryService struct {
	entryv1.UnimplementedEntryServer
	s *Service
}

// spireDeployment is the deployment that SPIRE's API serves if there are several: its
// requests cannot name one.
const spireDeployment = "default"

func (s *Service) spireDeployment() (*Deployment, error) {
	var served []*Deployment
	var names []string
	for i := range s.config.Deployments {
		if d := &s.config.Deployments[i]; !d.Retired {
			served, names = append(served, d), append(names, d.Name)
		}
	}
	if len(served) == 1 {
		return served[0], nil
	}
	if at := slices.Index(names, spireDeployment); at >= 0 {
		return served[at], nil
	}
	return nil, status.Errorf(codes.FailedPrecondition, "SPIRE's API cannot name one of the deployments %q, and none is %q: use \"server entries\"", names, spireDeployment)
}

// everyone is the parent of entries for every agent in SPIRE's API, which has none without a
// parent. No agent and no alias has this ID.
func (s *Service) everyone() spiffeid.ID {
	id, _ := spiffeid.FromSegments(s.config.TrustDomain, "spire", "agent") // the segments are valid
	return id
}

// CountEntries implements the service.
func (e *entryService) CountEntries(_ context.Context, req *entryv1.CountEntriesRequest) (*entryv1.CountEntriesResponse, error) {
	d, err := e.s.spireDeployment()
	if err != nil {
		return nil, err
	}
	list, match, err := e.s.filter(d.Server.EntrySet(), req.GetFilter())
	if err != nil {
		return nil, err
	}
	resp := &entryv1.CountEntriesResponse{}
	for _, entry := range list {
		if match(entry) {
			resp.Count++
		}
	}
	return resp, nil
}

// maxPageBytes is when a page of ListEntries ends before it has page_size entries: clients of
// gRPC accept messages of 4 MiB by default.
const maxPageBytes = 1 << 20

// ListEntries implements the service. It returns entries ordered by ID; a page token is the
// last ID of a page. A page with entries that were changed meanwhile has them as they are
// then.
func (e *entryService) ListEntries(_ context.Context, req *entryv1.ListEntriesRequest) (*entryv1.ListEntriesResponse, error) {
	d, err := e.s.spireDeployment()
	if err != nil {
		return nil, err
	}
	list, match, err := e.s.filter(d.Server.EntrySet(), req.GetFilter())
	if err != nil {
		return nil, err
	}
	resp := &entryv1.ListEntriesResponse{}
	paged, bytes := req.GetPageSize() > 0, 0
	if token := req.GetPageToken(); paged && token != "" {
		at, found := slices.BinarySearchFunc(list, token, func(e *spireapi.StoredEntry, id string) int { return strings.Compare(e.ID, id) })
		if found {
			at++
		}
		list = list[at:]
	}
	for _, entry := range list {
		if !match(entry) {
			continue
		}
		out := entry.Proto(e.s.everyone(), req.GetOutputMask())
		if n := len(resp.Entries); paged && n > 0 {
			if n == int(req.GetPageSize()) || bytes+proto.Size(out) > maxPageBytes {
				resp.NextPageToken = resp.Entries[n-1].GetId()
				break
			}
		}
		if paged {
			bytes += proto.Size(out)
		}
		resp.Entries = append(resp.Entries, out)
	}
	return resp, nil
}

// GetEntry implements the service.
func (e *entryService) GetEntry(_ context.Context, req *entryv1.GetEntryRequest) (*types.Entry, error) {
	d, err := e.s.spireDeployment()
	if err != nil {
		return nil, err
	}
	if req.GetId() == "" {
		return nil, status.Error(codes.InvalidArgument, "missing ID")
	}
	entry := d.Server.EntrySet().Entry(req.GetId())
	if entry == nil {
		return nil, status.Error(codes.NotFound, "entry not found")
	}
	return entry.Proto(e.s.everyone(), req.GetOutputMask()), nil
}

func itemStatus(code codes.Code, message string) *types.Status {
	return &types.Status{Code: int32(code), Message: message}
}

// edit changes entries by their place in a batch, in one step.
func (e *entryService) edit(ctx context.Context, items int, change func(c *spireapi.EntryEdit, i int) (*types.Entry, *types.Status)) ([]*types.Entry, []*types.Status, error) {
	d, err := e.s.spireDeployment()
	if err != nil {
		return nil, nil, err
	}
	entries, statuses := make([]*types.Entry, items), make([]*types.Status, items)
	diff, err := d.Server.EditEntries(ctx, func(c *spireapi.EntryEdit) error {
		for i := range items {
			// Looking for similar entries takes long if very many have one SPIFFE ID.
			if err := ctx.Err(); err != nil {
				return err
			}
			entries[i], statuses[i] = change(c, i)
		}
		return nil
	})
	if err != nil {
		return nil, nil, statusError(err)
	}
	var stored []spireapi.Entry
	for _, c := range diff.Changes {
		if c.After != nil {
			stored = append(stored, *c.After)
		}
	}
	for _, w := range e.s.warnings(stored) {
		e.s.log.Warn("entries probably do not do what was meant", "deployment", d.Name, "reason", w)
	}
	return entries, statuses, nil
}

// BatchCreateEntry implements the service.
func (e *entryService) BatchCreateEntry(ctx context.Context, req *entryv1.BatchCreateEntryRequest) (*entryv1.BatchCreateEntryResponse, error) {
	entries, statuses, err := e.edit(ctx, len(req.GetEntries()), func(c *spireapi.EntryEdit, i int) (*types.Entry, *types.Status) {
		in := req.GetEntries()[i]
		if in.GetSpiffeId().GetPath() == probePath {
			return answerProbe(in), itemStatus(codes.OK, "OK")
		}
		stored, st := e.create(c, in)
		if stored == nil {
			return nil, st
		}
		return stored.Proto(e.s.everyone(), req.GetOutputMask()), st
	})
	if err != nil {
		return nil, err
	}
	resp := &entryv1.BatchCreateEntryResponse{}
	for i, st := range statuses {
		resp.Results = append(resp.Results, &entryv1.BatchCreateEntryResponse_Result{Status: st, Entry: entries[i]})
	}
	return resp, nil
}

func (e *entryService) create(c *spireapi.EntryEdit, in *types.Entry) (*spireapi.StoredEntry, *types.Status) {
	entry := spireapi.Entry{ID: in.GetId()}
	if err := e.s.setFields(&entry, in, nil); err != nil {
		return nil, itemStatus(codes.InvalidArgument, "failed to convert entry: "+err.Error())
	}
	if similar := c.Similar(entry); similar != nil {
		return similar, itemStatus(codes.AlreadyExists, "similar entry already exists")
	}
	if entry.ID != "" && c.Entry(entry.ID) != nil {
		return nil, itemStatus(codes.AlreadyExists, "failed to create entry: the ID is that of another entry")
	}
	stored, err := c.Put(entry)
	if err != nil {
		return nil, itemStatus(codes.InvalidArgument, "failed to create entry: "+err.Error())
	}
	return stored, itemStatus(codes.OK, "OK")
}

// probePath is the path of the SPIFFE ID of an entry that spire-controller-manager creates every
// 10 minutes and deletes at once, to learn which fields of entries the server knows: it
// compares the answer with what it has sent (0.6, pkg/spireapi/entryapi.go). One field is
// store_svid, and the lifetime of an X.509-SVID is a minute.
const probePath = "/spire-controller-manager/unsupported-fields-test"

// answerProbe returns the probe without the field that the server does not have. Nothing is
// stored.
func answerProbe(in *types.Entry) *types.Entry {
	out := proto.CloneOf(in)
	out.Id, out.StoreSvid = "entry-probe", false
	return out
}

// BatchUpdateEntry implements the service.
func (e *entryService) BatchUpdateEntry(ctx context.Context, req *entryv1.BatchUpdateEntryRequest) (*entryv1.BatchUpdateEntryResponse, error) {
	entries, statuses, err := e.edit(ctx, len(req.GetEntries()), func(c *spireapi.EntryEdit, i int) (*types.Entry, *types.Status) {
		stored, st := e.update(c, req.GetEntries()[i], req.GetInputMask())
		if stored == nil {
			return nil, st
		}
		return stored.Proto(e.s.everyone(), req.GetOutputMask()), st
	})
	if err != nil {
		return nil, err
	}
	resp := &entryv1.BatchUpdateEntryResponse{}
	for i, st := range statuses {
		resp.Results = append(resp.Results, &entryv1.BatchUpdateEntryResponse_Result{Status: st, Entry: entries[i]})
	}
	return resp, nil
}

func (e *entryService) update(c *spireapi.EntryEdit, in *types.Entry, mask *types.EntryMask) (*spireapi.StoredEntry, *types.Status) {
	old := c.Entry(in.GetId())
	entry := spireapi.Entry{ID: in.GetId()}
	if old != nil {
		entry = old.Entry
	}
	if err := e.s.setFields(&entry, in, mask); err != nil {
		return nil, itemStatus(codes.InvalidArgument, "failed to convert entry: "+err.Error())
	}
	if old == nil {
		return nil, itemStatus(codes.NotFound, "failed to update entry")
	}
	// The consent was to that operator's entry.
	entry.Operator = entry.Operator && entry.SPIFFEID == old.SPIFFEID
	stored, err := c.Put(entry)
	if err != nil {
		return nil, itemStatus(codes.InvalidArgument, "failed to update entry: "+err.Error())
	}
	return stored, itemStatus(codes.OK, "OK")
}

// BatchDeleteEntry implements the service. It names each entry, so the number of entries that
// it removes is not limited.
func (e *entryService) BatchDeleteEntry(ctx context.Context, req *entryv1.BatchDeleteEntryRequest) (*entryv1.BatchDeleteEntryResponse, error) {
	ids := req.GetIds()
	_, statuses, err := e.edit(ctx, len(ids), func(c *spireapi.EntryEdit, i int) (*types.Entry, *types.Status) {
		switch {
		case ids[i] == "":
			return nil, itemStatus(codes.InvalidArgument, "missing entry ID")
		case !c.Delete(ids[i]):
			return nil, itemStatus(codes.NotFound, "entry not found")
		}
		return nil, itemStatus(codes.OK, "OK")
	})
	if err != nil {
		return nil, err
	}
	resp := &entryv1.BatchDeleteEntryResponse{}
	for i, st := range statuses {
		resp.Results = append(resp.Results, &entryv1.BatchDeleteEntryResponse_Result{Status: st, Id: ids[i]})
	}
	return resp, nil
}
