package store_test

import (
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/internal/server/store"
)

// TestAuditOfEachKind: a record is stored with its change and numbered after the one before,
// whatever it is about, and none is stored for a change that is rejected.
func TestAuditOfEachKind(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	s := open(t, path)
	d, ctx := s.Deployment("default"), t.Context()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	before := spireapi.Entry{ID: "e", SPIFFEID: spiffeid.RequireFromPath(td, "/w"), Hint: "h"}
	token := &spireapi.AuditRecord{At: start, Actor: "unix:uid:7", Operation: spireapi.CreateToken, Token: &spireapi.AuditToken{Label: "rack 1", ExpiresAt: start}}
	entry := &spireapi.AuditRecord{At: start, Actor: "server", Operation: spireapi.RemoveEntry, Note: "expired", Entry: &spireapi.EntryChange{Before: &before}}
	agent := &spireapi.AuditRecord{At: start, Actor: "unix:uid:7", Operation: spireapi.BanAgent, Agent: &spireapi.AgentChange{ID: agentID(1).String()}}
	rejected := &spireapi.AuditRecord{Operation: "rejected", Agent: &spireapi.AgentChange{}}
	check(d.Save(ctx, document(1), keyset.Change{At: start, Operation: "create", KeysetID: "ks_a"}))
	check(d.PutToken(ctx, spireapi.Token{Value: "a", ExpiresAt: start}, token))
	check(d.PutEntries(ctx, nil, []string{"e"}, entry))
	if _, err := d.UpdateAgent(ctx, agentID(1), func(*spireapi.Agent) (*spireapi.Agent, error) { return nil, spireapi.ErrNotFound }, rejected); err == nil {
		t.Error("not rejected")
	}
	_, err := d.UpdateAgent(ctx, agentID(1), func(*spireapi.Agent) (*spireapi.Agent, error) {
		agent.Agent.After = "banned"
		return &spireapi.Agent{ID: agentID(1), Banned: true}, nil
	}, agent)
	check(err)
	check(d.AddAudit(ctx, keyset.Change{At: start, Actor: "unix:uid:7", Operation: "backup"}))
	second := document(1)
	second.Version = 2
	check(d.Save(ctx, second, keyset.Change{At: start, Operation: "taint", KeysetID: "ks_a"}))
	closed(t, s)

	s = opened(t, path)
	got, err := s.Deployment("default").Audit(ctx, 0, 0)
	check(err)
	change := func(actor, operation, note string) keyset.Change {
		return keyset.Change{At: start, Actor: actor, Operation: operation, Note: note}
	}
	want := []store.AuditRecord{
		{Number: 1, Change: keyset.Change{At: start, Operation: "create", KeysetID: "ks_a"}},
		{Number: 2, Change: change("unix:uid:7", "create token", ""), Token: token.Token},
		{Number: 3, Change: change("server", "remove entry", "expired"), Entry: entry.Entry},
		{Number: 4, Change: change("unix:uid:7", "ban agent", ""), Agent: &spireapi.AgentChange{ID: agentID(1).String(), After: "banned"}},
		{Number: 5, Change: change("unix:uid:7", "backup", "")},
		{Number: 6, Change: keyset.Change{At: start, Operation: "taint", KeysetID: "ks_a"}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

// TestAuditOfAnOlderFormat: a store of format 4, whose audit log has the changes of keysets
// only, keeps its records and continues after them.
func TestAuditOfAnOlderFormat(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	s := open(t, path)
	fill(t, s.Deployment("default")) // two records
	closed(t, s)
	old := `{"Number":%d,"At":"2026-01-02T03:04:05.000000678Z","Actor":"scheduler","Operation":"taint","KeysetID":"ks_a","Before":{"ks_a":"PREPARED"},"After":{"ks_a":"TAINTED"},"Note":""}`
	edit(t, path, func(tx *bbolt.Tx) error {
		b := tx.Bucket([]byte("deployments")).Bucket([]byte("default")).Bucket([]byte("audit"))
		for n := range byte(2) {
			key := []byte{0, 0, 0, 0, 0, 0, 0, n + 1}
			if err := b.Put(key, store.Pack(key, fmt.Appendf(nil, old, n+1))); err != nil {
				return err
			}
		}
		return tx.Bucket([]byte("about")).Put([]byte("store"), store.Pack([]byte("store"), []byte(`{"format":4,"trust_domain":"example.org"}`)))
	})
	s = opened(t, path)
	d := s.Deployment("default")
	if err := d.AddAudit(t.Context(), keyset.Change{At: start, Operation: "backup"}); err != nil {
		t.Fatal(err)
	}
	got, err := d.Audit(t.Context(), 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	taint := keyset.Change{
		At: start, Actor: "scheduler", Operation: "taint", KeysetID: "ks_a",
		Before: map[string]keyset.State{"ks_a": keyset.Prepared}, After: map[string]keyset.State{"ks_a": keyset.Tainted},
	}
	if want := []store.AuditRecord{
		{Number: 1, Change: taint}, {Number: 2, Change: taint}, {Number: 3, Change: keyset.Change{At: start, Operation: "backup"}},
	}; !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if raw := readFile(t, path); !strings.Contains(string(raw), `{"format":5,`) {
		t.Error("an older program would accept the store")
	}
}

// TestAuditIsBounded: old records of entries are deleted, those of keysets stay, and no
// change deletes its own records.
func TestAuditIsBounded(t *testing.T) {
	t.Parallel()
	s, err := store.OpenTemporary(options())
	if err != nil {
		t.Fatal(err)
	}
	defer closed(t, s)
	s.KeepAudit(2000) // in steps of ten
	d := s.Deployment("default")
	ctx := t.Context()
	numbers := func() (first, count int, keysets []uint64) {
		t.Helper()
		all, err := d.Audit(ctx, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range all {
			if r.Entry == nil {
				keysets = append(keysets, r.Number)
			} else if first == 0 {
				first = int(r.Number)
			}
		}
		return first, len(all) - len(keysets), keysets
	}
	change := &spireapi.EntryChange{Before: &spireapi.Entry{ID: "e"}}
	put := func(n int) {
		t.Helper()
		records := make([]*spireapi.AuditRecord, n)
		for i := range records {
			records[i] = &spireapi.AuditRecord{At: start, Operation: spireapi.RemoveEntry, Entry: change}
		}
		if err := d.PutEntries(ctx, nil, nil, records...); err != nil {
			t.Fatal(err)
		}
	}
	put(9)
	if err := d.AddAudit(ctx, keyset.Change{At: start, Operation: "backup"}); err != nil {
		t.Fatal(err)
	}
	put(1990)
	for _, c := range []struct{ put, first, count int }{
		{0, 1, 1999},
		{9, 1, 2008},       // less than a step since the last deletion
		{1, 11, 2000},      // 2010 records: those up to 10 go, except that of the backup
		{2500, 2011, 2500}, // as many as the change has
		{10_000, 4511, 10_000},
	} {
		put(c.put)
		if first, count, keysets := numbers(); first != c.first || count != c.count || !reflect.DeepEqual(keysets, []uint64{10}) {
			t.Errorf("after %d more: %d records from %d on, and %v; want %d from %d on", c.put, count, first, keysets, c.count, c.first)
		}
	}
}

// BenchmarkMassApply measures the commit of 100,000 entries that are added, and of the same
// entries changed, each with its record in the audit log and without.
func BenchmarkMassApply(b *testing.B) {
	const n = 100_000
	for b.Loop() {
		for _, audited := range []bool{false, true} {
			path := newPath(b)
			s := open(b, path)
			d := s.Deployment("default")
			var before []spireapi.StoredEntry
			for _, hint := range []string{"", "changed"} {
				entries := make([]spireapi.StoredEntry, n)
				var records []*spireapi.AuditRecord
				for i := range entries {
					entries[i] = spireapi.StoredEntry{Revision: int64(i), CreatedAt: start, Entry: spireapi.Entry{
						ID: entryID(i), SPIFFEID: spiffeid.RequireFromPathf(td, "/ns/shop/sa/service-%d", i), ParentID: agentID(i % 1000), Hint: hint,
						Selectors: []spireapi.Selector{{Type: "k8s", Value: "ns:shop"}, {Type: "k8s", Value: fmt.Sprintf("sa:service-%d", i)}},
					}}
					if audited {
						c := &spireapi.EntryChange{After: &entries[i].Entry}
						if before != nil {
							c.Before = &before[i].Entry
						}
						records = append(records, &spireapi.AuditRecord{At: start, Actor: "unix:uid:1000", Operation: spireapi.AddEntry, Note: "apply", Entry: c})
					}
				}
				begin := time.Now()
				if err := d.PutEntries(b.Context(), entries, nil, records...); err != nil {
					b.Fatal(err)
				}
				b.Logf("audited %-5v hint %-8q %6.2f s, file %6.1f MB", audited, hint, time.Since(begin).Seconds(), float64(sizeOf(b, path))/1e6)
				before = entries
			}
			begin := time.Now()
			closed(b, s)
			s = open(b, path)
			b.Logf("audited %-5v opened in %.2f s", audited, time.Since(begin).Seconds())
			closed(b, s)
		}
	}
}
