package spireapi_test

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"

	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/test/memory"
)

var partner = spiffeid.RequireTrustDomainFromString("partner.org")

// many makes n entries whose IDs are in order.
func many(n int) []spireapi.Entry {
	entries := make([]spireapi.Entry, n)
	for i := range entries {
		entries[i] = entry(fmt.Sprintf("e%05d", i))
	}
	return entries
}

func TestEntryFieldsAndMask(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		caller, c := s.join(t)
		full := entry("a", func(e *spireapi.Entry) {
			e.ParentID, e.Hint, e.X509TTL, e.JWTTTL = caller.id, "main", 2*time.Hour, 5*time.Minute
			e.Selectors = []spireapi.Selector{{"unix", "uid:2"}, {"unix", "gid:1"}}
			e.FederatesWith = []spiffeid.TrustDomain{partner}
			e.DNSNames = []string{"web.example.org", "*.Apps.Example.org", "a.example.org"}
			e.DisableX509SVIDPrefetch, e.JWTSVIDIncludeJTI = true, true
		})
		s.apply(t, []spireapi.Entry{full})
		want := &types.Entry{
			Id: "a", SpiffeId: &types.SPIFFEID{TrustDomain: "example.org", Path: "/workload/a"},
			ParentId:    &types.SPIFFEID{TrustDomain: "example.org", Path: caller.id.Path()},
			Selectors:   []*types.Selector{{Type: "unix", Value: "gid:1"}, {Type: "unix", Value: "uid:2"}},
			X509SvidTtl: 7200, JwtSvidTtl: 300, FederatesWith: []string{"partner.org"}, Hint: "main",
			DnsNames:             []string{"web.example.org", "*.apps.example.org", "a.example.org"},
			AdditionalAttributes: &types.Entry_AdditionalAttributes{DisableX509SvidPrefetch: true, JwtSvidIncludeJti: true},
			RevisionNumber:       s.Entries()[0].Revision, CreatedAt: time.Now().Unix(),
		}
		if got := s.fetch(t, caller)["a"]; !proto.Equal(got, want) {
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
		_, entries, _ := receive(t, openSync(t, c, &entryv1.SyncAuthorizedEntriesRequest{OutputMask: &types.EntryMask{DnsNames: true, RevisionNumber: true}}))
		masked = &types.Entry{Id: want.Id, DnsNames: want.DnsNames, RevisionNumber: want.RevisionNumber}
		if !proto.Equal(entries[0], masked) {
			t.Errorf("masked entry %v, want %v", entries[0], masked)
		}
		_, entries, _ = receive(t, openSync(t, c, &entryv1.SyncAuthorizedEntriesRequest{OutputMask: &types.EntryMask{AdditionalAttributes: true, RevisionNumber: true}}))
		masked = &types.Entry{Id: want.Id, AdditionalAttributes: want.AdditionalAttributes, RevisionNumber: want.RevisionNumber}
		if !proto.Equal(entries[0], masked) {
			t.Errorf("masked entry %v, want %v", entries[0], masked)
		}

		// Each attribute alone is a change, and without any the message is absent.
		revision := want.RevisionNumber
		for _, edit := range []func(*spireapi.Entry){
			func(e *spireapi.Entry) { e.JWTSVIDIncludeJTI = false },
			func(e *spireapi.Entry) { e.DisableX509SVIDPrefetch = false },
		} {
			edit(&full)
			s.apply(t, []spireapi.Entry{full})
			got := s.fetch(t, caller)["a"]
			if got.GetRevisionNumber() == revision || got.GetAdditionalAttributes().GetJwtSvidIncludeJti() != full.JWTSVIDIncludeJTI ||
				got.GetAdditionalAttributes().GetDisableX509SvidPrefetch() != full.DisableX509SVIDPrefetch {
				t.Errorf("after the edit: %v", got)
			}
			revision = got.GetRevisionNumber()
		}
		if got := s.fetch(t, caller)["a"]; got.AdditionalAttributes != nil {
			t.Errorf("attributes %v, want none", got.AdditionalAttributes)
		}
	})
}

