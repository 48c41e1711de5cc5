package store_test

import (
	"errors"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/test/memory"
)

// TestKeysetStorage checks that each implementation satisfies keyset.Storage.
func TestKeysetStorage(t *testing.T) {
	t.Parallel()
	for name, make := range map[string]func(*testing.T) keyset.Storage{
		"memory": func(*testing.T) keyset.Storage { return new(memory.Keysets) },
		"store":  func(t *testing.T) keyset.Storage { return fresh(t) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, ctx := make(t), t.Context()
			if doc, err := s.Load(ctx); err != nil || !reflect.DeepEqual(doc, keyset.Document{}) {
				t.Errorf("at first: %+v, %v", doc, err)
			}
			first := document(1)
			for _, version := range []uint64{0, 2, 7} {
				doc := first
				doc.Version = version
				if err := s.Save(ctx, doc, keyset.Change{}); !errors.Is(err, keyset.ErrConflict) {
					t.Errorf("version %d as the first: %v", version, err)
				}
			}
			given := first
			given.Records = slices.Clone(first.Records)
			if err := s.Save(ctx, given, keyset.Change{}); err != nil {
				t.Fatal(err)
			}
			given.Records[0].ID = "changed afterwards"
			got, err := s.Load(ctx)
			if err != nil || !reflect.DeepEqual(got, first) {
				t.Errorf("%+v, %v, want %+v", got, err, first)
			}
			got.Records[0].ID = "changed by a reader"
			if again, _ := s.Load(ctx); !reflect.DeepEqual(again, first) {
				t.Error("a reader changed what is stored")
			}
			for _, version := range []uint64{0, 1, 3} {
				doc := document(9)
				doc.Version = version
				if err := s.Save(ctx, doc, keyset.Change{}); !errors.Is(err, keyset.ErrConflict) {
					t.Errorf("version %d over 1: %v", version, err)
				}
			}
			if again, _ := s.Load(ctx); !reflect.DeepEqual(again, first) {
				t.Error("a conflict changed something")
			}

			// Of several concurrent writers of one version one wins.
			const writers, rounds = 8, 10
			var won atomic.Int64
			var wg sync.WaitGroup
			for w := range writers {
				wg.Go(func() {
					for n := range uint64(rounds) {
						doc := document(byte(w))
						doc.Version = n + 2
						for {
							err := s.Save(ctx, doc, keyset.Change{})
							if err == nil {
								won.Add(1)
								break
							}
							if !errors.Is(err, keyset.ErrConflict) {
								t.Error(err)
							}
							if now, _ := s.Load(ctx); now.Version >= doc.Version {
								break
							}
						}
					}
				})
			}
			wg.Wait()
			if doc, err := s.Load(ctx); won.Load() != rounds || doc.Version != rounds+1 {
				t.Errorf("%d won, version is %d, %v", won.Load(), doc.Version, err)
			}
		})
	}
}

func document(n byte) keyset.Document {
	at := start.Add(time.Duration(n))
	return keyset.Document{Version: 1, Sequence: uint64(n), RotatedAt: at, Records: []keyset.Record{
		{ID: "ks_a", State: keyset.Active, IssuedAt: at, ExpiresAt: at.Add(time.Hour), CA: []byte{n, 1}, CAKey: []byte{n, 2}, JWTKeyID: "kid", JWTKey: []byte{n, 3}},
		{ID: "ks_b", State: keyset.Tainted, IssuedAt: at, ExpiresAt: at, SteppedDownAt: at, SteppedDownBy: "somebody", TaintedAt: at, CA: []byte{n, 4}, CAKey: []byte{n, 5}, JWTKeyID: "kid2", JWTKey: []byte{n, 6}},
	}}
}

// TestServerStorage checks that each implementation satisfies spireapi.Storage.
func TestServerStorage(t *testing.T) {
	t.Parallel()
	for name, make := range map[string]func(*testing.T) spireapi.Storage{
		"memory": func(*testing.T) spireapi.Storage { return memory.NewServer() },
		"store":  func(t *testing.T) spireapi.Storage { return fresh(t) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			t.Run("tokens", func(t *testing.T) { t.Parallel(); tokens(t, make(t)) })
			t.Run("agents", func(t *testing.T) { t.Parallel(); agents(t, make(t)) })
			t.Run("admissions", func(t *testing.T) { t.Parallel(); admissions(t, make(t)) })
			t.Run("entries", func(t *testing.T) { t.Parallel(); entries(t, make(t)) })
		})
	}
}

