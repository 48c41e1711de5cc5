package admin_test

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/renewd/renewd/internal/server/spireapi"
)

func spireID(path string) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: td.Name(), Path: path}
}

// spireBubble runs f with a manager's client of SPIRE's Entry API.
func spireBubble(t *testing.T, f func(t *testing.T, w *world, c entryv1.EntryClient), deployments ...string) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, deployments...)
		r := w.serveTLS(t)
		f(t, w, entryv1.NewEntryClient(r.dial(t, w, w.only().sign(t, boss, time.Hour))))
	})
}

// said returns the code and the message of an item's status.
func said(st *types.Status) string {
	return fmt.Sprintf("%v %s", codes.Code(st.GetCode()), st.GetMessage())
}

// TestSPIREEntryLife creates, gets, updates and deletes entries with all fields.
func TestSPIREEntryLife(t *testing.T) {
	t.Parallel()
	spireBubble(t, func(t *testing.T, w *world, c entryv1.EntryClient) {
		full := &types.Entry{
			Id: "full", SpiffeId: spireID("/full"), ParentId: spireID("/cluster/one"),
			Selectors:   []*types.Selector{{Type: "k8s", Value: "ns:a"}, {Type: "k8s", Value: "sa:b"}},
			X509SvidTtl: 7200, JwtSvidTtl: 60, FederatesWith: []string{"partner.example"}, DnsNames: []string{"b.example.org", "a.example.org"},
			Hint: "main", ExpiresAt: time.Now().Add(time.Hour).Unix(),
			AdditionalAttributes: &types.Entry_AdditionalAttributes{DisableX509SvidPrefetch: true, JwtSvidIncludeJti: true},
		}
		sent := proto.CloneOf(full)
		slices.Reverse(sent.Selectors)
		resp, err := c.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{sent}})
		check(t, err)
		stored := w.only().server.Entries()[0]
		full.RevisionNumber, full.CreatedAt = stored.Revision, time.Now().Unix()
		if r := resp.GetResults()[0]; said(r.GetStatus()) != "OK OK" || !proto.Equal(r.GetEntry(), full) {
			t.Errorf("created %v\nwant %v", r, full)
		}
		got, err := c.GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: "full"})
		check(t, err)
		if !proto.Equal(got, full) {
			t.Errorf("got %v\nwant %v", got, full)
		}
		got, err = c.GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: "full", OutputMask: &types.EntryMask{Hint: true, ExpiresAt: true}})
		check(t, err)
		if want := (&types.Entry{Id: "full", Hint: full.Hint, ExpiresAt: full.ExpiresAt}); !proto.Equal(got, want) {
			t.Errorf("masked %v\nwant %v", got, want)
		}

		// With a mask, only its fields; without one, all fields.
		update := func(e *types.Entry, mask *types.EntryMask) *types.Entry {
			t.Helper()
			resp, err := c.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{e}, InputMask: mask})
			check(t, err)
			if r := resp.GetResults()[0]; said(r.GetStatus()) != "OK OK" {
				t.Fatalf("update: %v", r)
			}
			got := resp.GetResults()[0].GetEntry()
			if got.GetRevisionNumber() <= full.RevisionNumber || got.GetCreatedAt() != full.CreatedAt {
				t.Errorf("updated %v", got)
			}
			full.RevisionNumber = got.GetRevisionNumber()
			return got
		}
		fields := (&types.Entry{}).ProtoReflect().Descriptor().Fields()
		other := &types.Entry{
			Id: "full", SpiffeId: spireID("/other"), ParentId: spireID("/spire/agent/x"), Selectors: []*types.Selector{{Type: "a", Value: "b"}},
			X509SvidTtl: 3600, JwtSvidTtl: 5, FederatesWith: []string{"second.example"}, DnsNames: []string{"c.example.org"}, Hint: "2", ExpiresAt: time.Now().Add(time.Minute).Unix(),
			AdditionalAttributes: &types.Entry_AdditionalAttributes{JwtSvidIncludeJti: true},
		}
		masks := (&types.EntryMask{}).ProtoReflect().Descriptor().Fields()
		for i := range masks.Len() {
			name := masks.Get(i).Name()
			if slices.Contains([]string{"admin", "downstream", "store_svid", "revision_number", "created_at"}, string(name)) {
				continue
			}
			mask := new(types.EntryMask)
			mask.ProtoReflect().Set(masks.Get(i), protoreflect.ValueOfBool(true))
			got := update(other, mask)
			full.ProtoReflect().Set(fields.ByName(name), other.ProtoReflect().Get(fields.ByName(name)))
			if !proto.Equal(got, full) {
				t.Errorf("mask %s: %v\nwant %v", name, got, full)
			}
		}
		bare := spireEntry("full")
		got = update(bare, nil)
		bare.RevisionNumber, bare.CreatedAt = full.RevisionNumber, full.CreatedAt
		if !proto.Equal(got, bare) {
			t.Errorf("without a mask: %v\nwant %v", got, bare)
		}
		again, err := c.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{bare}})
		check(t, err)
		if r := again.GetResults()[0]; said(r.GetStatus()) != "OK OK" || !proto.Equal(r.GetEntry(), bare) {
			t.Errorf("an update without a difference: %v\nwant %v", r, bare)
		}

		gone, err := c.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{"full", "full", ""}})
		check(t, err)
		var results []string
		for _, r := range gone.GetResults() {
			results = append(results, r.GetId()+": "+said(r.GetStatus()))
		}
		if want := []string{"full: OK OK", "full: NotFound entry not found", ": InvalidArgument missing entry ID"}; !slices.Equal(results, want) {
			t.Errorf("deleted %q, want %q", results, want)
		}
		_, err = c.GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: "full"})
		if status.Code(err) != codes.NotFound || status.Convert(err).Message() != "entry not found" {
			t.Errorf("get: %v", err)
		}
		if _, err = c.GetEntry(t.Context(), &entryv1.GetEntryRequest{}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("get without ID: %v", err)
		}
	})
}

