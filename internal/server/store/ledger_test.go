package store_test

import (
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/store"
)

// TestLedgerStorage checks that the store satisfies ledger.Storage.
func TestLedgerStorage(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	s := open(t, path)
	var d ledger.Storage = s.Deployment("default")
	want, wantJWT := map[string]ledger.Row{}, map[string]time.Time{}
	check := func() {
		t.Helper()
		got := map[string]ledger.Row{}
		n := 0
		jwt, err := d.LoadLedger(t.Context(), func(r ledger.Row) {
			got[fmt.Sprintf("%q %q %q", r.Authority, r.Agent, r.Entry)] = r
			n++
		})
		if err != nil || n != len(got) || !maps.Equal(got, want) || jwt == nil || !maps.Equal(jwt, wantJWT) {
			t.Errorf("%v %v, %v, want %v %v", got, jwt, err, want, wantJWT)
		}
	}
	save := func(c ledger.Change) {
		t.Helper()
		if err := d.SaveLedger(t.Context(), c); err != nil {
			t.Fatal(err)
		}
		for _, r := range c.Put {
			want[fmt.Sprintf("%q %q %q", r.Authority, r.Agent, r.Entry)] = r
		}
		for _, r := range c.Gone {
			delete(want, fmt.Sprintf("%q %q %q", r.Authority, r.Agent, r.Entry))
		}
		for id, at := range c.JWT {
			if wantJWT[id] = at; at.IsZero() {
				delete(wantJWT, id)
			}
		}
		check()
	}
	check()
	save(ledger.Change{})
	row := func(authority, agent, entry string, at time.Time) ledger.Row {
		return ledger.Row{Authority: authority, Agent: agent, Entry: entry, NotAfter: at}
	}
	save(ledger.Change{Put: []ledger.Row{
		row("ab", "c", "e", start), row("a", "bc", "e", start), row("a", "b", "ce", start), row("a", "b", "", start),
		row("a", "b", "x\x00y", start), row("a", "b", "x", start), row("a", "b", "x", start.Add(time.Hour)),
	}, JWT: map[string]time.Time{"k": start, "l": start.Add(time.Second)}})
	save(ledger.Change{Put: []ledger.Row{row("a", "b", "x", start.Add(-time.Hour))}, JWT: map[string]time.Time{"k": {}, "m": {}}})
	save(ledger.Change{Gone: []ledger.Row{row("a", "b", "", time.Time{}), row("not", "there", "", start)}})
	for _, r := range []ledger.Row{row("a\x00", "b", "", start), row("a", "\x00b", "", start), row("a", "b", strings.Repeat("x", 1<<15), start)} {
		if err := d.SaveLedger(t.Context(), ledger.Change{Put: []ledger.Row{row("z", "z", "z", start), r}}); err == nil {
			t.Errorf("no error for %.20q", r)
		}
	}
	check()
	closed(t, s)
	s = opened(t, path)
	d = s.Deployment("default")
	check()
}

// TestAudit: each mutation has a record, stored in the same commit.
func TestAudit(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	s := open(t, path)
	d := s.Deployment("one")
	if got, err := d.Audit(t.Context(), 0, 0); err != nil || got != nil {
		t.Errorf("at first: %v, %v", got, err)
	}
	ctx := keyset.WithNote(keyset.WithActor(t.Context(), "uid 0"), "ticket 7")
	ks, err := keyset.Open(ctx, keyset.Config{TrustDomain: td, Storage: d})
	if err != nil {
		t.Fatal(err)
	}
	next, err := ks.Prepare(ctx)
	if err == nil {
		err = ks.Activate(ctx, next.ID)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := ks.Activate(ctx, next.ID); err == nil {
		t.Error("activated twice")
	}
	if err := d.Save(ctx, keyset.Document{}, keyset.Change{Operation: "lost"}); !errors.Is(err, keyset.ErrConflict) {
		t.Error(err)
	}
	if _, err := keyset.Open(ctx, keyset.Config{TrustDomain: td, Storage: s.Deployment("two")}); err != nil {
		t.Fatal(err)
	}
	closed(t, s)
	s = opened(t, path)
	if names, err := s.Deployments(ctx); err != nil || !slices.Equal(names, []string{"one", "two"}) {
		t.Errorf("deployments %v, %v", names, err)
	}
	d = s.Deployment("one")
	all, err := d.Audit(ctx, 0, 0)
	if err != nil || len(all) != 3 {
		t.Fatalf("%+v, %v", all, err)
	}
	first := slices.Sorted(maps.Keys(all[0].After))[0]
	want := store.AuditRecord{Number: 3, Change: keyset.Change{
		At: all[2].At, Actor: "uid 0", Operation: "activate", KeysetID: next.ID, Note: "ticket 7",
		Before: map[string]keyset.State{first: keyset.Active, next.ID: keyset.Prepared},
		After:  map[string]keyset.State{first: keyset.Prepared, next.ID: keyset.Active},
	}}
	if all[2].At.IsZero() || !reflect.DeepEqual(all[2], want) {
		t.Errorf("%+v, want %+v", all[2], want)
	}
	if all[0].Number != 1 || all[0].Operation != "create" || all[1].Number != 2 || all[1].Operation != "prepare" {
		t.Errorf("%+v", all)
	}
	for _, c := range []struct {
		after uint64
		limit int
		want  []store.AuditRecord
	}{{0, 2, all[:2]}, {1, 1, all[1:2]}, {2, 9, all[2:]}, {3, 0, nil}, {99, 0, nil}} {
		if got, err := d.Audit(ctx, c.after, c.limit); err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("after %d, limit %d: %+v, %v", c.after, c.limit, got, err)
		}
	}
}