func tokens(t *testing.T, s spireapi.Storage) {
	ctx := t.Context()
	if _, err := s.TakeToken(ctx, "a"); !errors.Is(err, spireapi.ErrNotFound) {
		t.Errorf("none there: %v", err)
	}
	want := filled[spireapi.Token](t)
	want.Value = "a"
	if err := s.PutToken(ctx, want); err != nil {
		t.Fatal(err)
	}
	if all, err := s.Tokens(ctx); err != nil || !reflect.DeepEqual(all, []spireapi.Token{want}) {
		t.Errorf("all tokens: %+v, %v", all, err)
	}
	if _, err := s.TakeToken(ctx, "b"); !errors.Is(err, spireapi.ErrNotFound) {
		t.Errorf("another: %v", err)
	}
	for range 2 {
		if token, err := s.Token(ctx, "a"); err != nil || !reflect.DeepEqual(token, want) {
			t.Errorf("Token: %+v, %v", token, err)
		}
	}
	if _, err := s.Token(ctx, "b"); !errors.Is(err, spireapi.ErrNotFound) {
		t.Errorf("another: %v", err)
	}
	var got atomic.Int64
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			token, err := s.TakeToken(ctx, "a")
			switch {
			case err == nil && reflect.DeepEqual(token, want):
				got.Add(1)
			case !errors.Is(err, spireapi.ErrNotFound):
				t.Errorf("%+v, %v", token, err)
			}
		})
	}
	wg.Wait()
	if got.Load() != 1 {
		t.Errorf("%d callers got the token", got.Load())
	}
	if all, err := s.Tokens(ctx); err != nil || len(all) != 0 {
		t.Errorf("after it was taken: %+v, %v", all, err)
	}
}

