package upstream_test

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/upstream"
)

// holder applies the changes to the entries held, as the agent does.
type holder map[string]*cache.Entry

func (h holder) sync(t *testing.T, a *agent) (upsert, gone []string) {
	t.Helper()
	before := maps.Clone(h)
	changes, err := a.SyncEntries(t.Context(), h)
	if err != nil {
		t.Fatal(err)
	}
	if !maps.Equal(before, h) {
		t.Fatal("SyncEntries wrote to what it was given")
	}
	gone = changes.Missing
	for _, e := range changes.Withdrawn {
		gone = append(gone, e.ID)
	}
	slices.Sort(gone)
	for _, id := range gone {
		delete(h, id)
	}
	for _, e := range changes.Upsert {
		h[e.ID] = e
		upsert = append(upsert, e.ID)
	}
	slices.Sort(upsert)
	return upsert, gone
}

func want(t *testing.T, what string, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

func TestSyncDeltas(t *testing.T) {
	t.Parallel()
	for _, n := range []int{0, 1, 499, 500, 501, 1500} {
		for _, mode := range []string{"sync", "full list"} {
			t.Run(fmt.Sprintf("%d %s", n, mode), func(t *testing.T) {
				t.Parallel()
				bubble(t, func(t *testing.T, s *server, a *agent) {
					s.lacksSync = mode != "sync"
					s.entries = entries(n)
					h := holder{}
					up, gone := h.sync(t, a)
					if len(up) != n || len(gone) != 0 {
						t.Fatalf("first sync: %d and %d", len(up), len(gone))
					}
					s.asked = nil
					up, gone = h.sync(t, a)
					want(t, "unchanged", append(up, gone...))
					if len(s.asked) > 0 {
						t.Errorf("asked for %v although nothing changed", s.asked)
					}
					if n < 2 {
						return
					}
					// One changes, one goes, one comes, one is replaced by another of its ID.
					changed := proto.Clone(s.entries[n/2]).(*types.Entry)
					changed.RevisionNumber++
					changed.Hint = "new"
					replaced := proto.Clone(s.entries[n/2-1]).(*types.Entry)
					replaced.CreatedAt++
					s.entries[n/2], s.entries[n/2-1] = changed, replaced
					s.entries = append(s.entries[1:], entry(n))
					up, gone = h.sync(t, a)
					want(t, "upsert", up, replaced.Id, changed.Id, entry(n).Id)
					want(t, "gone", gone, entry(0).Id)
					if n > s.page && !s.lacksSync {
						if len(s.asked) != 1 || !slices.Equal(s.asked[0], up) {
							t.Errorf("asked for %v", s.asked)
						}
					}
					up, gone = h.sync(t, a)
					want(t, "afterwards", append(up, gone...))
					if len(h) != n {
						t.Errorf("%d entries held", len(h))
					}
					if s.lacksSync && s.count("SyncAuthorizedEntries") != 1 {
						t.Errorf("asked %d times for what the server lacks", s.count("SyncAuthorizedEntries"))
					}
				})
			})
		}
	}
}

// The agent may hold another entry with the same ID and revision from its last run. The
// creation time differs, as it does for an older entry on a replica that lags.
func TestEntryReplacedWhileTheAgentWasAway(t *testing.T) {
	t.Parallel()
	for _, n := range []int{3, 600} {
		bubble(t, func(t *testing.T, s *server, a *agent) {
			s.entries = entries(n)
			h := holder{}
			for i, e := range s.entries {
				h[e.Id] = &cache.Entry{ID: e.Id, Revision: e.RevisionNumber, CreatedAt: time.Unix(e.CreatedAt, 0)}
				if i < 2 {
					h[e.Id].CreatedAt = h[e.Id].CreatedAt.Add(time.Duration(2*i-1) * time.Hour)
				}
			}
			up, gone := h.sync(t, a)
			want(t, "first sync", append(up, gone...), entry(0).Id, entry(1).Id)
			up, gone = h.sync(t, a)
			want(t, "afterwards", append(up, gone...))
		})
	}
}

func TestSyncAsksInPages(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, s *server, a *agent) {
		s.entries = entries(1500)
		holder{}.sync(t, a)
		for _, ids := range s.asked {
			if len(ids) > 500 || !slices.IsSorted(ids) {
				t.Errorf("asked for %d, sorted %v", len(ids), slices.IsSorted(ids))
			}
		}
		if len(s.asked) != 3 {
			t.Errorf("asked %d times", len(s.asked))
		}
	})
}

func TestSyncFallbackLastsForOneConnection(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, s *server, a *agent) {
		s.lacksSync = true
		s.entries = entries(1)
		holder{}.sync(t, a)
		holder{}.sync(t, a)
		if err := a.RenewNode(t.Context()); err != nil { // another connection
			t.Fatal(err)
		}
		s.lacksSync = false
		holder{}.sync(t, a)
		if full, sync := s.count("GetAuthorizedEntries"), s.count("SyncAuthorizedEntries"); full != 2 || sync != 2 {
			t.Errorf("GetAuthorizedEntries %d, SyncAuthorizedEntries %d", full, sync)
		}
	})
}

