package spireapi_test

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/test/memory"
)

type syncStream = entryv1.Entry_SyncAuthorizedEntriesClient

func openSync(t *testing.T, c *client, req *entryv1.SyncAuthorizedEntriesRequest) syncStream {
	t.Helper()
	stream, err := c.SyncAuthorizedEntries(t.Context())
	if err == nil {
		err = stream.Send(req)
	}
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

// receive reads messages until the last one of an answer.
func receive(t *testing.T, stream syncStream) (revisions []*entryv1.EntryRevision, entries []*types.Entry, pages []int) {
	t.Helper()
	for {
		resp, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		revisions = append(revisions, resp.GetEntryRevisions()...)
		entries = append(entries, resp.GetEntries()...)
		pages = append(pages, len(resp.GetEntryRevisions())+len(resp.GetEntries()))
		if !resp.GetMore() {
			return revisions, entries, pages
		}
	}
}

var syncMask = &types.EntryMask{SpiffeId: true, RevisionNumber: true}

func TestSyncOfOnePage(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		_, c := s.join(t)
		for _, n := range []int{0, 1, 500} {
			s.apply(t, many(n))
			stream := openSync(t, c, &entryv1.SyncAuthorizedEntriesRequest{OutputMask: syncMask})
			revisions, entries, pages := receive(t, stream)
			if len(revisions) > 0 || len(entries) != n || len(pages) != 1 {
				t.Errorf("%d entries: got %d and %d revisions in pages of %v", n, len(entries), len(revisions), pages)
			}
			for _, e := range entries {
				if e.GetSpiffeId() == nil || e.GetRevisionNumber() == 0 || e.GetSelectors() != nil {
					t.Fatalf("the mask does not hold for %v", e)
				}
			}
			if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
				t.Errorf("after the full list: %v", err)
			}
		}
	})
}

func TestSyncOfManyPages(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		caller, c := s.join(t)
		s.apply(t, many(1001))
		all := s.fetch(t, caller)
		stream := openSync(t, c, &entryv1.SyncAuthorizedEntriesRequest{OutputMask: syncMask})
		revisions, entries, pages := receive(t, stream)
		if len(revisions) != 1001 || len(entries) > 0 || !slices.Equal(pages, []int{500, 500, 1}) {
			t.Fatalf("%d revisions and %d entries in pages of %v", len(revisions), len(entries), pages)
		}
		ids := make([]string, len(revisions))
		for i, r := range revisions {
			ids[i] = r.GetId()
			if e := all[r.GetId()]; r.GetRevisionNumber() != e.GetRevisionNumber() || r.GetCreatedAt() != e.GetCreatedAt() {
				t.Fatalf("revision %v of entry %v", r, e)
			}
		}
		ask := func(ids []string, want ...int) []*types.Entry {
			t.Helper()
			if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{Ids: ids}); err != nil {
				t.Fatal(err)
			}
			_, entries, pages := receive(t, stream)
			if !slices.Equal(pages, want) {
				t.Errorf("asked for %d: pages of %v, want %v", len(ids), pages, want)
			}
			return entries
		}
		ask(ids[:500], 500)
		ask(ids[1000:], 1)
		ask([]string{"unknown"}, 0)
		got := ask([]string{ids[7], "unknown", ids[3]}, 2)
		for _, e := range got {
			if e.GetSpiffeId().GetPath() != "/workload/"+e.GetId() || e.GetSelectors() != nil {
				t.Errorf("entry %v", e)
			}
		}
		ask(slices.Repeat(ids[:1], 500), 1) // named 500 times, answered once
		if err := stream.CloseSend(); err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
			t.Errorf("after the end: %v", err)
		}
		stream = openSync(t, c, &entryv1.SyncAuthorizedEntriesRequest{OutputMask: syncMask})
		receive(t, stream)
		if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{Ids: ids[:501]}); err != nil {
			t.Fatal(err)
		}
		_, err := stream.Recv()
		wantCode(t, err, codes.InvalidArgument)
	})
}

// TestSyncOfLargeEntries: a client with gRPC's default limit of 4 MiB receives the
// largest entries, as many in one message as fit, and an entry that is older than
// the limit of their size.
func TestSyncOfLargeEntries(t *testing.T) {
	t.Parallel()
	large := func(bytes int) func(*spireapi.Entry) {
		return func(e *spireapi.Entry) {
			e.Selectors = append(e.Selectors, spireapi.Selector{Type: "k8s", Value: strings.Repeat("x", bytes)})
		}
	}
	storage := memory.NewServer()
	entries := make([]spireapi.StoredEntry, 400)
	for i := range entries {
		entries[i].Entry = entry(fmt.Sprintf("e%05d", i), large(20_000))
		entries[i].Revision = 1
	}
	entries[7].Entry = entry("e00007", large(2_000_000))
	if err := storage.PutEntries(t.Context(), entries, nil); err != nil {
		t.Fatal(err)
	}
	bubble(t, spireapi.Config{Storage: storage}, func(t *testing.T, s *running) {
		_, c := s.join(t)
		mask := &types.EntryMask{Selectors: true, RevisionNumber: true}
		stream := openSync(t, c, &entryv1.SyncAuthorizedEntriesRequest{OutputMask: mask})
		revisions, full, pages := receive(t, stream)
		if len(revisions) != 400 || len(full) > 0 {
			t.Fatalf("%d revisions and %d entries in pages of %v, want revisions", len(revisions), len(full), pages)
		}
		ids := make([]string, len(revisions))
		for i, r := range revisions {
			ids[i] = r.GetId()
		}
		for _, tt := range []struct {
			ids   []string
			pages []int
		}{
			// 52 entries of 20 KB are a MiB.
			{ids, []int{7, 1, 52, 52, 52, 52, 52, 52, 52, 28}},
			{ids[7:10], []int{1, 2}}, // no page is empty
			{ids[7:8], []int{1}},
		} {
			if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{Ids: tt.ids}); err != nil {
				t.Fatal(err)
			}
			if _, full, pages = receive(t, stream); len(full) != len(tt.ids) || !slices.Equal(pages, tt.pages) {
				t.Errorf("%d entries in pages of %v, want pages of %v", len(full), pages, tt.pages)
			}
		}

		// Without the large fields they fit one page.
		revisions, full, pages = receive(t, openSync(t, c, &entryv1.SyncAuthorizedEntriesRequest{OutputMask: syncMask}))
		if len(revisions) > 0 || len(full) != 400 || len(pages) != 1 {
			t.Errorf("%d revisions and %d entries in pages of %v, want one page", len(revisions), len(full), pages)
		}
	})
}

func TestSyncRefuses(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		_, c := s.join(t)
		for name, req := range map[string]*entryv1.SyncAuthorizedEntriesRequest{
			"names entries":   {Ids: []string{"a"}},
			"masked revision": {OutputMask: &types.EntryMask{SpiffeId: true}},
		} {
			_, err := openSync(t, c, req).Recv()
			t.Log(name, err)
			wantCode(t, err, codes.InvalidArgument)
		}
	})
}
