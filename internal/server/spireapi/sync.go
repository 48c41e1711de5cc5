package spireapi

import (
	"context"
	"errors"
	"io"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

type entryService struct {
	entryv1.UnimplementedEntryServer
	s *Server
}

func (e *entryService) GetAuthorizedEntries(ctx context.Context, req *entryv1.GetAuthorizedEntriesRequest) (*entryv1.GetAuthorizedEntriesResponse, error) {
	agent, err := callingAgent(ctx)
	if err != nil {
		return nil, err
	}
	entries := e.s.EntrySet().Authorized(agent)
	resp := &entryv1.GetAuthorizedEntriesResponse{Entries: make([]*types.Entry, len(entries))}
	for i, entry := range entries {
		resp.Entries[i] = entry.Proto(agent.ID, req.GetOutputMask())
	}
	return resp, nil
}

// SyncAuthorizedEntries answers the first request, which has an output mask only,
// with all entries if they fit one page (of pageSize entries and pageBytes), and
// with their revisions otherwise. Then it answers each request with the entries
// that it names, at most pageSize and each of them once, until the agent closes the
// stream. All answers are from the same set of entries.
func (e *entryService) SyncAuthorizedEntries(stream grpc.BidiStreamingServer[entryv1.SyncAuthorizedEntriesRequest, entryv1.SyncAuthorizedEntriesResponse]) error {
	agent, err := callingAgent(stream.Context())
	if err != nil {
		return err
	}
	req, err := stream.Recv()
	if err != nil {
		return streamError(err)
	}
	mask := req.GetOutputMask()
	switch {
	case len(req.GetIds()) > 0:
		return status.Error(codes.InvalidArgument, "the first request must not name entries")
	case mask != nil && !mask.GetRevisionNumber():
		return status.Error(codes.InvalidArgument, "the revision number must not be masked")
	}
	entries := e.s.EntrySet().Authorized(agent)
	if len(entries) <= pageSize {
		p := newPage(len(entries))
		for _, entry := range entries {
			p.add(entry.Proto(agent.ID, mask))
		}
		if p.bytes <= pageBytes {
			return stream.Send(p.resp)
		}
	}
	revisions := make([]*entryv1.EntryRevision, len(entries))
	for i, entry := range entries {
		revisions[i] = &entryv1.EntryRevision{Id: entry.ID, RevisionNumber: entry.Revision, CreatedAt: entry.CreatedAt.Unix()}
	}
	for from := 0; from < len(revisions); from += pageSize {
		to := min(from+pageSize, len(revisions))
		err := stream.Send(&entryv1.SyncAuthorizedEntriesResponse{EntryRevisions: revisions[from:to], More: to < len(revisions)})
		if err != nil {
			return err
		}
	}
	for {
		req, err := stream.Recv()
		if err != nil {
			return streamError(err)
		}
		// SPIRE's agents ask for as many as are in the first page of revisions.
		if n := len(req.GetIds()); n > pageSize {
			return status.Errorf(codes.InvalidArgument, "request names %d entries: name at most %d", n, pageSize)
		}
		p := newPage(len(req.GetIds()))
		answered := make(map[string]bool, len(req.GetIds()))
		for _, entryID := range req.GetIds() {
			at, found := search(entries, entryID)
			if !found || answered[entryID] {
				continue // does not exist, is of another agent, or was named before
			}
			answered[entryID] = true
			out := entries[at].Proto(agent.ID, mask)
			if !p.fits(out) {
				p.resp.More = true
				if err := stream.Send(p.resp); err != nil {
					return err
				}
				p = newPage(pageSize)
			}
			p.add(out)
		}
		if err := stream.Send(p.resp); err != nil {
			return err
		}
	}
}

// page is one message of entries.
type page struct {
	resp  *entryv1.SyncAuthorizedEntriesResponse
	bytes int
}

func newPage(capacity int) *page {
	return &page{resp: &entryv1.SyncAuthorizedEntriesResponse{Entries: make([]*types.Entry, 0, capacity)}}
}

// fits reports whether the page has room for an entry. An empty page has room for
// any: stored entries may be older than the limit of their size.
func (p *page) fits(e *types.Entry) bool {
	n := len(p.resp.Entries)
	return n == 0 || n < pageSize && p.bytes+proto.Size(e) <= pageBytes
}

func (p *page) add(e *types.Entry) {
	p.resp.Entries, p.bytes = append(p.resp.Entries, e), p.bytes+proto.Size(e)
}

// streamError returns the error that ends a stream, nil for a regular end.
func streamError(err error) error {
	if errors.Is(err, io.EOF) || status.Code(err) == codes.Canceled {
		return nil
	}
	return err
}
