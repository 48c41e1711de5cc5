package admin_test

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/operator/renewd"
	"github.com/renewd/renewd/internal/server/admin"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/spireapi"
)

func entry(id, path string) *api.Entry {
	return &api.Entry{Id: id, SpiffeId: "spiffe://example.org" + path, Selectors: []*api.Selector{{Type: "unix", Value: "uid:1000"}}}
}

// TestEntries puts, lists and deletes entries and checks the reported changes.
func TestEntries(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, w *world, _ *remote, c *renewd.Client) {
		full := entry("full", "/full")
		full.ParentId, full.Hint, full.FederatesWith = agent("a").String(), "main", []string{"other.example"}
		full.DnsNames = []string{"web.example.org", "a.example.org"}
		full.X509Ttl, full.JwtTtl = durationpb.New(2*time.Hour), durationpb.New(time.Minute)
		full.DisableX509SvidPrefetch, full.JwtSvidIncludeJti = true, true
		full.ExpiresAt = timestamppb.New(time.Now().Add(time.Hour).Truncate(time.Second))
		full.Selectors = append(full.Selectors, &api.Selector{Type: "unix", Value: "user:www"})
		changes := func(of []*api.EntryChange) (out []string) {
			for _, c := range of {
				out = append(out, fmt.Sprint(c.GetBefore().GetSpiffeId(), "->", c.GetAfter().GetSpiffeId()))
			}
			return out
		}
		apply := func(dry bool, entries ...*api.Entry) (*api.ApplyEntriesResponse, error) {
			return c.ApplyEntries(t.Context(), &api.ApplyEntriesRequest{Entries: entries, DryRun: dry})
		}
		list := func() []*api.Entry {
			resp, err := c.ListEntries(t.Context(), &api.ListEntriesRequest{})
			check(t, err)
			return resp.GetEntries()
		}
		for _, dry := range []bool{true, false} {
			resp, err := apply(dry, entry("a", "/a"), full)
			check(t, err)
			if got, want := changes(resp.GetChanges()), []string{"->spiffe://example.org/a", "->spiffe://example.org/full"}; !slices.Equal(got, want) || resp.GetUnchanged() != 0 {
				t.Errorf("dry %v: %v", dry, resp)
			}
			if n := len(list()); n != map[bool]int{false: 2}[dry] {
				t.Errorf("dry %v: %d entries", dry, n)
			}
		}
		if got := list()[1]; !proto.Equal(got, full) {
			t.Errorf("got  %v\nwant %v", got, full)
		}
		put, err := c.PutEntry(t.Context(), &api.PutEntryRequest{Entry: entry("a", "/b")})
		check(t, err)
		if got := changes([]*api.EntryChange{put.GetChange()}); got[0] != "spiffe://example.org/a->spiffe://example.org/b" {
			t.Errorf("put: %v", got)
		}
		_, err = c.DeleteEntry(t.Context(), &api.DeleteEntryRequest{Id: "a"})
		check(t, err)
		_, err = c.DeleteEntry(t.Context(), &api.DeleteEntryRequest{Id: "a"})
		if status.Code(err) != codes.NotFound {
			t.Errorf("deleted twice: %v", err)
		}
		resp, err := apply(false, full, entry("c", "/c"))
		check(t, err)
		if resp.GetUnchanged() != 1 || len(resp.GetChanges()) != 1 {
			t.Errorf("apply: %v", resp)
		}

		// With one invalid entry nothing is changed; the error names the field.
		wrong := func(change func(*api.Entry)) *api.Entry {
			e := entry("x", "/x")
			change(e)
			return e
		}
		for want, e := range map[string]*api.Entry{
			`entry "x": spiffe_id: `:      wrong(func(e *api.Entry) { e.SpiffeId = "x" }),
			`entry "x": parent_id: `:      wrong(func(e *api.Entry) { e.ParentId = "x" }),
			`entry "x": federates_with: `: wrong(func(e *api.Entry) { e.FederatesWith = []string{"no such"} }),
			`entry "x": dns_names: "*" `:  wrong(func(e *api.Entry) { e.DnsNames = []string{"*"} }),
			`entry "x": selectors: `:      wrong(func(e *api.Entry) { e.Selectors = nil }),
			`entry "x": x509_ttl: `:       wrong(func(e *api.Entry) { e.X509Ttl = durationpb.New(time.Minute) }),
		} {
			_, put := c.PutEntry(t.Context(), &api.PutEntryRequest{Entry: e})
			_, apply := apply(false, entry("new", "/new"), e)
			for _, err := range []error{put, apply} {
				if status.Code(err) != codes.InvalidArgument || !strings.HasPrefix(status.Convert(err).Message(), want) {
					t.Errorf("got %v, want %s", err, want)
				}
			}
		}
		if _, err := c.PutEntry(t.Context(), &api.PutEntryRequest{}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("no entry: %v", err)
		}
		if n := len(list()); n != 2 {
			t.Errorf("%d entries", n)
		}
	})
}

