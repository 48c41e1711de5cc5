package server_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/server"
)

// TestAuditOfOperators: whatever an operator changes is in the audit log, with the actor and
// what was before and is after, and so is what the server deletes by itself. What changes
// nothing is not.
func TestAuditOfOperators(t *testing.T) {
	t.Parallel()
	c := newConfig(t, "east", "west")
	r := run(t, c)
	ctx, s := t.Context(), scope("east")
	entry := func(id, hint string) *api.Entry {
		return &api.Entry{Id: id, SpiffeId: "spiffe://example.org/" + id, Hint: hint, Selectors: []*api.Selector{{Type: "unix", Value: "uid:0"}}}
	}
	apply := func(dryRun bool, entries ...*api.Entry) {
		t.Helper()
		_, err := r.api.ApplyEntries(ctx, &api.ApplyEntriesRequest{Scope: s, Entries: entries, DryRun: dryRun, Remove: nil})
		check(t, err)
	}
	apply(true, entry("a", ""), entry("b", ""))
	apply(false, entry("a", ""), entry("b", ""))
	apply(false, entry("a", ""), entry("b", "")) // the same again
	apply(false, entry("a", "new"), entry("b", ""))
	ended := entry("ended", "")
	ended.ExpiresAt = timestamppb.New(time.Now().Add(-time.Hour).Truncate(time.Second))
	_, err := r.api.PutEntry(ctx, &api.PutEntryRequest{Scope: s, Entry: ended})
	check(t, err)
	_, err = r.api.DeleteEntry(ctx, &api.DeleteEntryRequest{Scope: s, Id: "b"})
	check(t, err)
	if _, err := r.api.DeleteEntry(ctx, &api.DeleteEntryRequest{Scope: s, Id: "b"}); status.Code(err) != codes.NotFound {
		t.Errorf("deleted twice: %v", err)
	}
	token, err := r.api.CreateJoinToken(ctx, &api.CreateJoinTokenRequest{Scope: s, Label: "rack 1"})
	check(t, err)
	a := r.attest("east", token.GetToken())
	_, err = a.Report(ctx, &api.ReportRequest{Hostname: "node-1"})
	check(t, err)
	for range 2 {
		_, err = r.api.BanAgent(ctx, &api.BanAgentRequest{Scope: s, AgentId: a.id.String()})
		check(t, err)
	}
	for _, gone := range []bool{false, true} {
		_, err = r.api.EvictAgent(ctx, &api.EvictAgentRequest{Scope: s, AgentId: a.id.String(), Gone: gone})
		check(t, err)
	}
	if _, err := r.api.EvictAgent(ctx, &api.EvictAgentRequest{Scope: s, AgentId: a.id.String(), Gone: true}); status.Code(err) != codes.NotFound {
		t.Errorf("evicted a third time: %v", err)
	}
	stream, err := r.api.Backup(ctx, &api.BackupRequest{})
	check(t, err)
	for err == nil {
		_, err = stream.Recv()
	}
	if !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	check(t, r.Server("east").PruneEntries(ctx))

	me := "unix:uid:" + strconv.Itoa(os.Geteuid())
	agent := strings.TrimPrefix(a.id.String(), "spiffe://example.org")
	want := []string{
		me + " entries add entry apply: - -> a []",
		me + " entries add entry apply: - -> b []",
		me + ` entries change entry apply: a [] -> a [new]`,
		me + " entries add entry put: - -> ended []",
		me + " entries remove entry delete: b [] -> -",
		me + " tokens create token : rack 1",
		me + " agents ban agent : " + agent + " node-1 rack 1 attested -> banned false",
		me + " agents evict agent : " + agent + " node-1 rack 1 banned ->  false",
		me + " agents evict agent : " + agent + "    ->  true",
		me + " backups backup : ",
		"server entries remove entry expired: ended [] -> -",
	}
	if got := r.audit(t, "east", "entries", "tokens", "agents", "backups"); !slices.Equal(got, want) {
		t.Errorf("audit log\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if got := r.audit(t, "west"); len(got) != 2 || !strings.HasSuffix(got[1], " backups backup : ") {
		t.Errorf("west, whose store is the same, has %q", got)
	}
	for _, token := range []string{token.GetToken()} {
		store, err := os.ReadFile(filepath.Join(c.DataDir, server.FileName))
		check(t, err)
		if n := strings.Count(string(store), `"Token":{"Label":"rack 1"`); n == 0 || strings.Contains(string(store), `"Value":"`+token) {
			t.Errorf("%d records of the token, or the token itself", n)
		}
	}
	if _, err := r.api.ReadAudit(ctx, &api.ReadAuditRequest{Scope: s, Kinds: []string{"entry"}}); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), `no kind "entry", only ["keysets" "entries"`) {
		t.Errorf("an unknown kind: %v", err)
	}
}