func TestEntryContent(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, s *server, a *agent) {
		e := entry(1)
		e.Hint = "internal"
		e.FederatesWith = []string{"spiffe://other.org", "other.org", td.Name(), "third.org"}
		s.entries = []*types.Entry{e}
		changes, err := a.SyncEntries(t.Context(), nil)
		if err != nil || len(changes.Upsert) != 1 {
			t.Fatalf("got %v, %v", changes, err)
		}
		got := changes.Upsert[0]
		if got.ID != e.Id || got.SPIFFEID.String() != "spiffe://example.org/w/1" || got.Hint != "internal" || got.Revision != 1 ||
			!got.CreatedAt.Equal(time.Unix(1000, 0)) || !slices.Equal(got.Selectors, []cache.Selector{{Type: "unix", Value: "uid:1"}}) ||
			fmt.Sprint(got.FederatesWith) != "[other.org third.org]" {
			t.Errorf("got %+v", got)
		}
	})
}

func TestInvalidEntriesAreSkipped(t *testing.T) {
	t.Parallel()
	for name, corrupt := range map[string]func(*types.Entry){
		"no ID":                  func(e *types.Entry) { e.Id = "" },
		"second of its ID":       func(e *types.Entry) { e.Id = entry(0).Id },
		"no SPIFFE ID":           func(e *types.Entry) { e.SpiffeId = nil },
		"invalid path":           func(e *types.Entry) { e.SpiffeId.Path = "/a//b" },
		"no path":                func(e *types.Entry) { e.SpiffeId.Path = "" },
		"other domain":           func(e *types.Entry) { e.SpiffeId.TrustDomain = "other.org" },
		"no selectors":           func(e *types.Entry) { e.Selectors = nil },
		"incomplete selector":    func(e *types.Entry) { e.Selectors[0].Value = "" },
		"invalid federated name": func(e *types.Entry) { e.FederatesWith = []string{"A B"} },
		"negative revision":      func(e *types.Entry) { e.RevisionNumber = -1 },
	} {
		for _, n := range []int{3, 600} {
			t.Run(fmt.Sprintf("%s of %d", name, n), func(t *testing.T) {
				t.Parallel()
				bubble(t, func(t *testing.T, s *server, a *agent) {
					s.entries = entries(n)
					corrupt(s.entries[1])
					h := holder{}
					for range 3 {
						h.sync(t, a)
					}
					if _, bad := h[entry(1).Id]; bad || len(h) != n-1 {
						t.Errorf("%d entries held", len(h))
					}
					if got := strings.Count(a.logs.String(), "entry skipped"); got != 1 {
						t.Errorf("%d log lines", got)
					}
					// Repaired, with another revision or, where that was not to blame, not.
					s.entries[1] = entry(1)
					s.entries[1].RevisionNumber = 7
					if up, _ := h.sync(t, a); !slices.Equal(up, []string{entry(1).Id}) {
						t.Errorf("repaired: got %v", up)
					}
				})
			})
		}
	}
}

func TestHeldEntryThatBecomesInvalidIsKept(t *testing.T) {
	t.Parallel()
	for name, corrupt := range map[string]func(*types.Entry){
		"no selectors":      func(e *types.Entry) { e.RevisionNumber, e.Selectors = 2, nil },
		"negative revision": func(e *types.Entry) { e.RevisionNumber = -1 },
	} {
		for _, n := range []int{3, 600} {
			t.Run(fmt.Sprintf("%s of %d", name, n), func(t *testing.T) {
				t.Parallel()
				bubble(t, func(t *testing.T, s *server, a *agent) {
					s.entries = entries(n)
					h := holder{}
					h.sync(t, a)
					bad := entry(1)
					corrupt(bad)
					s.entries[1] = bad
					for range 3 {
						up, gone := h.sync(t, a)
						want(t, "bad", append(up, gone...))
					}
					if got := strings.Count(a.logs.String(), "entry skipped"); got != 1 {
						t.Errorf("%d log lines", got)
					}
				})
			})
		}
	}
}

func TestStoreSVIDEntriesAreNotForWorkloads(t *testing.T) {
	t.Parallel()
	for _, n := range []int{3, 600} {
		bubble(t, func(t *testing.T, s *server, a *agent) {
			s.entries = entries(n)
			s.entries[0].StoreSvid = true
			h := holder{}
			h.sync(t, a)
			if len(h) != n-1 {
				t.Errorf("%d entries held", len(h))
			}
			turned := entry(1)
			turned.RevisionNumber, turned.StoreSvid = 2, true
			s.entries[1] = turned
			changes, err := a.SyncEntries(t.Context(), h)
			if err != nil || len(changes.Withdrawn) != 1 || changes.Withdrawn[0].Revision != 2 || !changes.Withdrawn[0].CreatedAt.Equal(time.Unix(turned.CreatedAt, 0)) {
				t.Errorf("withdrawn: %+v, %v", changes.Withdrawn, err)
			}
			_, gone := h.sync(t, a)
			want(t, "gone", gone, turned.Id)
			s.asked = nil
			up, gone := h.sync(t, a)
			want(t, "afterwards", append(up, gone...))
			if len(s.asked) > 0 {
				t.Errorf("asked again for %v", s.asked)
			}
			if strings.Contains(a.logs.String(), "entry skipped") {
				t.Error("logged as broken")
			}
		})
	}
}