// TestEntriesOfAgent lists the entries that one agent serves.
func TestEntriesOfAgent(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, w *world, _ *remote, c *renewd.Client) {
		w.only().attest(t, spireapi.Agent{ID: agent("a"), Type: "k8s_psat", Selectors: []spireapi.Selector{{Type: "k8s_psat", Value: "cluster:one"}}})
		below := func(id, parent string) *api.Entry {
			e := entry(id, "/"+id)
			e.ParentId = parent
			return e
		}
		alias := below("cluster", serverID.String())
		alias.Selectors = []*api.Selector{{Type: "k8s_psat", Value: "cluster:one"}}
		_, err := c.ApplyEntries(t.Context(), &api.ApplyEntriesRequest{Entries: []*api.Entry{
			alias, below("all", ""), below("own", agent("a").String()), below("pod", "spiffe://example.org/cluster"), below("other", agent("b").String()),
		}})
		check(t, err)
		resp, err := c.ListEntries(t.Context(), &api.ListEntriesRequest{AgentId: agent("a").String()})
		check(t, err)
		var got []string
		for _, e := range resp.GetEntries() {
			got = append(got, e.GetId())
		}
		if !slices.Equal(got, []string{"all", "own", "pod"}) {
			t.Errorf("the agent has %v", got)
		}
		for id, code := range map[string]codes.Code{agent("b").String(): codes.NotFound, "b": codes.InvalidArgument} {
			if _, err := c.ListEntries(t.Context(), &api.ListEntriesRequest{AgentId: id}); status.Code(err) != code {
				t.Errorf("agent %q: %v", id, err)
			}
		}
	})
}