func admissions(t *testing.T, s spireapi.Storage) {
	ctx := t.Context()
	rows := 0
	admit := func(token string, n int, change func(*spireapi.Agent) (*spireapi.Agent, error)) error {
		return s.Admit(ctx, spireapi.Admission{Token: token, SpentAt: start.Add(time.Minute), ID: agentID(n), Change: change, Row: func() ledger.Row {
			rows++
			return ledger.Row{Authority: "A", Agent: agentID(n).String(), NotAfter: start}
		}})
	}
	as := func(a spireapi.Agent) func(*spireapi.Agent) (*spireapi.Agent, error) {
		return func(*spireapi.Agent) (*spireapi.Agent, error) { return &a, nil }
	}
	check := func(what string, tokens int, agents ...spireapi.Agent) {
		t.Helper()
		left, err := s.Tokens(ctx)
		left = slices.DeleteFunc(left, func(t spireapi.Token) bool { return !t.SpentAt.IsZero() })
		if err != nil || len(left) != tokens {
			t.Errorf("%s: tokens %v, %v, want %d", what, left, err, tokens)
		}
		all, err := s.Agents(ctx)
		if err != nil || !reflect.DeepEqual(all, agents) {
			t.Errorf("%s: agents %+v, %v, want %+v", what, all, err, agents)
		}
		stored := make(map[string]bool)
		if l, ok := s.(ledger.Storage); ok {
			if _, err := l.LoadLedger(ctx, func(r ledger.Row) { stored[r.Agent] = r.NotAfter.Equal(start) }); err != nil {
				t.Error(err)
			}
			if len(stored) != len(agents) {
				t.Errorf("%s: rows of %v, want %d", what, stored, len(agents))
			}
		}
		if rows != len(agents) {
			t.Errorf("%s: %d rows were asked for, want %d", what, rows, len(agents))
		}
	}
	first := filled[spireapi.Agent](t)
	first.ID = agentID(1)
	if err := admit("a", 1, as(first)); !errors.Is(err, spireapi.ErrNotFound) {
		t.Errorf("without a token: %v", err)
	}
	check("no token", 0)
	for _, value := range []string{"a", "b"} {
		if err := s.PutToken(ctx, spireapi.Token{Value: value, ExpiresAt: start}); err != nil {
			t.Fatal(err)
		}
	}
	rejected := errors.New("rejected")
	if err := admit("a", 1, func(a *spireapi.Agent) (*spireapi.Agent, error) { return a, rejected }); err != rejected { //nolint:errorlint // it must be returned unwrapped
		t.Errorf("rejected: %v", err)
	}
	check("rejected", 2)

	// Of several admissions with one token one succeeds.
	var admitted atomic.Int64
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			switch err := admit("a", 1, as(first)); {
			case err == nil:
				admitted.Add(1)
			case !errors.Is(err, spireapi.ErrNotFound):
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if admitted.Load() != 1 {
		t.Errorf("%d were admitted with one token", admitted.Load())
	}
	check("admitted", 1, first)
	if t1, err := s.Token(ctx, "a"); err != nil || !t1.SpentAt.Equal(start.Add(time.Minute)) || !t1.ExpiresAt.Equal(start) {
		t.Errorf("the spent token is %+v, %v", t1, err)
	}

	renewed := first
	renewed.NextSerial = "another"
	err := admit("", 1, func(a *spireapi.Agent) (*spireapi.Agent, error) {
		if !reflect.DeepEqual(*a, first) {
			t.Errorf("change gets %+v", a)
		}
		return &renewed, nil
	})
	rows-- // replaces the agent's row
	if err != nil {
		t.Errorf("without a token: %v", err)
	}
	check("renewed", 1, renewed)
}

func agents(t *testing.T, s spireapi.Storage) {
	ctx := t.Context()
	list := func() []spireapi.Agent {
		all, err := s.Agents(ctx)
		if err != nil {
			t.Error(err)
		}
		return all
	}
	want := filled[spireapi.Agent](t)
	want.ID = agentID(1)
	if a, err := s.Agent(ctx, want.ID); a != nil || err != nil || len(list()) != 0 {
		t.Errorf("at first: %v, %v", a, err)
	}
	rejected := errors.New("rejected")
	for _, there := range []bool{false, true} {
		if a, err := s.UpdateAgent(ctx, want.ID, func(a *spireapi.Agent) (*spireapi.Agent, error) {
			if (a != nil) != there {
				t.Errorf("change gets %v", a)
			}
			if a != nil {
				a.Version = "changed and rejected"
			}
			return a, rejected
		}); a != nil || err != rejected { //nolint:errorlint // it must be returned unwrapped
			t.Errorf("rejected: %v, %v", a, err)
		}
		if there {
			continue
		}
		given := want
		a, err := s.UpdateAgent(ctx, want.ID, func(*spireapi.Agent) (*spireapi.Agent, error) { return &given, nil })
		if err != nil || !reflect.DeepEqual(*a, want) {
			t.Errorf("stored: %+v, %v", a, err)
		}
		a.Version, given.Version = "changed by a caller", "changed afterwards"
	}
	for range 2 {
		a, err := s.Agent(ctx, want.ID)
		if err != nil || !reflect.DeepEqual(*a, want) {
			t.Fatalf("%+v, %v, want %+v", a, err, want)
		}
		a.Version = "changed by a reader"
	}
	if all := list(); !reflect.DeepEqual(all, []spireapi.Agent{want}) {
		t.Errorf("all agents: %+v", all)
	}

	// Concurrent updates are serialized.
	const writers, rounds = 8, 20
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for range rounds {
				if _, err := s.UpdateAgent(ctx, agentID(2), func(a *spireapi.Agent) (*spireapi.Agent, error) {
					if a == nil {
						a = &spireapi.Agent{ID: agentID(2)}
					}
					a.Version += "."
					return a, nil
				}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if a, err := s.Agent(ctx, agentID(2)); err != nil || len(a.Version) != writers*rounds {
		t.Errorf("%d changes, %v", len(a.Version), err)
	}
	if all := list(); len(all) != 2 {
		t.Errorf("%d agents", len(all))
	}
	for range 2 {
		if a, err := s.UpdateAgent(ctx, want.ID, func(*spireapi.Agent) (*spireapi.Agent, error) { return nil, nil }); a != nil || err != nil {
			t.Errorf("deleted: %v, %v", a, err)
		}
	}
	if a, err := s.Agent(ctx, want.ID); a != nil || err != nil {
		t.Errorf("after it was deleted: %v, %v", a, err)
	}
}

func entries(t *testing.T, s spireapi.Storage) {
	ctx := t.Context()
	check := func(want ...spireapi.StoredEntry) {
		t.Helper()
		got, err := s.Entries(ctx)
		slices.SortFunc(got, func(a, b spireapi.StoredEntry) int { return strings.Compare(a.ID, b.ID) })
		if err != nil || len(got)+len(want) > 0 && !reflect.DeepEqual(got, want) {
			t.Errorf("%+v, %v, want %+v", got, err, want)
		}
	}
	check()
	a := filled[spireapi.StoredEntry](t)
	a.ID, a.SPIFFEID, a.ParentID = "a\x00/ä", agentID(1), agentID(2)
	a.FederatesWith = []spiffeid.TrustDomain{td}
	b := spireapi.StoredEntry{Entry: spireapi.Entry{ID: "b", SPIFFEID: agentID(3)}}
	if err := s.PutEntries(ctx, []spireapi.StoredEntry{b, a}, nil); err != nil {
		t.Fatal(err)
	}
	check(a, b)
	b.Revision++
	if err := s.PutEntries(ctx, []spireapi.StoredEntry{b}, []string{a.ID, "not there"}); err != nil {
		t.Fatal(err)
	}
	check(b)
	if err := s.PutEntries(ctx, nil, nil); err != nil {
		t.Fatal(err)
	}
	check(b)
}

// filled returns a value with each field set, to detect a field that is not stored.
func filled[T any](t *testing.T) (v T) {
	t.Helper()
	var set func(f reflect.Value)
	set = func(f reflect.Value) {
		switch value := f.Interface().(type) {
		case time.Time:
			f.Set(reflect.ValueOf(start))
			return
		case spiffeid.ID, spiffeid.TrustDomain:
			return // the caller's
		case []spiffeid.TrustDomain:
			_ = value
			return
		}
		switch f.Kind() {
		case reflect.String:
			f.SetString("text")
		case reflect.Bool:
			f.SetBool(true)
		case reflect.Int, reflect.Int64:
			f.SetInt(7)
		case reflect.Uint, reflect.Uint32, reflect.Uint64:
			f.SetUint(7)
		case reflect.Slice:
			f.Set(reflect.MakeSlice(f.Type(), 2, 2))
			set(f.Index(0))
			set(f.Index(1))
		case reflect.Struct:
			for i := range f.NumField() {
				set(f.Field(i))
			}
		default:
			t.Fatalf("a field of type %v", f.Type())
		}
	}
	set(reflect.ValueOf(&v).Elem())
	return v
}
