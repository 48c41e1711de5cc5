package keyset_test

import (
	"context"
	"errors"
	"maps"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/internal/refusal"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/test/memory"
)

// TestSecondMutationFailsAtOnce blocks one mutation in its commit.
func TestSecondMutationFailsAtOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &slow{gate: make(chan struct{})}
		close(store.gate)
		d := open(t, keyset.Config{Storage: store})
		store.gate = make(chan struct{})
		var wg sync.WaitGroup
		var first error
		wg.Go(func() { _, first = d.Prepare(t.Context()) })
		synctest.Wait()

		begin := time.Now()
		const want = "The request failed due to an internal error, please try again."
		for name, err := range map[string]error{
			"prepare":  second(d.Prepare(t.Context())),
			"activate": d.Activate(t.Context(), "x"),
			"taint":    d.Taint(t.Context(), d.Active().ID),
			"remove":   d.Remove(t.Context(), "x"),
		} {
			if !errors.Is(err, refusal.ErrBusy) || err.Error() != want {
				t.Errorf("%s: %v", name, err)
			}
		}
		if _, err := d.SignX509(workload, newKey(t).Public(), 0); err != nil {
			t.Errorf("signing during a mutation: %v", err)
		}
		if took := time.Since(begin); took != 0 {
			t.Errorf("the second mutation waited %v", took)
		}
		close(store.gate)
		wg.Wait()
		if first != nil {
			t.Errorf("the first mutation: %v", first)
		}
		if _, err := d.Prepare(t.Context()); err != nil {
			t.Errorf("a mutation after it: %v", err)
		}
	})
}

func second[T any](_ T, err error) error { return err }

func TestMutationIsBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &slow{gate: make(chan struct{})}
		close(store.gate)
		d := open(t, keyset.Config{Storage: store})
		store.gate = make(chan struct{})
		begin := time.Now()
		_, err := d.Prepare(t.Context())
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(begin) != 120*time.Second {
			t.Errorf("after %v: %v", time.Since(begin), err)
		}
		d = open(t, keyset.Config{Storage: &hanging{}})
		begin = time.Now()
		if err := d.Taint(t.Context(), "x"); !errors.Is(err, context.DeadlineExceeded) || time.Since(begin) != 120*time.Second {
			t.Errorf("a load that hangs, after %v: %v", time.Since(begin), err)
		}
	})
}

// TestStuckRead: a disk hangs in a read, as with a page of a mapped file, or a Check
// does not end. Both ignore the context. The mutation returns in time, is in flight
// until the disk answers, and changes nothing: its caller has got an error.
func TestStuckRead(t *testing.T) {
	t.Parallel()
	for _, inCheck := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			store := &stuckRead{}
			d := open(t, keyset.Config{Storage: store})
			k, err := d.Prepare(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			gate := make(chan struct{})
			var checks []keyset.Check
			if inCheck {
				checks = append(checks, func([]keyset.Keyset) error { <-gate; return nil })
			} else {
				store.hold(gate)
			}
			for operation, mutate := range map[string]func() error{
				"prepare":  func() error { _, err := d.Prepare(t.Context(), checks...); return err },
				"activate": func() error { return d.Activate(t.Context(), k.ID, checks...) },
				"taint":    func() error { return d.Taint(t.Context(), k.ID, checks...) },
			} {
				begin := time.Now()
				if err := mutate(); !errors.Is(err, context.DeadlineExceeded) || time.Since(begin) != 120*time.Second {
					t.Errorf("%s, in check %v: after %v: %v", operation, inCheck, time.Since(begin), err)
				}
				if err := mutate(); !errors.Is(err, refusal.ErrBusy) {
					t.Errorf("%s, in check %v, another one meanwhile: %v", operation, inCheck, err)
				}
				gate <- struct{}{}
				d.Wait()
			}
			store.hold(nil)
			all, err := d.List(t.Context())
			if err != nil || len(all) != 2 || all[1].State != keyset.Prepared {
				t.Errorf("in check %v: a mutation that had failed was committed: %+v, %v", inCheck, all, err)
			}
			if err := d.Activate(t.Context(), k.ID); err != nil {
				t.Errorf("in check %v: another one after it: %v", inCheck, err)
			}
		})
	}
}

// stuckRead is a storage whose reads wait for the gate, if there is one.
type stuckRead struct {
	memory.Keysets
	mu   sync.Mutex
	gate chan struct{}
}

func (s *stuckRead) hold(gate chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gate = gate
}

func (s *stuckRead) Load(ctx context.Context) (keyset.Document, error) {
	s.mu.Lock()
	gate := s.gate
	s.mu.Unlock()
	if gate != nil {
		<-gate
	}
	return s.Keysets.Load(ctx)
}

