package server_test

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/renewd/renewd/internal/server"
)

var partner = spiffeid.RequireTrustDomainFromString("partner.org")

// many makes n entries whose IDs are in order.
func many(n int) []server.Entry {
	entries := make([]server.Entry, n)
	for i := range entries {
		entries[i] = entry(fmt.Sprintf("e%05d", i))
	}
	return entries
}

func TestEntryFieldsAndMask(t *testing.T) {
	t.Parallel()
	bubble(t, server.Config{}, func(t *testing.T, s *running) {
		who, c := s.join(t)
		full := entry("a", func(e *server.Entry) {
			e.ParentID, e.Hint, e.X509TTL, e.JWTTTL = who.id, "main", 2*time.Hour, 5*time.Minute
			e.Selectors = []server.Selector{{"unix", "uid:2"}, {"unix", "gid:1"}}
			e.FederatesWith = []spiffeid.TrustDomain{partner}
		})
		if err := s.SetEntries(t.Context(), []server.Entry{full}); err != nil {
			t.Fatal(err)
		}
		want := &types.Entry{
			Id: "a", SpiffeId: &types.SPIFFEID{TrustDomain: "example.org", Path: "/workload/a"},
			ParentId:    &types.SPIFFEID{TrustDomain: "example.org", Path: who.id.Path()},
			Selectors:   []*types.Selector{{Type: "unix", Value: "gid:1"}, {Type: "unix", Value: "uid:2"}},
			X509SvidTtl: 7200, JwtSvidTtl: 300, FederatesWith: []string{"partner.org"}, Hint: "main",
			RevisionNumber: 1, CreatedAt: time.Now().Unix(),
		}
		if got := s.fetch(t, who)["a"]; !proto.Equal(got, want) {
			t.Errorf("entry\n%v, want\n%v", got, want)
		}
		resp, err := c.GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{
			OutputMask: &types.EntryMask{SpiffeId: true, Hint: true},
		})
		if err != nil {
			t.Fatal(err)
		}
		masked := &types.Entry{Id: want.Id, SpiffeId: want.SpiffeId, Hint: want.Hint}
		if got := resp.GetEntries()[0]; !proto.Equal(got, masked) {
			t.Errorf("masked entry %v, want %v", got, masked)
		}
	})
}

func TestEntriesBelongToTheirParent(t *testing.T) {
	t.Parallel()
	bubble(t, server.Config{}, func(t *testing.T, s *running) {
		one, _ := s.join(t)
		two, _ := s.join(t)
		err := s.SetEntries(t.Context(), []server.Entry{
			entry("all"),
			entry("one", func(e *server.Entry) { e.ParentID = one.id }),
			entry("two", func(e *server.Entry) { e.ParentID = two.id }),
		})
		if err != nil {
			t.Fatal(err)
		}
		for who, own := range map[*identity]string{one: "one", two: "two"} {
			got := s.fetch(t, who)
			if len(got) != 2 || got["all"] == nil || got[own] == nil {
				t.Errorf("agent %s has %v", own, got)
			}
			for _, e := range got {
				if e.GetParentId().GetPath() != who.id.Path() {
					t.Errorf("parent of %s is %v", e.GetId(), e.GetParentId())
				}
			}
		}
	})
}

func TestRevisions(t *testing.T) {
	t.Parallel()
	bubble(t, server.Config{}, func(t *testing.T, s *running) {
		who, _ := s.join(t)
		revision := func(id string) int64 {
			t.Helper()
			e, ok := s.fetch(t, who)[id]
			if !ok {
				t.Fatalf("no entry %s", id)
			}
			return e.GetRevisionNumber()
		}
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		a, b := entry("a"), entry("b")
		a.Selectors = append(a.Selectors, server.Selector{Type: "unix", Value: "gid:1"})
		must(s.SetEntries(t.Context(), []server.Entry{a, b}))
		ra, rb := revision("a"), revision("b")

		// The same in another order is the same.
		slices.Reverse(a.Selectors)
		must(s.SetEntries(t.Context(), []server.Entry{b, a}))
		if revision("a") != ra || revision("b") != rb {
			t.Error("what did not change has a new revision")
		}
		created := s.fetch(t, who)["a"].GetCreatedAt()
		time.Sleep(time.Hour)
		a.Hint = "x"
		must(s.UpsertEntry(t.Context(), a))
		if got := s.fetch(t, who)["a"]; got.GetRevisionNumber() <= ra || revision("b") != rb || got.GetCreatedAt() != created {
			t.Errorf("after a change of a: %v", got)
		}
		ra = revision("a")
		must(s.DeleteEntry(t.Context(), "a"))
		if _, ok := s.fetch(t, who)["a"]; ok {
			t.Error("deleted, but still there")
		}
		if err := s.DeleteEntry(t.Context(), "a"); !errors.Is(err, server.ErrNotFound) {
			t.Errorf("deleted twice: %v", err)
		}
		must(s.UpsertEntry(t.Context(), a))
		if got := s.fetch(t, who)["a"]; got.GetRevisionNumber() <= ra || got.GetCreatedAt() == created {
			t.Errorf("an ID that is used again: %v, the old revision was %d", got, ra)
		}
	})
}