// TestAuditOfSPIRE: changes through SPIRE's Entry API are in the audit log.
func TestAuditOfSPIRE(t *testing.T) {
	t.Parallel()
	c := newConfig(t, "default")
	r := run(t, c)
	conn, err := grpc.NewClient("unix:"+c.AdminSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	check(t, err)
	defer conn.Close()
	spire := entryv1.NewEntryClient(conn)
	in := &types.Entry{
		Id: "e", SpiffeId: &types.SPIFFEID{TrustDomain: "example.org", Path: "/w"}, ParentId: &types.SPIFFEID{TrustDomain: "example.org", Path: "/spire/agent"},
		Selectors: []*types.Selector{{Type: "unix", Value: "uid:0"}},
	}
	_, err = spire.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{in}})
	check(t, err)
	in.Hint = "new"
	_, err = spire.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{in}})
	check(t, err)
	_, err = spire.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{"e", "none"}})
	check(t, err)
	me := "unix:uid:" + strconv.Itoa(os.Geteuid())
	want := []string{
		me + " entries add entry SPIRE's Entry API: - -> e []",
		me + " entries change entry SPIRE's Entry API: e [] -> e [new]",
		me + " entries remove entry SPIRE's Entry API: e [new] -> -",
	}
	if got := r.audit(t, "default", "entries"); !slices.Equal(got, want) {
		t.Errorf("audit log\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// audit returns the records of the audit log as text, of some kinds or all.
func (r *running) audit(t *testing.T, deployment string, kinds ...string) (out []string) {
	t.Helper()
	show := func(e *api.Entry) string {
		if e == nil {
			return "-"
		}
		return fmt.Sprintf("%s [%s]", e.GetId(), e.GetHint())
	}
	for after := uint64(0); ; {
		resp, err := r.api.ReadAudit(t.Context(), &api.ReadAuditRequest{Scope: scope(deployment), Kinds: kinds, After: after, Limit: 3})
		check(t, err)
		if len(resp.GetRecords()) == 0 {
			return out
		}
		for _, rec := range resp.GetRecords() {
			after = rec.GetNumber()
			text := fmt.Sprintf("%s %s %s %s: ", rec.GetActor(), rec.GetKind(), rec.GetOperation(), rec.GetNote())
			if e := rec.GetEntry(); e != nil {
				text += show(e.GetBefore()) + " -> " + show(e.GetAfter())
			}
			if rec.GetToken() != nil {
				text += rec.GetToken().GetLabel()
			}
			if a := rec.GetAgent(); a != nil {
				text += fmt.Sprintf("%s %s %s %s -> %s %v", strings.TrimPrefix(a.GetId(), "spiffe://example.org"), a.GetHostname(), a.GetLabel(), a.GetBefore(), a.GetAfter(), a.GetGone())
			}
			if age := time.Since(rec.GetAt().AsTime()); age < 0 || age > time.Minute {
				t.Errorf("%s: %v ago", text, age)
			}
			out = append(out, text)
		}
	}
}
