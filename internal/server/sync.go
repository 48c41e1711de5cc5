package server

import (
	"context"
	"errors"
	"io"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

type entryService struct {
	entryv1.UnimplementedEntryServer
	s *Server
}

func (e *entryService) GetAuthorizedEntries(ctx context.Context, req *entryv1.GetAuthorizedEntriesRequest) (*entryv1.GetAuthorizedEntriesResponse, error) {
	id, err := caller(ctx)
	if err != nil {
		return nil, err
	}
	entries := e.s.entries.Load().authorized(id)
	resp := &entryv1.GetAuthorizedEntriesResponse{Entries: make([]*types.Entry, len(entries))}
	for i, entry := range entries {
		resp.Entries[i] = entry.proto(id, req.GetOutputMask())
	}
	return resp, nil
}

// SyncAuthorizedEntries answers a first request, which has an output mask
// only, with all entries or, where they do not fit one page, with their
// revisions. Then it answers each request with the entries it names, until
// the agent closes the stream. All answers are of the moment of the first.
func (e *entryService) SyncAuthorizedEntries(stream grpc.BidiStreamingServer[entryv1.SyncAuthorizedEntriesRequest, entryv1.SyncAuthorizedEntriesResponse]) error {
	id, err := caller(stream.Context())
	if err != nil {
		return err
	}
	req, err := stream.Recv()
	if err != nil {
		return ended(err)
	}
	mask := req.GetOutputMask()
	switch {
	case len(req.GetIds()) > 0:
		return status.Error(codes.InvalidArgument, "the first request must not name entries")
	case mask != nil && !mask.GetRevisionNumber():
		return status.Error(codes.InvalidArgument, "the revision number must not be masked")
	}
	set := e.s.entries.Load()
	entries := set.authorized(id)
	if len(entries) <= pageSize {
		resp := &entryv1.SyncAuthorizedEntriesResponse{Entries: make([]*types.Entry, len(entries))}
		for i, entry := range entries {
			resp.Entries[i] = entry.proto(id, mask)
		}
		return stream.Send(resp)
	}
	revisions := make([]*entryv1.EntryRevision, len(entries))
	for i, entry := range entries {
		revisions[i] = &entryv1.EntryRevision{Id: entry.ID, RevisionNumber: entry.Revision, CreatedAt: entry.CreatedAt.Unix()}
	}
	err = pages(revisions, func(page []*entryv1.EntryRevision, more bool) error {
		return stream.Send(&entryv1.SyncAuthorizedEntriesResponse{EntryRevisions: page, More: more})
	})
	if err != nil {
		return err
	}
	for {
		req, err := stream.Recv()
		if err != nil {
			return ended(err)
		}
		// An entry that is not there, or not for this agent, is left out.
		wanted := make([]*StoredEntry, 0, len(req.GetIds()))
		for _, entryID := range req.GetIds() {
			if entry := set.find(id, entryID); entry != nil {
				wanted = append(wanted, entry)
			}
		}
		err = pages(wanted, func(page []*StoredEntry, more bool) error {
			resp := &entryv1.SyncAuthorizedEntriesResponse{Entries: make([]*types.Entry, len(page)), More: more}
			for i, entry := range page {
				resp.Entries[i] = entry.proto(id, mask)
			}
			return stream.Send(resp)
		})
		if err != nil {
			return err
		}
	}
}

// pages calls send for each page of items, and once when there are none.
func pages[T any](items []T, send func(page []T, more bool) error) error {
	for {
		n := min(len(items), pageSize)
		more := len(items) > n
		if err := send(items[:n], more); err != nil || !more {
			return err
		}
		items = items[n:]
	}
}

// ended turns the regular ends of a stream into success.
func ended(err error) error {
	if errors.Is(err, io.EOF) || status.Code(err) == codes.Canceled {
		return nil
	}
	return err
}
