package keyset_test

import (
	"context"
	"errors"
	"maps"
	"reflect"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/internal/refusal"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/test/memory"
)

// audited is a storage that keeps the audit log.
type audited struct {
	memory.Keysets
	log []keyset.Change
}

func (a *audited) Save(ctx context.Context, d keyset.Document, c keyset.Change) error {
	if err := a.Keysets.Save(ctx, d, c); err != nil {
		return err
	}
	a.log = append(a.log, c)
	return nil
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestAudit checks the audit records of a rotation.
func TestAudit(t *testing.T) {
	t.Parallel()
	c := &clock{start}
	store := new(audited)
	d := open(t, keyset.Config{Storage: store, Now: c.Now})
	later := func() time.Time { c.now = c.now.Add(time.Hour); return c.now }
	alice := keyset.WithNote(keyset.WithActor(t.Context(), "unix:uid:1000"), "monthly drill")
	old := d.Active().ID

	at := []time.Time{start, later()}
	next, err := d.Prepare(alice)
	check(t, err)
	at = append(at, later())
	check(t, d.Activate(keyset.WithActor(t.Context(), "scheduler"), next.ID))
	at = append(at, later())
	check(t, d.Taint(alice, old))
	at = append(at, later())
	check(t, d.Remove(alice, old))
	if err := d.Remove(alice, old); err == nil {
		t.Error("removed twice")
	}

	const p, a, x = keyset.Prepared, keyset.Active, keyset.Tainted
	type states = map[string]keyset.State
	want := []keyset.Change{
		{Actor: "server", Operation: "create", KeysetID: old, Before: states{}, After: states{old: a}},
		{Actor: "unix:uid:1000", Operation: "prepare", KeysetID: next.ID, Before: states{old: a}, After: states{old: a, next.ID: p}, Note: "monthly drill"},
		{Actor: "scheduler", Operation: "activate", KeysetID: next.ID, Before: states{old: a, next.ID: p}, After: states{old: p, next.ID: a}},
		{Actor: "unix:uid:1000", Operation: "taint", KeysetID: old, Before: states{old: p, next.ID: a}, After: states{old: x, next.ID: a}, Note: "monthly drill"},
		{Actor: "unix:uid:1000", Operation: "remove", KeysetID: old, Before: states{old: x, next.ID: a}, After: states{next.ID: a}, Note: "monthly drill"},
	}
	for i := range want {
		want[i].At = at[i]
	}
	if len(store.log) != len(want) {
		t.Fatalf("%d audit records, want %d: %v", len(store.log), len(want), store.log)
	}
	for i, got := range store.log {
		if !reflect.DeepEqual(got, want[i]) {
			t.Errorf("change %d:\n got %v\nwant %v", i, got, want[i])
		}
	}
}

// TestNote adds a line to the audit log and changes nothing.
func TestNote(t *testing.T) {
	t.Parallel()
	store := new(audited)
	d := open(t, keyset.Config{Storage: store})
	before := list(t, d)
	check(t, d.Note(keyset.WithNote(keyset.WithActor(t.Context(), "unix:uid:0"), "from Monday"), "restore"))
	last := store.log[len(store.log)-1]
	if last.Operation != "restore" || last.Actor != "unix:uid:0" || last.Note != "from Monday" || last.KeysetID != "" || !maps.Equal(last.Before, last.After) {
		t.Errorf("noted %+v", last)
	}
	if got := list(t, d); !maps.Equal(got, before) || d.Bundle().Sequence != 1 {
		t.Errorf("changed %v to %v", before, got)
	}
}

// TestActorsAndTimes checks the actors and times in the keysets, before and after they
// are loaded from storage.
func TestActorsAndTimes(t *testing.T) {
	t.Parallel()
	c := &clock{start}
	store := new(memory.Keysets)
	d := open(t, keyset.Config{Storage: store, Now: c.Now})
	expect := func(rotated time.Time, id, by string, down, tainted time.Time) {
		t.Helper()
		for _, d := range []*keyset.Deployment{d, open(t, keyset.Config{Storage: store})} {
			k := list(t, d)[id]
			if k.SteppedDownBy != by || k.SteppedDownAt != down || k.TaintedAt != tainted {
				t.Errorf("stepped down by %q at %v, tainted at %v; want %q, %v and %v", k.SteppedDownBy, k.SteppedDownAt, k.TaintedAt, by, down, tainted)
			}
			if got := d.Status().RotatedAt; got != rotated {
				t.Errorf("rotated at %v, want %v", got, rotated)
			}
		}
	}
	var never time.Time
	first := d.Active()
	expect(first.IssuedAt, first.ID, "", never, never)
	next, err := d.Prepare(t.Context())
	check(t, err)
	expect(first.IssuedAt, next.ID, "", never, never)

	c.now = start.Add(time.Hour)
	check(t, d.Activate(keyset.WithActor(t.Context(), "alice"), next.ID))
	expect(c.now, first.ID, "alice", c.now, never)
	expect(c.now, next.ID, "", never, never)

	// Active again: the keyset that signs has not stepped down.
	c.now = start.Add(2 * time.Hour)
	check(t, d.Activate(keyset.WithActor(t.Context(), "bob"), first.ID))
	expect(c.now, first.ID, "", never, never)
	expect(c.now, next.ID, "bob", c.now, never)

	down := c.now
	c.now = start.Add(3 * time.Hour)
	check(t, d.Taint(t.Context(), next.ID))
	expect(down, next.ID, "bob", down, c.now)
}

// TestTimesCanBeStored uses the real clock, whose times have a monotonic reading.
func TestTimesCanBeStored(t *testing.T) {
	t.Parallel()
	store := new(audited)
	d := open(t, keyset.Config{Storage: store})
	old := d.Active().ID
	next, err := d.Prepare(t.Context())
	check(t, err)
	check(t, d.Activate(t.Context(), next.ID))
	check(t, d.Taint(t.Context(), old))
	k := list(t, d)[old]
	times := []time.Time{k.IssuedAt, k.ExpiresAt, k.SteppedDownAt, k.TaintedAt, d.Status().RotatedAt}
	for _, c := range store.log {
		times = append(times, c.At)
	}
	for i, at := range times {
		if at.IsZero() || at.Location() != time.UTC || at != at.Round(0) {
			t.Errorf("time %d is %#v", i, at)
		}
	}
}

// TestCheck refuses each operation by a Check, and compares the keysets that the Check
// receives.
func TestCheck(t *testing.T) {
	t.Parallel()
	not := errors.New("not now")
	store := new(audited)
	d := open(t, keyset.Config{Storage: store})
	tainted, err := d.Prepare(t.Context())
	check(t, err)
	check(t, d.Taint(t.Context(), tainted.ID))
	prepared, err := d.Prepare(t.Context())
	check(t, err)
	// Another process prepares a keyset: the Check receives the stored keysets.
	_, err = open(t, keyset.Config{Storage: store}).Prepare(t.Context())
	check(t, err)

	before, commits := d.Status(), len(store.log)
	var shown []keyset.Keyset
	refuse := func(all []keyset.Keyset) error {
		if got := d.Status().Keysets; !slices.Equal(got, all) {
			t.Errorf("shown %v, in force is %v", all, got)
		}
		shown = slices.Clone(all)
		all[0].State = keyset.Tainted // must be a copy
		return not
	}
	for name, do := range map[string]func(keyset.Check) error{
		"prepare":  func(c keyset.Check) error { return second(d.Prepare(t.Context(), c)) },
		"activate": func(c keyset.Check) error { return d.Activate(t.Context(), prepared.ID, c) },
		"taint":    func(c keyset.Check) error { return d.Taint(t.Context(), prepared.ID, c) },
		"remove":   func(c keyset.Check) error { return d.Remove(t.Context(), tainted.ID, c) },
	} {
		shown = nil
		if err := do(refuse); !errors.Is(err, not) || err.Error() != "not now" {
			t.Errorf("%s: %v", name, err)
		}
		if len(shown) != 4 || !slices.Equal(shown[:3], before.Keysets) {
			t.Errorf("%s: the check was shown %v", name, shown)
		}
		if len(store.log) != commits || len(list(t, d)) != 4 {
			t.Errorf("%s: refused, and something has changed", name)
		}
	}
	// A step that the state does not allow is refused for that reason.
	if err := d.Remove(t.Context(), prepared.ID, refuse); !errors.Is(err, refusal.ErrRemovePrepared) {
		t.Errorf("remove of a prepared keyset: %v", err)
	}
	if err := d.Remove(t.Context(), tainted.ID, func([]keyset.Keyset) error { return nil }); err != nil {
		t.Errorf("remove that the check allows: %v", err)
	}
}

// TestCheckIsAtomic: another process changes the keysets after the Check.
func TestCheckIsAtomic(t *testing.T) {
	t.Parallel()
	store := new(memory.Keysets)
	other := open(t, keyset.Config{Storage: store})
	d := open(t, keyset.Config{Storage: store})
	k, err := d.Prepare(t.Context())
	check(t, err)
	check(t, d.Taint(t.Context(), k.ID))
	err = d.Remove(t.Context(), k.ID, func([]keyset.Keyset) error {
		if err := d.Taint(t.Context(), k.ID); !errors.Is(err, refusal.ErrBusy) {
			t.Errorf("another mutation during a check: %v", err)
		}
		return second(other.Prepare(t.Context()))
	})
	if !errors.Is(err, refusal.ErrBusy) || len(list(t, d)) != 3 {
		t.Errorf("remove: %v, then %v", err, list(t, d))
	}
}

// TestChanged follows a deployment by its Status.
func TestChanged(t *testing.T) {
	t.Parallel()
	closed := func(s keyset.Status) bool {
		select {
		case <-s.Changed:
			return true
		default:
			return false
		}
	}
	store := &failing{Storage: new(memory.Keysets)}
	d := open(t, keyset.Config{Storage: store})
	s := d.Status()
	store.save = errors.New("disk")
	if err := second(d.Prepare(t.Context())); err == nil || closed(s) {
		t.Errorf("a mutation that failed: %v, changed: %v", err, closed(s))
	}
	store.save = nil
	if d.List(t.Context()); closed(s) || d.Bundle() != s.Bundle {
		t.Error("List changed something")
	}
	k, err := d.Prepare(t.Context())
	check(t, err)
	if !closed(s) {
		t.Error("prepare: Changed is not closed")
	}
	s = d.Status()
	if len(s.Keysets) != 2 || s.Bundle != d.Bundle() || s.Bundle.Sequence != 2 {
		t.Errorf("status is %v", s)
	}
	s.Keysets[0].ID = "mine"
	if d.Status().Keysets[0].ID == "mine" {
		t.Error("status is shared")
	}
	// A change of another process is seen by List.
	check(t, open(t, keyset.Config{Storage: store.Storage}).Activate(t.Context(), k.ID))
	if closed(s) {
		t.Error("Changed is closed before the change was loaded")
	}
	if d.List(t.Context()); !closed(s) || d.Status().Bundle.Sequence != 2 {
		t.Error("activation by another process: Changed is not closed")
	}
}

// TestUnknownOutcome loses the answer of a commit.
func TestUnknownOutcome(t *testing.T) {
	t.Parallel()
	store := &failing{Storage: new(memory.Keysets)}
	d := open(t, keyset.Config{Storage: store})
	store.Storage = failsAfterSave{store.Storage, errors.New("connection lost")}
	if _, err := d.Prepare(t.Context()); err == nil || err.Error() != "prepare keyset: save: connection lost" {
		t.Errorf("prepare: %v", err)
	}
	if n := len(d.Bundle().X509); n != 1 {
		t.Errorf("%d keysets are published before List", n)
	}
	if got := list(t, d); len(got) != 2 || len(d.Bundle().X509) != 2 {
		t.Errorf("after List: %v", got)
	}
}

// failsAfterSave is a storage that saves and returns an error.
type failsAfterSave struct {
	keyset.Storage
	err error
}

func (a failsAfterSave) Save(ctx context.Context, d keyset.Document, c keyset.Change) error {
	if err := a.Storage.Save(ctx, d, c); err != nil {
		return err
	}
	return a.err
}

// TestReadsDoNotWait reads while a mutation is in its commit.
func TestReadsDoNotWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &slow{gate: make(chan struct{})}
		close(store.gate)
		d := open(t, keyset.Config{Storage: store})
		store.gate = make(chan struct{})
		done := make(chan error)
		go func() { done <- second(d.Prepare(t.Context())) }()
		synctest.Wait()
		begin := time.Now()
		all, err := d.List(t.Context())
		if err != nil || len(all) != 1 || len(d.Status().Keysets) != 1 || len(d.Bundle().X509) != 1 || d.Active() != all[0] {
			t.Errorf("during the commit: %v, %v", all, err)
		}
		if took := time.Since(begin); took != 0 {
			t.Errorf("reads waited %v", took)
		}
		close(store.gate)
		check(t, <-done)
	})
}