// TestSPIREEntryStatuses: each item of a batch has its own status, and the others are stored in
// one step.
func TestSPIREEntryStatuses(t *testing.T) {
	t.Parallel()
	spireBubble(t, func(t *testing.T, w *world, c entryv1.EntryClient) {
		with := func(f func(*types.Entry)) *types.Entry { return spireEntry("x", f) }
		items := []struct {
			entry *types.Entry
			want  string
		}{
			{spireEntry("a"), "OK OK"},
			{spireEntry("", func(e *types.Entry) { e.SpiffeId = spireID("/unnamed") }), "OK OK"},
			{spireEntry("b", func(e *types.Entry) { e.SpiffeId = spireID("/spire-a") }), "AlreadyExists similar entry already exists"},
			{spireEntry("a", func(e *types.Entry) { e.SpiffeId = spireID("/b") }), "AlreadyExists failed to create entry: the ID is that of another entry"},
			{nil, "InvalidArgument failed to convert entry: "},
			{with(func(e *types.Entry) { e.SpiffeId = nil }), "InvalidArgument failed to convert entry: invalid spiffe ID: request must specify SPIFFE ID"},
			{with(func(e *types.Entry) { e.SpiffeId = spireID("") }), `InvalidArgument failed to convert entry: invalid spiffe ID: "spiffe://example.org" is not a workload in trust domain "example.org"; path is empty`},
			{with(func(e *types.Entry) { e.SpiffeId = spireID("/spire/x") }), `InvalidArgument failed to convert entry: invalid spiffe ID: "spiffe://example.org/spire/x" is not a workload in trust domain "example.org"; path is in the reserved namespace`},
			{with(func(e *types.Entry) { e.SpiffeId.TrustDomain = "other" }), `InvalidArgument failed to convert entry: invalid spiffe ID: "spiffe://other/spire-x" is not a member of trust domain "example.org"`},
			{with(func(e *types.Entry) { e.ParentId = spireID("") }), `InvalidArgument failed to convert entry: invalid parent ID: "spiffe://example.org" is not a member of trust domain "example.org"; path is empty`},
			{with(func(e *types.Entry) { e.ParentId = spireID("/spire/other") }), `InvalidArgument failed to create entry: entry "x": parent_id: `},
			{with(func(e *types.Entry) { e.Selectors = nil }), "InvalidArgument failed to convert entry: selector list is empty"},
			{with(func(e *types.Entry) { e.Selectors[0].Value = "" }), "InvalidArgument failed to convert entry: missing selector value"},
			{with(func(e *types.Entry) { e.Selectors[0].Type = "" }), "InvalidArgument failed to convert entry: missing selector type"},
			{with(func(e *types.Entry) { e.Selectors[0].Type = "a:b" }), "InvalidArgument failed to convert entry: selector type contains ':'"},
			{with(func(e *types.Entry) { e.FederatesWith = []string{"no such"} }), "InvalidArgument failed to convert entry: invalid federated trust domain: "},
			{with(func(e *types.Entry) { e.X509SvidTtl = 60 }), `InvalidArgument failed to create entry: entry "x": x509_ttl: `},
			{with(func(e *types.Entry) { e.ExpiresAt = -1 }), `InvalidArgument failed to create entry: entry "x": expires_at: `},
			{with(func(e *types.Entry) { e.Admin = true }), "InvalidArgument failed to convert entry: admin: "},
			{with(func(e *types.Entry) { e.Downstream = true }), "InvalidArgument failed to convert entry: downstream: "},
			{with(func(e *types.Entry) { e.StoreSvid = true }), "InvalidArgument failed to convert entry: store_svid: "},
			{spireEntry("node", func(e *types.Entry) { e.ParentId = spireID("/spire/server") }), "OK OK"},
			{spireEntry("all", func(e *types.Entry) { e.ParentId = spireID("/spire/agent") }), "OK OK"},
		}
		req := &entryv1.BatchCreateEntryRequest{OutputMask: &types.EntryMask{ParentId: true}}
		for _, item := range items {
			if item.entry == nil {
				item.entry = &types.Entry{} // protocol buffers have no nil in a list
			}
			req.Entries = append(req.Entries, item.entry)
		}
		resp, err := c.BatchCreateEntry(t.Context(), req)
		check(t, err)
		for i, item := range items {
			r := resp.GetResults()[i]
			if !strings.HasPrefix(said(r.GetStatus()), item.want) {
				t.Errorf("item %d: %s\nwant %s", i, said(r.GetStatus()), item.want)
			}
			if r.GetEntry().GetSpiffeId() != nil || r.GetEntry() != nil && !proto.Equal(r.GetEntry().GetParentId(), item.entry.GetParentId()) {
				t.Errorf("item %d: %v", i, r)
			}
		}
		if similar := resp.GetResults()[2].GetEntry(); similar.GetId() != "a" {
			t.Errorf("similar is %v", similar)
		}
		if id := resp.GetResults()[1].GetEntry().GetId(); !strings.HasPrefix(id, "entry-") {
			t.Errorf("the ID that the server has given: %q", id)
		}
		all := w.only().server.Entries()
		if len(all) != 4 {
			t.Errorf("%d entries are stored", len(all))
		}
		for _, e := range all {
			if (e.ID == "all") != e.ParentID.IsZero() || (e.ID == "node") != e.IsAlias() {
				t.Errorf("entry %v", e)
			}
		}

		update, err := c.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{
			Entries: []*types.Entry{spireEntry("none"), {Id: "a"}, {Id: "a", Admin: true}, {Id: "a", Hint: "new"}}, InputMask: &types.EntryMask{Hint: true},
		})
		check(t, err)
		var got []string
		for _, r := range update.GetResults() {
			got = append(got, said(r.GetStatus()))
		}
		if want := []string{"NotFound failed to update entry", "OK OK", "OK OK", "OK OK"}; !slices.Equal(got, want) {
			t.Errorf("update: %q", got)
		}
		if e := w.only().server.EntrySet().Entry("a"); e.Hint != "new" {
			t.Errorf("entry %v", e)
		}
		lines := w.log.lines(t, "operator change completed")
		if len(lines) != 2 {
			t.Fatalf("log: %v", lines)
		}
		if l := lines[1]; l["actor"] != boss.String() || l["operation"] != "BatchUpdateEntry" || l["deployment"] != "default" || l["entries"] != 4.0 ||
			l["failed"] != 1.0 || l["error"] != "failed to update entry" || l["entry_ids"] != "a a a" {
			t.Errorf("log: %v", l)
		}
	})
}