// TestRemovedEntries: many entries are removed at once only if the caller gives the exact
// number.
func TestRemovedEntries(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, w *world, _ *remote, c *renewd.Client) {
		s := w.only().server
		for _, tt := range []struct {
			before, removed int
			asks            bool
		}{
			{0, 0, false},
			{1, 0, false},
			{1, 1, true},
			{5, 5, true},
			{6, 5, false},
			{7, 6, true},
			{59, 6, true},
			{60, 6, false},
			{200, 20, false},
			{210, 21, true},
			{500, 21, true},
		} {
			var had []spireapi.Entry
			var list []*api.Entry
			for i := range tt.before {
				e := entry(fmt.Sprintf("e%d", i), "/had")
				had = append(had, spireapi.Entry{ID: e.GetId(), SPIFFEID: workload, Selectors: []spireapi.Selector{{Type: "unix", Value: "uid:1"}}})
				if i >= tt.removed {
					list = append(list, e) // changed, and not removed
				}
			}
			for _, more := range []int{0, 30} { // added entries do not compensate
				for i := range more {
					list = append(list, entry(fmt.Sprintf("n%d", i), "/new"))
				}
				for _, expected := range []*int64{nil, new(int64(0)), new(int64(tt.removed)), new(int64(tt.removed + 1)), new(int64(-1))} {
					_, err := s.ApplyEntries(t.Context(), had, false)
					check(t, err)
					req := &api.ApplyEntriesRequest{Entries: list, Remove: expected}
					text := fmt.Sprintf("%d of %d removed, %d added, expected: %v", tt.removed, tt.before, more, req)
					refused := expected != nil && *expected != int64(tt.removed) || expected == nil && tt.asks
					req.DryRun = true
					dry, err := c.ApplyEntries(t.Context(), req)
					if warned := len(dry.GetWarnings()) > 0; (err != nil) != (refused && expected != nil) || warned != (refused && expected == nil) {
						t.Errorf("%.100s: dry run: warnings %q, %v", text, dry.GetWarnings(), err)
					}
					req.DryRun = false
					_, err = c.ApplyEntries(t.Context(), req)
					if (status.Code(err) == codes.FailedPrecondition) != refused || !refused && err != nil {
						t.Errorf("%.100s: %v", text, err)
					}
					left := tt.before - tt.removed + more
					if refused {
						left = tt.before
					}
					if n := len(s.Entries()); n != left {
						t.Errorf("%.100s: %d entries", text, n)
					}
				}
			}
		}

		// A change between the dry run and the real one counts.
		_, err := s.ApplyEntries(t.Context(), nil, false)
		check(t, err)
		for _, id := range []string{"a", "b", "c"} {
			_, err = c.PutEntry(t.Context(), &api.PutEntryRequest{Entry: entry(id, "/x")})
			check(t, err)
		}
		list := []*api.Entry{entry("a", "/x")}
		_, err = c.ApplyEntries(t.Context(), &api.ApplyEntriesRequest{Entries: list, DryRun: true, Remove: new(int64(2))})
		check(t, err)
		_, err = c.PutEntry(t.Context(), &api.PutEntryRequest{Entry: entry("colleague", "/x")})
		check(t, err)
		_, err = c.ApplyEntries(t.Context(), &api.ApplyEntriesRequest{Entries: list, Remove: new(int64(2))})
		if got := status.Convert(err).Message(); !strings.HasPrefix(got, "this removes 3 of 4 entries, not 2 as --remove says") {
			t.Errorf("after another change: %v", err)
		}
	})
}

// TestManyEntries: 30 MB of entries fit into one request, and all of them changed into one
// answer, many small or a few large ones.
func TestManyEntries(t *testing.T) {
	t.Parallel()
	const n, size = 600, 50_000
	w := newWorldFor(t, nil, nil)
	c, err := renewd.DialSocket(adminSocket(t, w))
	check(t, err)
	defer c.Close()
	for _, value := range []string{"a", "b"} {
		req := &api.ApplyEntriesRequest{Entries: make([]*api.Entry, n)}
		for i := range req.Entries {
			req.Entries[i] = entry(fmt.Sprintf("e%d", i), "/many")
			req.Entries[i].Selectors[0].Value = strings.Repeat(value, size)
		}
		resp, err := c.ApplyEntries(t.Context(), req)
		check(t, err)
		if len(resp.GetChanges()) != n {
			t.Errorf("%d changes", len(resp.GetChanges()))
		}
	}
	list, err := c.ListEntries(t.Context(), &api.ListEntriesRequest{})
	check(t, err)
	if len(list.GetEntries()) != n {
		t.Errorf("%d entries", len(list.GetEntries()))
	}
}