func TestEntriesBelongToTheirParent(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		one, oneConn := s.join(t)
		two, _ := s.join(t)
		s.apply(t, []spireapi.Entry{
			entry("all"), entry("zero"),
			entry("one", func(e *spireapi.Entry) { e.ParentID = one.id }),
			entry("two", func(e *spireapi.Entry) { e.ParentID = two.id }),
		})
		for caller, own := range map[*identity]string{one: "one", two: "two"} {
			got := s.fetch(t, caller)
			if len(got) != 3 || got["all"] == nil || got["zero"] == nil || got[own] == nil {
				t.Errorf("agent %s has %v", own, got)
			}
			for _, e := range got {
				if e.GetParentId().GetPath() != caller.id.Path() {
					t.Errorf("parent of %s is %v", e.GetId(), e.GetParentId())
				}
			}
		}
		resp, err := oneConn.GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		var ids []string
		for _, e := range resp.GetEntries() {
			ids = append(ids, e.GetId())
		}
		if want := []string{"all", "one", "zero"}; !slices.Equal(ids, want) {
			t.Errorf("entries are %v, want %v", ids, want)
		}
	})
}

func TestRevisions(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		caller, _ := s.join(t)
		revision := func(id string) int64 {
			t.Helper()
			e, ok := s.fetch(t, caller)[id]
			if !ok {
				t.Fatalf("no entry %s", id)
			}
			return e.GetRevisionNumber()
		}
		upsert := func(e spireapi.Entry) spireapi.EntryChange {
			t.Helper()
			change, err := s.UpsertEntry(t.Context(), e)
			if err != nil {
				t.Fatal(err)
			}
			return change
		}
		a, b := entry("a"), entry("b")
		a.Selectors = append(a.Selectors, spireapi.Selector{Type: "unix", Value: "gid:1"})
		s.apply(t, []spireapi.Entry{a, b})
		ra, rb := revision("a"), revision("b")

		// Another order is no change.
		slices.Reverse(a.Selectors)
		s.apply(t, []spireapi.Entry{b, a})
		if revision("a") != ra || revision("b") != rb {
			t.Error("what did not change has a new revision")
		}
		created := s.fetch(t, caller)["a"].GetCreatedAt()
		time.Sleep(time.Hour)
		a.Hint = "x"
		if change := upsert(a); change.Before == nil || change.Before.Hint != "" || change.After.Hint != "x" {
			t.Errorf("the change of a is %+v", change)
		}
		if got := s.fetch(t, caller)["a"]; got.GetRevisionNumber() <= ra || revision("b") != rb || got.GetCreatedAt() != created {
			t.Errorf("after a change of a: %v", got)
		}
		ra = revision("a")
		if change := upsert(a); !reflect.DeepEqual(change.Before, change.After) || revision("a") != ra {
			t.Errorf("the same again is the change %+v", change)
		}
		if err := s.DeleteEntry(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
		if _, ok := s.fetch(t, caller)["a"]; ok {
			t.Error("deleted, but still there")
		}
		if err := s.DeleteEntry(t.Context(), "a"); !errors.Is(err, spireapi.ErrNotFound) {
			t.Errorf("deleted twice: %v", err)
		}
		if change := upsert(a); change.Before != nil {
			t.Errorf("added, but before it was %+v", change.Before)
		}
		if got := s.fetch(t, caller)["a"]; got.GetRevisionNumber() <= ra || got.GetCreatedAt() == created {
			t.Errorf("an ID that is used again: %v, the old revision was %d", got, ra)
		}
	})
}

// TestRevisionsOfDNSNames: another order is a change, another case is not.
func TestRevisionsOfDNSNames(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		last := int64(0)
		for i, tt := range []struct {
			names   []string
			changes bool
		}{
			{nil, true},
			{[]string{}, false},
			{[]string{"a.example.org", "b.example.org"}, true},
			{[]string{"A.example.org", "b.EXAMPLE.org"}, false},
			{[]string{"b.example.org", "a.example.org"}, true},
			{[]string{"b.example.org"}, true},
			{nil, true},
		} {
			given := slices.Clone(tt.names)
			diff := s.apply(t, []spireapi.Entry{entry("a", func(e *spireapi.Entry) { e.DNSNames = given })})
			if got := s.Entries()[0].Revision; (got > last) != tt.changes || (len(diff.Changes) == 1) != tt.changes {
				t.Errorf("step %d, %q: revision %d after %d, %d changes", i, tt.names, got, last, len(diff.Changes))
			}
			last = s.Entries()[0].Revision
			if !slices.Equal(given, tt.names) {
				t.Errorf("step %d: the caller's names became %q", i, given)
			}
		}
	})
}