// TestSPIREEntryOperators: the consent of an entry of an operator's ID stays with that ID.
func TestSPIREEntryOperators(t *testing.T) {
	t.Parallel()
	spireBubble(t, func(t *testing.T, w *world, c entryv1.EntryClient) {
		s := w.only().server
		_, err := s.UpsertEntry(t.Context(), spireapi.Entry{ID: "a", SPIFFEID: workload, Operator: true, Selectors: []spireapi.Selector{{Type: "a", Value: "b"}}})
		check(t, err)
		for _, step := range []struct {
			path     string
			operator bool
		}{{workload.Path(), true}, {"/other", false}, {workload.Path(), false}} {
			_, err := c.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{spireEntry("a", func(e *types.Entry) {
				e.SpiffeId = spireID(step.path)
			})}})
			check(t, err)
			if e := s.EntrySet().Entry("a"); e.Operator != step.operator || e.SPIFFEID.Path() != step.path {
				t.Errorf("after %v: %v", step, e)
			}
		}
	})
}

// TestSPIREEntryProbe: spire-controller-manager learns that store_svid is not supported. Nothing
// is stored.
func TestSPIREEntryProbe(t *testing.T) {
	t.Parallel()
	spireBubble(t, func(t *testing.T, w *world, c entryv1.EntryClient) {
		const path = "/spire-controller-manager/unsupported-fields-test"
		resp, err := c.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{{
			ParentId: spireID(path), SpiffeId: spireID(path), Selectors: []*types.Selector{{Type: "a", Value: "1"}},
			X509SvidTtl: 60, JwtSvidTtl: 60, StoreSvid: true, Hint: "hint",
		}}})
		check(t, err)
		r := resp.GetResults()[0]
		if e := r.GetEntry(); said(r.GetStatus()) != "OK OK" || e.GetId() == "" || e.GetJwtSvidTtl() != 60 || e.GetHint() != "hint" || e.GetStoreSvid() {
			t.Errorf("result %v", r)
		}
		if n := len(w.only().server.Entries()); n != 0 {
			t.Errorf("%d entries", n)
		}
		_, err = c.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{r.GetEntry().GetId()}})
		check(t, err)
	})
}

