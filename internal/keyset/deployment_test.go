package keyset_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"github.com/renewd/renewd/internal/keyset"
)

func ctx(t any) context.Context {
	if t, ok := t.(interface{ Context() context.Context }); ok {
		return t.Context()
	}
	return context.Background()
}

func TestOpenMakesTheFirstKeyset(t *testing.T) {
	t.Parallel()
	c := &clock{start}
	d := open(t, keyset.Config{Now: c.Now})
	all, err := d.List(t.Context())
	if err != nil || len(all) != 1 {
		t.Fatalf("List: %v, %v", all, err)
	}
	k := all[0]
	if k != d.Active() || k.State != keyset.Active {
		t.Errorf("the first keyset is %v, active is %v", k, d.Active())
	}
	if !regexp.MustCompile(`^ks_[a-z0-9]{10}$`).MatchString(k.ID) {
		t.Errorf("ID %q", k.ID)
	}
	if want := start.Truncate(time.Second); !k.IssuedAt.Equal(want) || !k.ExpiresAt.Equal(want.Add(90*24*time.Hour)) {
		t.Errorf("issued %v, expires %v", k.IssuedAt, k.ExpiresAt)
	}
	if d.Name() != "default" || d.TrustDomain() != td {
		t.Errorf("deployment %q of %v", d.Name(), d.TrustDomain())
	}
	text, err := json.Marshal(k)
	if err != nil {
		t.Fatal(err)
	}
	var back keyset.Keyset
	if err := json.Unmarshal(text, &back); err != nil || back != k {
		t.Errorf("read back from %s: %v, %v", text, back, err)
	}
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	store := new(keyset.Memory)
	open(t, keyset.Config{Storage: store})
	good, _ := store.Load(t.Context())
	broken := func(change func(*keyset.Document)) keyset.Storage {
		doc := good
		doc.Records = slices.Clone(good.Records)
		change(&doc)
		return fixed{doc}
	}
	for name, c := range map[string]keyset.Config{
		"no trust domain": {},
		"short lifetime":  {TrustDomain: td, Lifetime: time.Minute},
		"storage fails":   {TrustDomain: td, Storage: failing{load: errors.New("disk")}},
		"nothing stored":  {TrustDomain: td, Storage: broken(func(d *keyset.Document) { d.Records = nil })},
		"none active":     {TrustDomain: td, Storage: broken(func(d *keyset.Document) { d.Records[0].State = keyset.Prepared })},
		"unknown state":   {TrustDomain: td, Storage: broken(func(d *keyset.Document) { d.Records[0].State = 7 })},
		"stored twice":    {TrustDomain: td, Storage: broken(func(d *keyset.Document) { d.Records = append(d.Records, d.Records[0]) })},
		"broken CA":       {TrustDomain: td, Storage: broken(func(d *keyset.Document) { d.Records[0].CA = []byte("x") })},
		"broken CA key":   {TrustDomain: td, Storage: broken(func(d *keyset.Document) { d.Records[0].CAKey = []byte("x") })},
		"foreign CA key":  {TrustDomain: td, Storage: broken(func(d *keyset.Document) { d.Records[0].CAKey = d.Records[0].JWTKey })},
		"broken JWT key":  {TrustDomain: td, Storage: broken(func(d *keyset.Document) { d.Records[0].JWTKey = nil })},
		"two active": {TrustDomain: td, Storage: broken(func(d *keyset.Document) {
			other := d.Records[0]
			other.ID = "ks_other"
			d.Records = append(d.Records, other)
		})},
	} {
		if _, err := keyset.Open(t.Context(), c); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// TestEveryStepFromEveryState tries each operation on a keyset in each state.
func TestEveryStepFromEveryState(t *testing.T) {
	t.Parallel()
	const gone = keyset.State(0)
	type operation func(*keyset.Deployment, context.Context, string) error
	operations := map[string]operation{
		"activate": (*keyset.Deployment).Activate,
		"taint":    (*keyset.Deployment).Taint,
		"remove":   (*keyset.Deployment).Remove,
	}
	type outcome struct {
		err  string // empty when the step is legal
		then keyset.State
	}
	want := map[string]map[keyset.State]outcome{
		"activate": {
			keyset.Prepared: {then: keyset.Active},
			keyset.Active:   {"cannot activate active key set", keyset.Active},
			keyset.Tainted:  {"cannot activate tainted key set", keyset.Tainted},
			gone:            {"key set not found", gone},
		},
		"taint": {
			keyset.Prepared: {then: keyset.Tainted},
			keyset.Active:   {"cannot taint active key set", keyset.Active},
			keyset.Tainted:  {"cannot taint tainted key set", keyset.Tainted},
			gone:            {"key set not found", gone},
		},
		"remove": {
			keyset.Prepared: {"cannot remove prepared key set", keyset.Prepared},
			keyset.Active:   {"cannot remove active key set", keyset.Active},
			keyset.Tainted:  {then: gone},
			gone:            {"key set not found", gone},
		},
	}
	for name, states := range want {
		for from, want := range states {
			t.Run(fmt.Sprintf("%s %v", name, from), func(t *testing.T) {
				t.Parallel()
				d := open(t, keyset.Config{})
				first := d.Active().ID
				id := "ks_unknown000"
				must := func(err error) {
					t.Helper()
					if err != nil {
						t.Fatal(err)
					}
				}
				if from != gone {
					k, err := d.Prepare(t.Context())
					must(err)
					if k.State != keyset.Prepared {
						t.Fatalf("prepared keyset is %v", k)
					}
					id = k.ID
				}
				switch from {
				case keyset.Active:
					must(d.Activate(t.Context(), id))
				case keyset.Tainted:
					must(d.Taint(t.Context(), id))
				}
				before, sequence := list(t, d), d.Bundle().Sequence

				err := operations[name](d, t.Context(), id)

				after := list(t, d)
				if got := after[id].State; got != want.then {
					t.Errorf("state is %v, want %v", got, want.then)
				}
				if want.err != "" {
					if err == nil || err.Error() != want.err {
						t.Errorf("error %v, want %q", err, want.err)
					}
					if !maps.Equal(before, after) || d.Bundle().Sequence != sequence {
						t.Errorf("a refused step changed %v to %v", before, after)
					}
					return
				}
				must(err)
				if name == "activate" && after[first].State != keyset.Prepared {
					t.Errorf("the old active keyset is %v, want PREPARED", after[first].State)
				}
				// Activation changes who signs, not what is published.
				if changed := d.Bundle().Sequence > sequence; changed != (name != "activate") {
					t.Errorf("sequence went from %d to %d", sequence, d.Bundle().Sequence)
				}
			})
		}
	}
}

func TestActivateExpired(t *testing.T) {
	t.Parallel()
	c := &clock{start}
	d := open(t, keyset.Config{Now: c.Now})
	k, err := d.Prepare(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c.now = k.ExpiresAt
	if err := d.Activate(t.Context(), k.ID); err == nil || err.Error() != "cannot activate expired key set" {
		t.Errorf("activate: %v", err)
	}
}

// TestBundleFollows walks through a rotation and compares what is published.
func TestBundleFollows(t *testing.T) {
	t.Parallel()
	d := open(t, keyset.Config{})
	published := func(want ...bool) {
		t.Helper()
		b := d.Bundle()
		var x509, jwt []bool
		for _, a := range b.X509 {
			x509 = append(x509, a.Tainted)
		}
		for _, a := range b.JWT {
			jwt = append(jwt, a.Tainted)
		}
		if !slices.Equal(x509, want) || !slices.Equal(jwt, want) {
			t.Fatalf("taint marks are %v and %v, want %v", x509, jwt, want)
		}
	}
	step := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	old := d.Active()
	published(false)
	next, err := d.Prepare(t.Context())
	step(err)
	published(false, false)
	step(d.Activate(t.Context(), next.ID))
	published(false, false)
	step(d.Taint(t.Context(), old.ID))
	published(true, false)
	step(d.Remove(t.Context(), old.ID))
	published(false)
	b := d.Bundle()
	if b.X509[0].ID != next.X509AuthorityID || b.JWT[0].KeyID != next.JWTKeyID || !b.JWT[0].ExpiresAt.Equal(next.ExpiresAt) {
		t.Errorf("published %v, want the keys of %v", b, next)
	}
	if old.X509AuthorityID == next.X509AuthorityID || old.JWTKeyID == next.JWTKeyID {
		t.Error("two keysets share a key")
	}
}

// TestSecondMutationFailsAtOnce holds one mutation in its commit.
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
			if !errors.Is(err, keyset.ErrBusy) || err.Error() != want {
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
	})
}

// TestLostRace has two deployments over one storage, as two servers would be.
func TestLostRace(t *testing.T) {
	t.Parallel()
	store := new(keyset.Memory)
	d := open(t, keyset.Config{Storage: store})
	other := open(t, keyset.Config{Storage: store})
	if d.Active() != other.Active() {
		t.Fatal("both should have the same active keyset")
	}
	racing := &before{Storage: store, do: func() {
		if _, err := other.Prepare(t.Context()); err != nil {
			t.Error(err)
		}
	}}
	loser := open(t, keyset.Config{Storage: racing})
	if _, err := loser.Prepare(t.Context()); !errors.Is(err, keyset.ErrBusy) {
		t.Errorf("the loser got %v", err)
	}
	if len(d.Bundle().X509) != 1 {
		t.Error("a deployment knows of the change before it looked")
	}
	if got := list(t, d); len(got) != 2 || len(d.Bundle().X509) != 2 {
		t.Errorf("after List: %v, %d published", got, len(d.Bundle().X509))
	}
	// What is stored decides: a step on what another one prepared is legal.
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
	store := new(keyset.Memory)
	var winner *keyset.Deployment
	d := open(t, keyset.Config{Storage: &before{Storage: store, do: func() { winner = open(t, keyset.Config{Storage: store}) }}})
	if d.Active() != winner.Active() {
		t.Errorf("active is %v and %v", d.Active(), winner.Active())
	}
}

func TestStorageErrors(t *testing.T) {
	t.Parallel()
	disk := errors.New("disk is full")
	store := &failing{Storage: new(keyset.Memory)}
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

// TestReopen keeps the keys over a restart.
func TestReopen(t *testing.T) {
	t.Parallel()
	store := new(keyset.Memory)
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

// TestHistories tries random histories of operations on known and unknown
// keysets, and checks after each step what must always hold.
func TestHistories(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		d := open(t, keyset.Config{})
		model := map[string]keyset.State{d.Active().ID: keyset.Active}
		known := []string{d.Active().ID, "ks_unknown000"}
		sequence := d.Bundle().Sequence
		pick := func() string { return rapid.SampledFrom(known).Draw(t, "id") }
		background := context.Background()
		t.Repeat(map[string]func(*rapid.T){
			"prepare": func(t *rapid.T) {
				k, err := d.Prepare(background)
				if err != nil {
					t.Fatal(err)
				}
				model[k.ID] = keyset.Prepared
				known = append(known, k.ID)
			},
			"activate": func(t *rapid.T) {
				id := pick()
				legal := model[id] == keyset.Prepared
				if err := d.Activate(background, id); (err == nil) != legal {
					t.Fatalf("activate %v: %v", model[id], err)
				}
				if legal {
					for other, state := range model {
						if state == keyset.Active {
							model[other] = keyset.Prepared
						}
					}
					model[id] = keyset.Active
				}
			},
			"taint": func(t *rapid.T) {
				id := pick()
				legal := model[id] == keyset.Prepared
				if err := d.Taint(background, id); (err == nil) != legal {
					t.Fatalf("taint %v: %v", model[id], err)
				}
				if legal {
					model[id] = keyset.Tainted
				}
			},
			"remove": func(t *rapid.T) {
				id := pick()
				legal := model[id] == keyset.Tainted
				if err := d.Remove(background, id); (err == nil) != legal {
					t.Fatalf("remove %v: %v", model[id], err)
				}
				if legal {
					delete(model, id)
				}
			},
			"": func(t *rapid.T) {
				got := make(map[string]keyset.State)
				var active []keyset.Keyset
				for id, k := range list(t, d) {
					got[id] = k.State
					if k.State == keyset.Active {
						active = append(active, k)
					}
				}
				if !maps.Equal(got, model) {
					t.Fatalf("states are %v, want %v", got, model)
				}
				if len(active) != 1 || active[0] != d.Active() {
					t.Fatalf("%d keysets are active: %v", len(active), active)
				}
				b := d.Bundle()
				if len(b.X509) != len(model) || len(b.JWT) != len(model) || b.Sequence < sequence {
					t.Fatalf("%d keysets, but %d and %d authorities at sequence %d", len(model), len(b.X509), len(b.JWT), b.Sequence)
				}
				sequence = b.Sequence
			},
		})
	})
}

// TestConcurrentUse lets everything happen at once; the race detector judges.
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

func TestStateText(t *testing.T) {
	t.Parallel()
	if got := fmt.Sprint(keyset.Prepared, keyset.Active, keyset.Tainted, keyset.State(9)); got != "PREPARED ACTIVE TAINTED State(9)" {
		t.Error(got)
	}
	var s keyset.State
	if err := s.UnmarshalText([]byte("Active")); err == nil {
		t.Error("read a state that is none")
	}
	if _, err := keyset.State(0).MarshalText(); err == nil {
		t.Error("wrote a state that is none")
	}
}

func TestOpenChecksTheTrustDomain(t *testing.T) {
	t.Parallel()
	store := new(keyset.Memory)
	open(t, keyset.Config{Storage: store})
	foreign := spiffeid.RequireTrustDomainFromString("other.org")
	if _, err := keyset.Open(t.Context(), keyset.Config{TrustDomain: foreign, Storage: store}); err == nil {
		t.Error("opened the keysets of another trust domain")
	}
}

// fixed is a storage that always holds the same.
type fixed struct{ doc keyset.Document }

func (f fixed) Load(context.Context) (keyset.Document, error) { return f.doc, nil }
func (f fixed) Save(context.Context, keyset.Document) error   { return keyset.ErrConflict }

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

func (f failing) Save(ctx context.Context, d keyset.Document) error {
	if f.save != nil {
		return f.save
	}
	return f.Storage.Save(ctx, d)
}

// slow is a storage that saves when its gate is open.
type slow struct {
	keyset.Memory
	gate chan struct{}
}

func (s *slow) Save(ctx context.Context, d keyset.Document) error {
	select {
	case <-s.gate:
		return s.Memory.Save(ctx, d)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// before does something once, right before a save.
type before struct {
	keyset.Storage
	do func()
}

func (b *before) Save(ctx context.Context, d keyset.Document) error {
	if do := b.do; do != nil {
		b.do = nil
		do()
	}
	return b.Storage.Save(ctx, d)
}