func TestMalformedSyncAnswersChangeNothing(t *testing.T) {
	t.Parallel()
	type stream = entryv1.Entry_SyncAuthorizedEntriesServer
	type resp = entryv1.SyncAuthorizedEntriesResponse
	revisions := func(more bool, ids ...int) *resp {
		out := &resp{More: more}
		for _, i := range ids {
			out.EntryRevisions = append(out.EntryRevisions, &entryv1.EntryRevision{Id: entry(i).Id, RevisionNumber: 1, CreatedAt: 1000})
		}
		return out
	}
	full := func(more bool, ids ...int) *resp {
		out := &resp{More: more}
		for _, i := range ids {
			out.Entries = append(out.Entries, entry(i))
		}
		return out
	}
	// send answers with the messages, the first at once, and after the
	// revisions with the rest to each request.
	send := func(first []*resp, then ...*resp) func(stream) error {
		return func(st stream) error {
			for _, m := range first {
				if err := st.Send(m); err != nil {
					return err
				}
			}
			for _, m := range then {
				if _, err := st.Recv(); err != nil {
					return nil
				}
				if err := st.Send(m); err != nil {
					return err
				}
			}
			return nil
		}
	}
	for name, answer := range map[string]func(stream) error{
		"nothing":                  send(nil),
		"a page of the list short": send([]*resp{full(true, 1)}),
		"an empty page":            send([]*resp{full(true, 1), full(true)}),
		"list, then revisions":     send([]*resp{full(true, 1), revisions(false, 2)}),
		"a page short":             send([]*resp{revisions(true, 1)}),
		"an empty revisions page":  send([]*resp{revisions(true, 1), revisions(true)}),
		"revisions, then list":     send([]*resp{revisions(true, 1), full(false, 2)}),
		"no answer":                send([]*resp{revisions(false, 1, 2)}),
		"an answer short":          send([]*resp{revisions(false, 1, 2)}, full(false, 1)),
		"another answer":           send([]*resp{revisions(false, 1, 2)}, full(false, 1, 3)),
		"an answer twice":          send([]*resp{revisions(false, 1, 2)}, full(false, 1, 1)),
		"revisions as answer":      send([]*resp{revisions(false, 1, 2)}, revisions(false, 1, 2)),
		"empty pages as answer":    send([]*resp{revisions(false, 1)}, full(true)),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, s *server, a *agent) {
				s.entries = entries(2)
				h := holder{}
				h.sync(t, a)
				s.sync = answer
				changes, err := a.SyncEntries(t.Context(), map[string]*cache.Entry{entry(9).Id: {ID: entry(9).Id, Revision: 1}})
				if upstream.Code(err) != "Internal" || changes.Upsert != nil || changes.Missing != nil || changes.Withdrawn != nil {
					t.Errorf("got %v, %v", changes, err)
				}
				s.sync = nil
				changed, deleted := h.sync(t, a)
				want(t, "afterwards", append(changed, deleted...))
			})
		})
	}
}

func TestSeveralPagesOfTheFullList(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, s *server, a *agent) {
		s.sync = func(st entryv1.Entry_SyncAuthorizedEntriesServer) error {
			for i := range 3 {
				if err := st.Send(&entryv1.SyncAuthorizedEntriesResponse{Entries: []*types.Entry{entry(i)}, More: i < 2}); err != nil {
					return err
				}
			}
			return nil
		}
		if up, _ := (holder{}).sync(t, a); len(up) != 3 {
			t.Errorf("got %v", up)
		}
	})
}

// SPIRE takes a trust domain out of entries without another revision of them, when
// its bundle is deleted with mode dissociate.
func TestFederationChangesWithoutARevision(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"sync", "full list"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, s *server, a *agent) {
				s.lacksSync = mode != "sync"
				s.entries = entries(2)
				s.entries[0].FederatesWith = []string{"b.example", "a.example"}
				h := holder{}
				h.sync(t, a)
				change := func(federatesWith ...string) []string {
					changed := proto.Clone(s.entries[0]).(*types.Entry)
					changed.FederatesWith = federatesWith
					s.entries[0] = changed
					upsert, _ := h.sync(t, a)
					return upsert
				}
				want(t, "another order", change("a.example", "b.example"))
				want(t, "one fewer", change("a.example"), entry(0).Id)
				want(t, "none", change(), entry(0).Id)
				if held := h[entry(0).Id].FederatesWith; len(held) != 0 {
					t.Errorf("it federates with %v", held)
				}
			})
		})
	}
}