// TestStuckCommit: a disk hangs in a commit and ignores the context. The mutation
// returns in time and remains in flight; its result is published when the disk answers.
func TestStuckCommit(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &stuck{gate: make(chan struct{})}
		close(store.gate)
		d := open(t, keyset.Config{Storage: store})
		store.gate = make(chan struct{})
		begin := time.Now()
		_, err := d.Prepare(t.Context())
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(begin) != 120*time.Second {
			t.Errorf("after %v: %v", time.Since(begin), err)
		}
		if _, err := d.Prepare(t.Context()); !errors.Is(err, refusal.ErrBusy) {
			t.Errorf("another one meanwhile: %v", err)
		}
		status := d.Status()
		if len(status.Keysets) != 1 {
			t.Fatalf("before the commit is done: %v", status.Keysets)
		}
		close(store.gate)
		<-status.Changed
		if got := d.Status().Keysets; len(got) != 2 {
			t.Errorf("after the commit: %v", got)
		}
		d.Wait()
		if _, err := d.Prepare(t.Context()); err != nil {
			t.Errorf("another one after it: %v", err)
		}
	})
}

// stuck is a storage whose Save waits for the gate alone.
type stuck struct {
	memory.Keysets
	gate chan struct{}
}

func (s *stuck) Save(ctx context.Context, d keyset.Document, c keyset.Change) error {
	<-s.gate
	return s.Keysets.Save(ctx, d, c)
}

// hanging is a storage that hangs once something is stored.
type hanging struct {
	memory.Keysets
	stored bool
}

func (h *hanging) Load(ctx context.Context) (keyset.Document, error) {
	if h.stored {
		<-ctx.Done()
		return keyset.Document{}, ctx.Err()
	}
	return h.Keysets.Load(ctx)
}

func (h *hanging) Save(ctx context.Context, d keyset.Document, c keyset.Change) error {
	h.stored = true
	return h.Keysets.Save(ctx, d, c)
}

// TestChangedOnce loads the result of a mutation before the mutation has ended: it is
// published then, and the end of the mutation is not another change.
func TestChangedOnce(t *testing.T) {
	t.Parallel()
	store := &failing{Storage: new(memory.Keysets)}
	d := open(t, keyset.Config{Storage: store})
	var read keyset.Status
	store.Storage = afterSave{store.Storage, func() {
		if got := list(t, d); len(got) != 2 {
			t.Errorf("read %v", got)
		}
		read = d.Status()
	}}
	check(t, second(d.Prepare(t.Context())))
	select {
	case <-read.Changed:
		t.Error("the snapshot was replaced by the same")
	default:
	}
	if d.Bundle() != read.Bundle {
		t.Error("another bundle")
	}
}

// afterSave is a storage that runs a function after a save.
type afterSave struct {
	keyset.Storage
	do func()
}

func (s afterSave) Save(ctx context.Context, d keyset.Document, c keyset.Change) error {
	err := s.Storage.Save(ctx, d, c)
	s.do()
	return err
}

// TestLostRace uses two deployments on one storage, as two servers would.
func TestLostRace(t *testing.T) {
	t.Parallel()
	store := new(memory.Keysets)
	d := open(t, keyset.Config{Storage: store})
	other := open(t, keyset.Config{Storage: store})
	if d.Active() != other.Active() {
		t.Fatal("both should have the same active keyset")
	}
	racing := &beforeSave{Storage: store, do: func() {
		if _, err := other.Prepare(t.Context()); err != nil {
			t.Error(err)
		}
	}}
	loser := open(t, keyset.Config{Storage: racing})
	if _, err := loser.Prepare(t.Context()); !errors.Is(err, refusal.ErrBusy) {
		t.Errorf("the loser got %v", err)
	}
	if len(d.Bundle().X509) != 1 {
		t.Error("a deployment knows of the change before it loads it")
	}
	if got := list(t, d); len(got) != 2 || len(d.Bundle().X509) != 2 {
		t.Errorf("after List: %v, %d published", got, len(d.Bundle().X509))
	}
	// The stored document decides: a step on a keyset that the other prepared is legal.
	for id, k := range list(t, other) {
		if k.State == keyset.Prepared {
			if err := loser.Activate(t.Context(), id); err != nil || loser.Active().ID != id {
				t.Errorf("activate: %v", err)
			}
		}
	}
}

// TestOpenRace opens two deployments over an empty storage at the same moment.
func TestOpenRace(t *testing.T) {
	t.Parallel()
	store := new(memory.Keysets)
	var winner *keyset.Deployment
	d := open(t, keyset.Config{Storage: &beforeSave{Storage: store, do: func() { winner = open(t, keyset.Config{Storage: store}) }}})
	if d.Active() != winner.Active() {
		t.Errorf("active is %v and %v", d.Active(), winner.Active())
	}
}

