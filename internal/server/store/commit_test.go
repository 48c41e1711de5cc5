package store_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/internal/server/store"
)

// hold blocks a commit until release is called. Changes that are written meanwhile share
// the next one.
func hold(t *testing.T, d *store.Deployment) (release func()) {
	t.Helper()
	inside, gate := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := d.UpdateAgent(t.Context(), agentID(-1), func(*spireapi.Agent) (*spireapi.Agent, error) {
			close(inside)
			<-gate
			return &spireapi.Agent{ID: agentID(-1)}, nil
		}); err != nil {
			t.Error(err)
		}
	})
	<-inside
	return sync.OnceFunc(func() { close(gate); wg.Wait() })
}

// together runs writers that share one commit and returns their errors. It must be called
// in a synctest bubble.
func together(t *testing.T, d *store.Deployment, writers ...func() error) []error {
	t.Helper()
	release := hold(t, d)
	defer release()
	errs := make([]error, len(writers))
	var wg sync.WaitGroup
	for i, write := range writers {
		wg.Go(func() { errs[i] = write() })
		synctest.Wait() // so that they wait in this order
	}
	release()
	wg.Wait()
	return errs
}

func TestWritersShareACommit(t *testing.T) {
	t.Parallel()
	synctest.Test(t, writersShareACommit)
}

func writersShareACommit(t *testing.T) {
	s := opened(t, newPath(t))
	d, other := s.Deployment("default"), s.Deployment("other")
	rejected := errors.New("rejected")
	before := s.Commits(t)
	var writers []func() error
	for n := range 20 {
		writers = append(writers, func() error { return update(t.Context(), d, n, "1") })
	}
	writers = append(writers,
		func() error {
			return d.SaveLedger(t.Context(), ledger.Change{Put: []ledger.Row{{Authority: "a"}}})
		},
		func() error {
			return d.Admit(t.Context(), spireapi.Admission{ID: agentID(21), Change: func(*spireapi.Agent) (*spireapi.Agent, error) {
				return &spireapi.Agent{ID: agentID(21)}, nil
			}, Row: func() ledger.Row { return ledger.Row{Authority: "a"} }})
		},
		func() error { return other.PutToken(t.Context(), spireapi.Token{Value: "a"}) },
		func() error { _, err := other.TakeToken(t.Context(), "a"); return err },
		// The following fail alone, except for the first Save.
		func() error { _, err := other.TakeToken(t.Context(), "a"); return err },
		func() error { _, err := d.TakeToken(t.Context(), "a"); return err },
		func() error {
			_, err := d.UpdateAgent(t.Context(), agentID(3), func(*spireapi.Agent) (*spireapi.Agent, error) { return nil, rejected })
			return err
		},
		func() error { return d.Save(t.Context(), document(1), keyset.Change{}) },
		func() error { return d.Save(t.Context(), document(1), keyset.Change{}) },
	)
	errs := together(t, d, writers...)
	for n, err := range errs {
		want := error(nil)
		switch len(errs) - n {
		case 5, 4:
			want = spireapi.ErrNotFound
		case 3:
			want = rejected
		case 1:
			want = keyset.ErrConflict
		}
		if !errors.Is(err, want) || want == nil && err != nil {
			t.Errorf("writer %d: %v, want %v", n, err, want)
		}
	}
	if n := s.Commits(t) - before; n != 2 { // the held one and one for all
		t.Errorf("%d commits", n)
	}
	all, err := d.Agents(t.Context())
	if err != nil || len(all) != 22 {
		t.Errorf("%d agents, %v", len(all), err)
	}
}

// TestNothingToWrite: a change without operations causes no commit.
func TestNothingToWrite(t *testing.T) {
	t.Parallel()
	s := opened(t, newPath(t))
	d := s.Deployment("default")
	if err := update(t.Context(), d, 1, "1"); err != nil {
		t.Fatal(err)
	}
	before := s.Commits(t)
	for _, err := range []error{
		update(t.Context(), d, 1, "1"),
		d.PutEntries(t.Context(), nil, nil),
		d.SaveLedger(t.Context(), ledger.Change{}),
	} {
		if err != nil {
			t.Error(err)
		}
	}
	if _, err := d.TakeToken(t.Context(), "x"); !errors.Is(err, spireapi.ErrNotFound) {
		t.Error(err)
	}
	if n := s.Commits(t); n != before {
		t.Errorf("%d commits without a change", n-before)
	}
}

// TestCommitIsBounded: many waiting changes are committed in several commits, none of
// which splits a change.
func TestCommitIsBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, commitIsBounded)
}