// TestRevisionsOverARestart reuses the ID of an entry that had the highest revision
// and was deleted before the server restarted.
func TestRevisionsOverARestart(t *testing.T) {
	t.Parallel()
	keys, store := new(memory.Keysets), memory.NewServer()
	bubble(t, spireapi.Config{Storage: store, Keysets: openKeysets(t, keys)}, func(t *testing.T, s *running) {
		all := many(1000)
		s.apply(t, all)
		last := s.Entries()[999]
		s.apply(t, all[:1])
		s.stop()
		time.Sleep(time.Second)
		again := start(t, spireapi.Config{Storage: store, Keysets: openKeysets(t, keys)})
		again.apply(t, all)
		if got := again.Entries()[999]; got.ID != last.ID || got.Revision <= last.Revision {
			t.Errorf("entry %s has revision %d, and %s had %d before", got.ID, got.Revision, last.ID, last.Revision)
		}
	})
}

func TestDiff(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		hint := func(text string) func(*spireapi.Entry) { return func(e *spireapi.Entry) { e.Hint = text } }
		s.apply(t, []spireapi.Entry{entry("a"), entry("b"), entry("d"), entry("e")})
		next := []spireapi.Entry{entry("f"), entry("e"), entry("c"), entry("b", hint("new"))}
		want := "-a b:new +c -d +f 1"
		text := func(d spireapi.Diff) string {
			var b strings.Builder
			for _, c := range d.Changes {
				switch {
				case c.Before == nil:
					fmt.Fprintf(&b, "+%s ", c.After.ID)
				case c.After == nil:
					fmt.Fprintf(&b, "-%s ", c.Before.ID)
				default:
					fmt.Fprintf(&b, "%s%s:%s ", c.Before.ID, c.Before.Hint, c.After.Hint)
				}
			}
			return fmt.Sprint(b.String(), d.Unchanged)
		}
		before := s.Entries()
		diff, err := s.ApplyEntries(t.Context(), next, true)
		if err != nil || text(diff) != want {
			t.Errorf("dry run: %s, %v; want %s", text(diff), err, want)
		}
		if !reflect.DeepEqual(s.Entries(), before) {
			t.Error("the dry run changed something")
		}
		if got := text(s.apply(t, next)); got != want {
			t.Errorf("applied: %s, want %s", got, want)
		}
		if got := text(s.apply(t, next)); got != "4" {
			t.Errorf("applied again: %s", got)
		}
		var ids []string
		for _, e := range s.Entries() {
			ids = append(ids, e.ID)
		}
		if !slices.Equal(ids, []string{"b", "c", "e", "f"}) {
			t.Errorf("entries are %v", ids)
		}
	})
}