func TestStorageErrors(t *testing.T) {
	t.Parallel()
	disk := errors.New("disk is full")
	store := &failing{Storage: new(memory.Keysets)}
	d := open(t, keyset.Config{Storage: store})
	before, sequence := list(t, d), d.Bundle().Sequence
	store.save = disk
	if _, err := d.Prepare(t.Context()); !errors.Is(err, disk) || err.Error() != "prepare keyset: save: disk is full" {
		t.Errorf("prepare: %v", err)
	}
	if !maps.Equal(before, list(t, d)) || d.Bundle().Sequence != sequence {
		t.Error("a failed mutation changed something")
	}
	store.load = disk
	if _, err := d.List(t.Context()); !errors.Is(err, disk) {
		t.Errorf("list: %v", err)
	}
	if err := d.Taint(t.Context(), "x"); !errors.Is(err, disk) {
		t.Errorf("taint: %v", err)
	}
	// Signing needs no storage.
	if _, err := d.SignJWT(workload, []string{"a"}, 0); err != nil {
		t.Errorf("sign: %v", err)
	}
}

// TestReopen: a restart keeps the keys.
func TestReopen(t *testing.T) {
	t.Parallel()
	store := new(memory.Keysets)
	d := open(t, keyset.Config{Storage: store})
	next, err := d.Prepare(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Activate(t.Context(), next.ID); err != nil {
		t.Fatal(err)
	}
	again := open(t, keyset.Config{Storage: store})
	if !maps.Equal(list(t, d), list(t, again)) || again.Active().ID != next.ID {
		t.Errorf("%v, want %v", list(t, again), list(t, d))
	}
	if string(d.BundlePEM()) != string(again.BundlePEM()) || d.Bundle().Sequence != again.Bundle().Sequence {
		t.Error("the published bundle differs")
	}
}

// TestParsesNewVersionsOnly loads the version that is current: its keys are not parsed
// again.
func TestParsesNewVersionsOnly(t *testing.T) {
	t.Parallel()
	store := &failing{Storage: new(memory.Keysets)}
	d := open(t, keyset.Config{Storage: store})
	doc, err := store.Load(t.Context())
	check(t, err)
	doc.Records[0].CA = nil
	store.Storage = fixed{doc}
	if _, err := d.List(t.Context()); err != nil {
		t.Errorf("the current version was parsed again: %v", err)
	}
	doc.Version++
	store.Storage = fixed{doc}
	if _, err := d.List(t.Context()); err == nil {
		t.Error("a new version was not parsed")
	}
	if err := d.Taint(t.Context(), "x"); err == nil || err.Error() == "key set not found" {
		t.Errorf("taint: %v", err)
	}
}

// TestConcurrentUse calls all methods concurrently, for the race detector.
func TestConcurrentUse(t *testing.T) {
	t.Parallel()
	d := open(t, keyset.Config{})
	key := newKey(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 20 {
				svid, err := d.SignX509(workload, key.Public(), 0)
				if err != nil || svid.Authority == "" {
					t.Errorf("sign: %v", err)
				}
				if _, err := d.SignJWT(workload, []string{"a"}, 0); err != nil {
					t.Errorf("sign: %v", err)
				}
				if _, err := d.List(t.Context()); err != nil {
					t.Errorf("list: %v", err)
				}
			}
		})
		wg.Go(func() {
			for range 10 {
				old := d.Active()
				k, err := d.Prepare(t.Context())
				if err != nil {
					continue // busy
				}
				_ = d.Activate(t.Context(), k.ID)
				_ = d.Taint(t.Context(), old.ID)
				_ = d.Remove(t.Context(), old.ID)
			}
		})
	}
	wg.Wait()
}

// fixed is a storage that always returns the same document.
type fixed struct{ doc keyset.Document }

func (f fixed) Load(context.Context) (keyset.Document, error)              { return f.doc, nil }
func (f fixed) Save(context.Context, keyset.Document, keyset.Change) error { return keyset.ErrConflict }

// failing is a storage whose calls can be made to fail.
type failing struct {
	keyset.Storage
	load, save error
}

func (f failing) Load(ctx context.Context) (keyset.Document, error) {
	if f.load != nil {
		return keyset.Document{}, f.load
	}
	return f.Storage.Load(ctx)
}

func (f failing) Save(ctx context.Context, d keyset.Document, c keyset.Change) error {
	if f.save != nil {
		return f.save
	}
	return f.Storage.Save(ctx, d, c)
}

// slow is a storage whose saves wait for a gate.
type slow struct {
	memory.Keysets
	gate chan struct{}
}

func (s *slow) Save(ctx context.Context, d keyset.Document, c keyset.Change) error {
	select {
	case <-s.gate:
		return s.Keysets.Save(ctx, d, c)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// beforeSave is a storage that runs a function once, before a save.
type beforeSave struct {
	keyset.Storage
	do func()
}

func (b *beforeSave) Save(ctx context.Context, d keyset.Document, c keyset.Change) error {
	if do := b.do; do != nil {
		b.do = nil
		do()
	}
	return b.Storage.Save(ctx, d, c)
}