// TestAgents creates a token, and lists, bans and evicts agents.
func TestAgents(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, w *world, _ *remote, c *renewd.Client) {
		d := w.only()
		for _, ttl := range []time.Duration{0, time.Hour} {
			req := &api.CreateJoinTokenRequest{}
			want := 10 * time.Minute
			if ttl > 0 {
				req.Ttl, want = durationpb.New(ttl), ttl
			}
			token, err := c.CreateJoinToken(t.Context(), req)
			check(t, err)
			kept, err := d.kept.TakeToken(t.Context(), token.GetToken())
			check(t, err)
			if end := time.Now().Add(want); !kept.ExpiresAt.Equal(end) || !token.GetExpiresAt().AsTime().Equal(end) {
				t.Errorf("ttl %v: ends %v, kept until %v", ttl, token.GetExpiresAt().AsTime(), kept.ExpiresAt)
			}
		}
		for _, ttl := range []time.Duration{-1, 24 * 365 * time.Hour} {
			if _, err := c.CreateJoinToken(t.Context(), &api.CreateJoinTokenRequest{Ttl: durationpb.New(ttl)}); status.Code(err) != codes.InvalidArgument {
				t.Errorf("ttl %v: %v", ttl, err)
			}
		}

		end := time.Now().Add(time.Hour)
		d.attest(t, spireapi.Agent{ID: agent("a"), Type: "join_token", ExpiresAt: end, Version: "v1"})
		d.attest(t, spireapi.Agent{ID: agent("b"), Type: "join_token", ExpiresAt: end})
		d.attest(t, spireapi.Agent{ID: agent("c"), Type: "join_token", ExpiresAt: end})
		d.ledger.Applied(agent("a").String(), 7)
		_, err := c.BanAgent(t.Context(), &api.BanAgentRequest{AgentId: agent("b").String()})
		check(t, err)
		_, err = c.EvictAgent(t.Context(), &api.EvictAgentRequest{AgentId: agent("c").String()})
		check(t, err)
		resp, err := c.ListAgents(t.Context(), &api.ListAgentsRequest{})
		check(t, err)
		type row struct {
			id, version string
			banned      bool
			sequence    uint64
			received    bool
		}
		var got []row
		for _, a := range resp.GetAgents() {
			if a.GetAttestationType() != "join_token" || !a.GetExpiresAt().AsTime().Equal(end) {
				t.Errorf("agent %v", a)
			}
			got = append(got, row{a.GetId(), a.GetVersion(), a.GetBanned(), a.GetAppliedSequence(), a.GetLastReport() != nil})
		}
		if want := []row{{agent("a").String(), "v1", false, 7, true}, {agent("b").String(), "", true, 0, false}}; !reflect.DeepEqual(got, want) {
			t.Errorf("agents %+v, want %+v", got, want)
		}

		// Only with gone it no longer counts.
		k := d.keysets.Active()
		check(t, d.ledger.RecordX509(t.Context(), ledger.Row{Authority: k.X509AuthorityID, Agent: agent("a").String(), NotAfter: end}))
		for i, c2 := range []struct {
			gone bool
			left int
		}{{false, 1}, {true, 0}} {
			_, err = c.EvictAgent(t.Context(), &api.EvictAgentRequest{AgentId: agent("a").String(), Gone: c2.gone})
			check(t, err)
			if n := d.ledger.X509(k.X509AuthorityID, false).SVIDs; n != c2.left {
				t.Errorf("evicted %d times: %d SVIDs count, want %d", i+1, n, c2.left)
			}
		}
		for text, code := range map[string]codes.Code{
			agent("z").String(): codes.NotFound, agent("a").String(): codes.NotFound, "spiffe://other.org/spire/agent/a": codes.NotFound,
			"a": codes.InvalidArgument, "": codes.InvalidArgument,
		} {
			_, ban := c.BanAgent(t.Context(), &api.BanAgentRequest{AgentId: text})
			_, evict := c.EvictAgent(t.Context(), &api.EvictAgentRequest{AgentId: text})
			_, gone := c.EvictAgent(t.Context(), &api.EvictAgentRequest{AgentId: text, Gone: true})
			if status.Code(ban) != code || status.Code(evict) != code || status.Code(gone) != code {
				t.Errorf("%q: %v, %v, %v; want %v", text, ban, evict, gone, code)
			}
		}
	})
}

// TestAudit reads the audit log in pages.
func TestAudit(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, w *world, r *remote, _ *renewd.Client) {
		d := w.only()
		old := d.tainted(t)
		next := d.keysets.Active()
		c := r.as(t, w, viewer)
		var got []string
		for after := uint64(0); ; {
			resp, err := c.ReadAudit(t.Context(), &api.ReadAuditRequest{After: after, Limit: 3})
			check(t, err)
			if len(resp.GetRecords()) == 0 {
				break
			}
			for _, rec := range resp.GetRecords() {
				got = append(got, fmt.Sprintf("%d %s %s %s %v", rec.GetNumber(), rec.GetActor(), rec.GetOperation(), rec.GetKeysetId(), rec.GetAt().AsTime().Equal(time.Now())))
				after = rec.GetNumber()
			}
		}
		if want := []string{
			"1 server create " + old.ID + " true", "2 server prepare " + next.ID + " true",
			"3 server activate " + next.ID + " true", "4 server taint " + old.ID + " true",
		}; !slices.Equal(got, want) {
			t.Errorf("got  %q\nwant %q", got, want)
		}
		resp, err := c.ReadAudit(t.Context(), &api.ReadAuditRequest{After: 2})
		check(t, err)
		states := func(of []*api.AuditState) map[string]api.KeysetState {
			out := make(map[string]api.KeysetState)
			for _, s := range of {
				out[s.GetKeysetId()] = s.GetState()
			}
			return out
		}
		taint := resp.GetRecords()[1]
		if before := states(taint.GetBefore()); before[old.ID] != api.KeysetState_PREPARED || before[next.ID] != api.KeysetState_ACTIVE || len(before) != 2 {
			t.Errorf("before %v", before)
		}
		if after := states(taint.GetAfter()); after[old.ID] != api.KeysetState_TAINTED || after[next.ID] != api.KeysetState_ACTIVE || len(after) != 2 {
			t.Errorf("after %v", after)
		}
	})
}