// TestSPIREEntryFilters lists, in pages of every size, and counts with each filter.
func TestSPIREEntryFilters(t *testing.T) {
	t.Parallel()
	spireBubble(t, func(t *testing.T, w *world, c entryv1.EntryClient) {
		sel := func(values ...string) (out []spireapi.Selector) {
			for _, v := range values {
				out = append(out, spireapi.Selector{Type: "s", Value: v})
			}
			return out
		}
		match := func(b types.SelectorMatch_MatchBehavior, values ...string) *types.SelectorMatch {
			m := &types.SelectorMatch{Match: b}
			for _, v := range values {
				m.Selectors = append(m.Selectors, &types.Selector{Type: "s", Value: v})
			}
			return m
		}
		federates := func(b types.FederatesWithMatch_MatchBehavior, names ...string) *types.FederatesWithMatch {
			return &types.FederatesWithMatch{Match: b, TrustDomains: names}
		}
		one, two := spiffeid.RequireTrustDomainFromString("one.example"), spiffeid.RequireTrustDomainFromString("two.example")
		id := func(path string) spiffeid.ID { return spiffeid.RequireFromPath(td, path) }
		_, err := w.only().server.ApplyEntries(t.Context(), []spireapi.Entry{
			{ID: "a", SPIFFEID: id("/a"), ParentID: agent("1"), Selectors: sel("1"), Hint: "h"},
			{ID: "b", SPIFFEID: id("/a"), ParentID: agent("2"), Selectors: sel("1", "2"), FederatesWith: []spiffeid.TrustDomain{one}},
			{ID: "c", SPIFFEID: id("/c"), ParentID: agent("2"), Selectors: sel("2", "3"), FederatesWith: []spiffeid.TrustDomain{one, two}, Hint: "h"},
			{ID: "d", SPIFFEID: id("/c"), Selectors: sel("1", "2", "3"), FederatesWith: []spiffeid.TrustDomain{two}},
		}, false)
		check(t, err)
		type filter = entryv1.ListEntriesRequest_Filter
		for want, f := range map[string]*filter{
			"a b c d":  nil,
			"a b c d ": {ByDownstream: wrapperspb.Bool(false), ByHint: wrapperspb.String("")},
			"":         {ByDownstream: wrapperspb.Bool(true)},
			"a b":      {BySpiffeId: spireID("/a")},
			"b c":      {ByParentId: spireID(agent("2").Path())},
			"b":        {ByParentId: spireID(agent("2").Path()), BySpiffeId: spireID("/a")},
			" ":        {ByParentId: spireID(agent("1").Path()), BySpiffeId: spireID("/c")},
			"d":        {ByParentId: spireID("/spire/agent")},
			"  ":       {ByParentId: spireID("/spire/server")},
			"a c":      {ByHint: wrapperspb.String("h")},
			"b ":       {BySelectors: match(types.SelectorMatch_MATCH_EXACT, "2", "1", "2")},
			"a b ":     {BySelectors: match(types.SelectorMatch_MATCH_SUBSET, "1", "2")},
			"b d":      {BySelectors: match(types.SelectorMatch_MATCH_SUPERSET, "1", "2")},
			"b c d":    {BySelectors: match(types.SelectorMatch_MATCH_ANY, "2", "9")},
			"b  ":      {ByFederatesWith: federates(types.FederatesWithMatch_MATCH_EXACT, "one.example")},
			"b c d ":   {ByFederatesWith: federates(types.FederatesWithMatch_MATCH_SUBSET, "one.example", "two.example")},
			"b c ":     {ByFederatesWith: federates(types.FederatesWithMatch_MATCH_SUPERSET, "one.example")},
			"c d":      {ByFederatesWith: federates(types.FederatesWithMatch_MATCH_ANY, "two.example", "three.example")},
			"c":        {BySelectors: match(types.SelectorMatch_MATCH_ANY, "2"), ByFederatesWith: federates(types.FederatesWithMatch_MATCH_ANY, "two.example"), ByHint: wrapperspb.String("h")},
		} {
			for _, size := range []int32{-1, 0, 1, 2, 3, 100} {
				var got []string
				for token := ""; ; {
					resp, err := c.ListEntries(t.Context(), &entryv1.ListEntriesRequest{Filter: f, PageSize: size, PageToken: token, OutputMask: &types.EntryMask{Hint: true}})
					check(t, err)
					for _, e := range resp.GetEntries() {
						if e.GetSpiffeId() != nil {
							t.Errorf("the mask does not hold for %v", e)
						}
						got = append(got, e.GetId())
					}
					if n := len(resp.GetEntries()); size > 0 && n > int(size) {
						t.Errorf("a page of %d has %d entries", size, n)
					}
					if token = resp.GetNextPageToken(); token == "" {
						break
					}
				}
				if strings.Join(got, " ") != strings.TrimSpace(want) {
					t.Errorf("filter %v, pages of %d: %q, want %q", f, size, got, want)
				}
			}
			count, err := c.CountEntries(t.Context(), &entryv1.CountEntriesRequest{Filter: (*entryv1.CountEntriesRequest_Filter)(nil)})
			if f != nil {
				count, err = c.CountEntries(t.Context(), &entryv1.CountEntriesRequest{Filter: &entryv1.CountEntriesRequest_Filter{
					BySpiffeId: f.GetBySpiffeId(), ByParentId: f.GetByParentId(), BySelectors: f.GetBySelectors(), ByFederatesWith: f.GetByFederatesWith(),
					ByHint: f.GetByHint(), ByDownstream: f.GetByDownstream(),
				}})
			}
			check(t, err)
			if n := len(strings.Fields(want)); int(count.GetCount()) != n {
				t.Errorf("filter %v counts %d, want %d", f, count.GetCount(), n)
			}
		}
		wrong := map[string]*filter{
			"malformed SPIFFE ID filter: ":      {BySpiffeId: spireID("/spire/x")},
			"malformed parent ID filter: ":      {ByParentId: spireID("")},
			"malformed selectors filter: empty": {BySelectors: match(types.SelectorMatch_MATCH_ANY)},
			"malformed selectors filter: miss":  {BySelectors: match(types.SelectorMatch_MATCH_ANY, "")},
			"malformed selectors filter: match": {BySelectors: match(9, "1")},
			"malformed federates with filter: ": {ByFederatesWith: federates(types.FederatesWithMatch_MATCH_ANY)},
		}
		for _, want := range slices.Sorted(maps.Keys(wrong)) {
			_, err := c.ListEntries(t.Context(), &entryv1.ListEntriesRequest{Filter: wrong[want]})
			if status.Code(err) != codes.InvalidArgument || !strings.HasPrefix(status.Convert(err).Message(), want) {
				t.Errorf("got %v, want %s", err, want)
			}
		}
	})
}