func commitIsBounded(t *testing.T) {
	s := opened(t, newPath(t))
	d := s.Deployment("default")
	before := s.Commits(t)
	var writers []func() error
	for w := range 10 {
		var rows []ledger.Row
		for n := range 1500 {
			rows = append(rows, ledger.Row{Authority: "a", Agent: fmt.Sprint(w), Entry: entryID(n), NotAfter: start})
		}
		writers = append(writers, func() error { return d.SaveLedger(t.Context(), ledger.Change{Put: rows}) })
	}
	for _, err := range together(t, d, writers...) {
		if err != nil {
			t.Error(err)
		}
	}
	if n := s.Commits(t) - before; n != 1+4 { // three at a time
		t.Errorf("%d commits", n)
	}
}

func TestContext(t *testing.T) {
	t.Parallel()
	synctest.Test(t, contexts)
}

func contexts(t *testing.T) {
	s := opened(t, newPath(t))
	d := s.Deployment("default")
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := update(ended, d, 1, "1"); !errors.Is(err, context.Canceled) {
		t.Errorf("ended before: %v", err)
	}
	if _, err := d.Agents(ended); !errors.Is(err, context.Canceled) {
		t.Errorf("reading: %v", err)
	}

	// A change that still waits returns at once and is not applied.
	release := hold(t, d)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := update(ctx, d, 1, "1"); !errors.Is(err, context.Canceled) {
			t.Errorf("ended while it waited: %v", err)
		}
	})
	synctest.Wait()
	cancel()
	wg.Wait() // while the other is still held
	release()

	// A change that a commit has taken returns its outcome.
	ctx, cancel = context.WithCancel(t.Context())
	if _, err := d.UpdateAgent(ctx, agentID(2), func(*spireapi.Agent) (*spireapi.Agent, error) {
		cancel()
		return &spireapi.Agent{ID: agentID(2)}, nil
	}); err != nil {
		t.Errorf("ended during its commit: %v", err)
	}
	for n, want := range map[int]bool{1: false, 2: true} {
		if a, err := d.Agent(t.Context(), agentID(n)); err != nil || (a != nil) != want {
			t.Errorf("agent %d: %v, %v", n, a, err)
		}
	}
}

// TestChangePanics: a panic in a change reaches its caller and no other.
func TestChangePanics(t *testing.T) {
	t.Parallel()
	s := opened(t, newPath(t))
	d := s.Deployment("default")
	func() {
		defer func() {
			if p := recover(); p != "mine" {
				t.Errorf("recovered %v", p)
			}
		}()
		_, _ = d.UpdateAgent(t.Context(), agentID(1), func(*spireapi.Agent) (*spireapi.Agent, error) { panic("mine") })
	}()
	if err := update(t.Context(), d, 1, "1"); err != nil {
		t.Error(err)
	}
}

// TestConcurrentUse reads during writes, for the race detector. Each reader sees what its
// writer wrote before.
func TestConcurrentUse(t *testing.T) {
	t.Parallel()
	s := open(t, newPath(t))
	var wg sync.WaitGroup
	var failed atomic.Int64
	for w := range 8 {
		d := s.Deployment([]string{"a", "b"}[w%2])
		wg.Go(func() {
			for n := range 25 {
				version := fmt.Sprint(w, n)
				if err := update(t.Context(), d, w, version); err != nil {
					failed.Add(1)
					continue
				}
				if a, err := d.Agent(t.Context(), agentID(w)); err != nil || a.Version != version {
					t.Errorf("%+v, %v, want %s", a, err, version)
				}
				if _, err := contents(s); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	closed(t, s)
	if failed.Load() != 0 {
		t.Errorf("%d failed", failed.Load())
	}
	if names, err := opened(t, s.Path()).Deployments(t.Context()); err != nil || !slices.Equal(names, []string{"a", "b"}) {
		t.Errorf("%v, %v", names, err)
	}
}

// TestCloseWhileWriting: writes fail with ErrClosed or are durable.
func TestCloseWhileWriting(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	s := open(t, path)
	d := s.Deployment("default")
	var wg sync.WaitGroup
	var written [8]string
	for w := range written {
		wg.Go(func() {
			for n := 0; ; n++ {
				version := fmt.Sprint(n)
				err := update(t.Context(), d, w, version)
				if err != nil {
					if !errors.Is(err, store.ErrClosed) {
						t.Error(err)
					}
					return
				}
				written[w] = version
			}
		})
	}
	for {
		all, err := d.Agents(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(all) == len(written) {
			break
		}
	}
	closed(t, s)
	wg.Wait()
	d = opened(t, path).Deployment("default")
	for w, version := range written {
		if a, err := d.Agent(t.Context(), agentID(w)); err != nil || a.Version != version {
			t.Errorf("agent %d: %+v, %v, want %s", w, a, err, version)
		}
	}
}