func TestInvalidEntriesChangeNothing(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		caller, _ := s.join(t)
		s.apply(t, []spireapi.Entry{entry("a")})
		foreign := spiffeid.RequireFromString("spiffe://partner.org/x")
		wrong := func(name, id, field string, entries ...spireapi.Entry) {
			t.Helper()
			_, err := s.ApplyEntries(t.Context(), entries, false)
			if e, ok := errors.AsType[spireapi.EntryErrors](err); !ok || len(e) != 1 || e[0].Entry != id || e[0].Field != field {
				t.Errorf("%s: %v", name, err)
			}
		}
		for name, tt := range map[string]struct {
			field  string
			change func(*spireapi.Entry)
		}{
			"no SPIFFE ID":       {"spiffe_id", func(e *spireapi.Entry) { e.SPIFFEID = spiffeid.ID{} }},
			"foreign SPIFFE ID":  {"spiffe_id", func(e *spireapi.Entry) { e.SPIFFEID = foreign }},
			"no path":            {"spiffe_id", func(e *spireapi.Entry) { e.SPIFFEID = td.ID() }},
			"reserved path":      {"spiffe_id", func(e *spireapi.Entry) { e.SPIFFEID = serverID }},
			"foreign parent":     {"parent_id", func(e *spireapi.Entry) { e.ParentID = foreign }},
			"no selectors":       {"selectors", func(e *spireapi.Entry) { e.Selectors = nil }},
			"malformed selector": {"selectors", func(e *spireapi.Entry) { e.Selectors = []spireapi.Selector{{Type: "unix"}} }},
			"short X.509 TTL":    {"x509_ttl", func(e *spireapi.Entry) { e.X509TTL = time.Minute }},
			"long X.509 TTL":     {"x509_ttl", func(e *spireapi.Entry) { e.X509TTL = 169 * time.Hour }},
			"negative JWT TTL":   {"jwt_ttl", func(e *spireapi.Entry) { e.JWTTTL = -1 }},
			"fleeting JWT TTL":   {"jwt_ttl", func(e *spireapi.Entry) { e.JWTTTL = time.Second - 1 }},
			"reserved parent":    {"parent_id", func(e *spireapi.Entry) { e.ParentID = spiffeid.RequireFromPath(td, "/spire/agents") }},
			"all of /spire":      {"parent_id", func(e *spireapi.Entry) { e.ParentID = spiffeid.RequireFromPath(td, "/spire") }},
			"parent is a domain": {"parent_id", func(e *spireapi.Entry) { e.ParentID = td.ID() }},
			"long parent": {"parent_id", func(e *spireapi.Entry) {
				e.ParentID = spiffeid.RequireFromPath(td, "/"+strings.Repeat("x", 2048-len("spiffe://example.org")))
			}},
			"expires in a fraction of a second": {"expires_at", func(e *spireapi.Entry) { e.ExpiresAt = time.Unix(1, 1) }},
			"expires in 1970":                   {"expires_at", func(e *spireapi.Entry) { e.ExpiresAt = time.Unix(0, 0) }},
			"alias is reserved": {"spiffe_id", func(e *spireapi.Entry) {
				e.ParentID, e.SPIFFEID = serverID, spiffeid.RequireFromPath(td, "/spire/agent/x")
			}},
			"long hint": {"hint", func(e *spireapi.Entry) { e.Hint = strings.Repeat("x", 1025) }},
			"too large by selectors": {"size", func(e *spireapi.Entry) {
				e.Selectors = []spireapi.Selector{{Type: "k8s", Value: strings.Repeat("x", 64<<10)}}
			}},
			"too large by trust domains": {"size", func(e *spireapi.Entry) {
				for i := range 5000 {
					e.FederatesWith = append(e.FederatesWith, spiffeid.RequireTrustDomainFromString(fmt.Sprintf("domain%d.example", i)))
				}
			}},
			"long SPIFFE ID": {"spiffe_id", func(e *spireapi.Entry) {
				e.SPIFFEID = spiffeid.RequireFromPath(td, "/"+strings.Repeat("x", 2048-len("spiffe://example.org")))
			}},
			"wrong DNS name":      {"dns_names", func(e *spireapi.Entry) { e.DNSNames = []string{"web.example.org", "a_b"} }},
			"federates with self": {"federates_with", func(e *spireapi.Entry) { e.FederatesWith = []spiffeid.TrustDomain{td} }},
		} {
			wrong(name, "c", tt.field, entry("b"), entry("c", tt.change))
		}
		nameless, long := entry("x"), entry("x")
		nameless.ID, long.ID = "", strings.Repeat("x", 256)
		wrong("twice without an ID", nameless.SPIFFEID.String(), "id", nameless, entry("b"), nameless)
		wrong("with an ID and without", nameless.SPIFFEID.String(), "id", entry("x"), nameless)
		wrong("long ID", long.ID, "id", entry("b"), long)
		huge := entry("x")
		huge.ID = strings.Repeat("\xff", 10_000)
		if _, err := s.UpsertEntry(t.Context(), huge); err == nil || len(err.Error()) > 2000 {
			t.Errorf("the error about an ID of 10,000 bytes: %v", err)
		}
		wrong("twice the same ID", "b", "id", entry("b"), entry("b"))
		if got := s.fetch(t, caller); len(got) != 1 || got["a"] == nil {
			t.Errorf("entries are %v", got)
		}
		// The maximum is valid.
		s.apply(t, []spireapi.Entry{entry("most", func(e *spireapi.Entry) {
			e.ID, e.Hint, e.JWTTTL = strings.Repeat("x", 255), strings.Repeat("x", 1024), time.Second
			e.SPIFFEID = spiffeid.RequireFromPath(td, "/"+strings.Repeat("x", 2047-len("spiffe://example.org")))
			e.Selectors = []spireapi.Selector{{Type: "k8s", Value: strings.Repeat("x", 60_000)}}
		})})
	})
}