// TestAuditLimit: an answer has at most a thousand records.
func TestAuditLimit(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, w *world, _ *remote, c *renewd.Client) {
		for n := range 1500 {
			w.only().storage.log = append(w.only().storage.log, admin.AuditRecord{Number: uint64(n), Change: keyset.Change{At: time.Now()}})
		}
		for limit, want := range map[uint32]int{0: 1000, 5: 5, 1000: 1000, 1001: 1000, 1 << 31: 1000} {
			resp, err := c.ReadAudit(t.Context(), &api.ReadAuditRequest{Limit: limit})
			check(t, err)
			if got := len(resp.GetRecords()); got != want {
				t.Errorf("limit %d: %d records", limit, got)
			}
		}
	})
}

// TestBundle: the bundle is that for an agent's trust_bundle_file.
func TestBundle(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, w *world, _ *remote, c *renewd.Client) {
		w.only().tainted(t)
		resp, err := c.GetBundle(t.Context(), &api.GetBundleRequest{})
		check(t, err)
		if want := w.published(); string(resp.GetPem()) != string(want.PEM()) || resp.GetSequence() != want.Sequence || want.Sequence != 3 {
			t.Errorf("got %v", resp)
		}
	})
}

// TestLog: each change is logged once, with actor, operation and outcome; reads are not.
func TestLog(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, w *world, _ *remote, c *renewd.Client) {
		d, b := w.only(), c.Backend("", "")
		line := func() string {
			t.Helper()
			all := w.log.lines(t, "operator change")
			if len(all) != 1 {
				t.Fatalf("log: %v", all)
			}
			var out []string
			for k, v := range all[0] {
				if k != "time" && k != "duration" && k != "msg" {
					out = append(out, fmt.Sprint(k, "=", v))
				}
			}
			if _, ok := all[0]["duration"]; !ok {
				t.Error("no duration")
			}
			slices.Sort(out)
			return strings.Join(out, " ")
		}
		by := "actor=" + boss.String() + " "
		_, err := b.Status(t.Context())
		check(t, err)
		k, err := b.Prepare(t.Context())
		check(t, err)
		if got, want := line(), by+"deployment=default keyset_id="+k.ID+" level=INFO operation=PrepareKeyset outcome=OK"; got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
		active := d.keysets.Active().ID
		if err := b.Taint(t.Context(), active); err == nil {
			t.Fatal("no error")
		}
		if got, want := line(), by+"deployment=default error=cannot taint active key set keyset_id="+active+" level=WARN operation=TaintKeyset outcome=FailedPrecondition"; got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
		_, err = c.BanAgent(t.Context(), &api.BanAgentRequest{AgentId: agent("z").String()})
		if err == nil {
			t.Fatal("no error")
		}
		if got := line(); !strings.HasPrefix(got, by+"agent_id="+agent("z").String()+" deployment=default error=") {
			t.Errorf("got %s", got)
		}
		_, err = c.ApplyEntries(t.Context(), &api.ApplyEntriesRequest{Entries: []*api.Entry{entry("a", "/a")}, DryRun: true, Remove: new(int64(0))})
		check(t, err)
		if got, want := line(), by+"changed=1 deployment=default dry_run=true entries=1 level=INFO operation=ApplyEntries outcome=OK remove=0"; got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	})
}