func TestWrongEntriesChangeNothing(t *testing.T) {
	t.Parallel()
	bubble(t, server.Config{}, func(t *testing.T, s *running) {
		who, _ := s.join(t)
		if err := s.SetEntries(t.Context(), []server.Entry{entry("a")}); err != nil {
			t.Fatal(err)
		}
		foreign := spiffeid.RequireFromString("spiffe://partner.org/x")
		for name, change := range map[string]func(*server.Entry){
			"no ID":               func(e *server.Entry) { e.ID = "" },
			"no SPIFFE ID":        func(e *server.Entry) { e.SPIFFEID = spiffeid.ID{} },
			"foreign SPIFFE ID":   func(e *server.Entry) { e.SPIFFEID = foreign },
			"no path":             func(e *server.Entry) { e.SPIFFEID = td.ID() },
			"reserved path":       func(e *server.Entry) { e.SPIFFEID = serverID },
			"foreign parent":      func(e *server.Entry) { e.ParentID = foreign },
			"no selectors":        func(e *server.Entry) { e.Selectors = nil },
			"malformed selector":  func(e *server.Entry) { e.Selectors = []server.Selector{{Type: "unix"}} },
			"short X.509 TTL":     func(e *server.Entry) { e.X509TTL = time.Minute },
			"long X.509 TTL":      func(e *server.Entry) { e.X509TTL = 169 * time.Hour },
			"negative JWT TTL":    func(e *server.Entry) { e.JWTTTL = -1 },
			"federates with self": func(e *server.Entry) { e.FederatesWith = []spiffeid.TrustDomain{td} },
		} {
			if err := s.SetEntries(t.Context(), []server.Entry{entry("b"), entry("c", change)}); err == nil {
				t.Errorf("%s: no error", name)
			}
		}
		if err := s.SetEntries(t.Context(), []server.Entry{entry("b"), entry("b")}); err == nil {
			t.Error("twice the same ID: no error")
		}
		if got := s.fetch(t, who); len(got) != 1 || got["a"] == nil {
			t.Errorf("entries are %v", got)
		}
	})
}

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

// receive reads messages until one says that no more follow.
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
	bubble(t, server.Config{}, func(t *testing.T, s *running) {
		_, c := s.join(t)
		for _, n := range []int{0, 1, 500} {
			if err := s.SetEntries(t.Context(), many(n)); err != nil {
				t.Fatal(err)
			}
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
	bubble(t, server.Config{}, func(t *testing.T, s *running) {
		who, c := s.join(t)
		if err := s.SetEntries(t.Context(), many(1001)); err != nil {
			t.Fatal(err)
		}
		all := s.fetch(t, who)
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
		ask(ids, 500, 500, 1)
		ask(ids[:500], 500)
		ask([]string{"unknown"}, 0)
		got := ask([]string{ids[7], "unknown", ids[3]}, 2)
		for _, e := range got {
			if e.GetSpiffeId().GetPath() != "/workload/"+e.GetId() || e.GetSelectors() != nil {
				t.Errorf("entry %v", e)
			}
		}
		if err := stream.CloseSend(); err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
			t.Errorf("after the end: %v", err)
		}
	})
}

func TestSyncRefuses(t *testing.T) {
	t.Parallel()
	bubble(t, server.Config{}, func(t *testing.T, s *running) {
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