// TestSPIREEntryPagesOfLargeEntries: a page fits into the message that a client accepts.
func TestSPIREEntryPagesOfLargeEntries(t *testing.T) {
	t.Parallel()
	spireBubble(t, func(t *testing.T, w *world, c entryv1.EntryClient) {
		var entries []spireapi.Entry
		for i := range 200 {
			entries = append(entries, spireapi.Entry{ID: fmt.Sprintf("e%03d", i), SPIFFEID: workload, Selectors: []spireapi.Selector{{Type: "a", Value: strings.Repeat("x", 60_000)}}})
		}
		_, err := w.only().server.ApplyEntries(t.Context(), entries, false)
		check(t, err)
		n, token := 0, ""
		for again := true; again; again = token != "" {
			resp, err := c.ListEntries(t.Context(), &entryv1.ListEntriesRequest{PageSize: 500, PageToken: token})
			check(t, err)
			n, token = n+len(resp.GetEntries()), resp.GetNextPageToken()
			if size := proto.Size(resp); size > 2<<20 {
				t.Errorf("a page of %d bytes", size)
			}
		}
		if n != 200 {
			t.Errorf("%d entries", n)
		}
	})
}

// TestSPIREEntryDeployments: of several deployments SPIRE's API serves the one named default.
func TestSPIREEntryDeployments(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		names []string
		want  string
	}{{[]string{"only"}, "only"}, {[]string{"blue", "default"}, "default"}, {[]string{"blue", "green"}, ""}} {
		spireBubble(t, func(t *testing.T, w *world, c entryv1.EntryClient) {
			_, err := c.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{spireEntry("a")}})
			if tt.want == "" {
				if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), `"blue" "green"`) {
					t.Errorf("%q: %v", tt.names, err)
				}
				return
			}
			check(t, err)
			for name, d := range w.deployments {
				if n := len(d.server.Entries()); (n == 1) != (name == tt.want) {
					t.Errorf("%q: %s has %d entries", tt.names, name, n)
				}
			}
		}, tt.names...)
	}
}