func TestUnion(t *testing.T) {
	t.Parallel()
	a, b := open(t, keyset.Config{Name: "a"}), open(t, keyset.Config{Name: "b"})
	k, err := b.Prepare(t.Context())
	check(t, err)
	check(t, b.Taint(t.Context(), k.ID))
	u := keyset.Union(a.Bundle(), b.Bundle())
	if u.Sequence != 1+3 {
		t.Errorf("sequence is %d", u.Sequence)
	}
	want := []string{a.Active().X509AuthorityID, b.Active().X509AuthorityID, k.X509AuthorityID}
	wantJWT := []string{a.Active().JWTKeyID, b.Active().JWTKeyID, k.JWTKeyID}
	for i, x := range u.X509 {
		if j := u.JWT[i]; x.ID != want[i] || j.KeyID != wantJWT[i] || x.Tainted != (i == 2) || j.Tainted != (i == 2) {
			t.Errorf("authority %d is %v and %v", i, x.ID, j.KeyID)
		}
	}
	if len(u.X509) != 3 || len(u.JWT) != 3 || len(a.Bundle().X509) != 1 {
		t.Errorf("%d and %d authorities", len(u.X509), len(u.JWT))
	}
	if u := keyset.Union(); u.Sequence != 0 || len(u.Certificates()) != 0 {
		t.Errorf("the union of nothing is %v", u)
	}
}
