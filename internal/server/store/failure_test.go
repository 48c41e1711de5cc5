package store_test

import (
	"errors"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/internal/server/store"
)

// TestFullDisk makes writes and syncs fail in different ways. A failed change is not
// stored, reads succeed, and writes succeed again when the disk works.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	for device, want := range map[string]error{"/dev/full": syscall.ENOSPC, "/dev/null": syscall.EINVAL} {
		t.Run(device, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				path := newPath(t)
				s := open(t, path)
				d := s.Deployment("default")
				fill(t, d)
				for range 2 { // leaves free pages
					if err := update(t.Context(), d, 999, strings.Repeat("x", 1<<16)); err != nil {
						t.Fatal(err)
					}
					if err := update(t.Context(), d, 999, ""); err != nil {
						t.Fatal(err)
					}
				}
				before := mustContents(t, s)
				back := s.PutDevice(t, device)
				for range 3 {
					// A small change reuses free pages, a large one makes the file grow.
					for _, size := range []int{10, 2 << 20} {
						if err := update(t.Context(), d, 1000, strings.Repeat("x", size)); err == nil || size == 10 && !errors.Is(err, want) || !strings.Contains(err.Error(), "write store "+path) || !strings.Contains(err.Error(), "nothing was changed") {
							t.Errorf("%d bytes: %.200v", size, err)
						}
					}
					if got := mustContents(t, s); got != before {
						t.Errorf("%s\nwant %s", got, before)
					}
				}
				errs := together(t, d, // waiting when the disk recovers
					func() error { return update(t.Context(), d, 1001, "1") },
					func() error { back(); return update(t.Context(), d, 1002, "2") },
				)
				for _, err := range errs {
					if err != nil {
						t.Error(err)
					}
				}
				for n := range 50 {
					if err := update(t.Context(), d, 2000+n, strings.Repeat("y", 3000)); err != nil {
						t.Fatal(err)
					}
				}
				after := mustContents(t, s)
				closed(t, s)
				if got := mustContents(t, opened(t, path)); got != after {
					t.Error("after a restart it differs")
				}
			})
		})
	}
}

// TestFailedCommitFailsAll: a failed commit also fails changes with the error of the
// commit that would have been rejected, because they were rejected for changes that did
// not happen.
func TestFailedCommitFailsAll(t *testing.T) {
	t.Parallel()
	synctest.Test(t, failedCommitFailsAll)
}

func failedCommitFailsAll(t *testing.T) {
	s := opened(t, newPath(t))
	d := s.Deployment("default")
	if err := d.PutToken(t.Context(), spireapi.Token{Value: "a"}); err != nil {
		t.Fatal(err)
	}
	take := func() error { _, err := d.TakeToken(t.Context(), "a"); return err }
	var back func()
	errs := together(t, d, take, take, func() error {
		_, err := d.UpdateAgent(t.Context(), agentID(1), func(*spireapi.Agent) (*spireapi.Agent, error) {
			back = s.PutDevice(t, "/dev/full")
			return &spireapi.Agent{ID: agentID(1)}, nil
		})
		return err
	})
	back()
	for n, err := range errs {
		if !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("writer %d: %v", n, err)
		}
	}
	if err := take(); err != nil {
		t.Errorf("the token was lost: %v", err)
	}
}

// TestAdmissionThatCannotBeStored: a failed admission keeps the token and stores neither
// agent nor row.
func TestAdmissionThatCannotBeStored(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	s := open(t, path)
	d := s.Deployment("default")
	if err := d.PutToken(t.Context(), spireapi.Token{Value: "a"}); err != nil {
		t.Fatal(err)
	}
	var back func()
	admission := spireapi.Admission{
		Token: "a", SpentAt: start, ID: agentID(1),
		Change: func(*spireapi.Agent) (*spireapi.Agent, error) { return &spireapi.Agent{ID: agentID(1)}, nil },
		Row: func() ledger.Row {
			if back == nil {
				back = s.PutDevice(t, "/dev/full")
			}
			return ledger.Row{Authority: "A", Agent: agentID(1).String(), NotAfter: start}
		},
	}
	if err := d.Admit(t.Context(), admission); err == nil || !strings.Contains(err.Error(), "nothing was changed") {
		t.Fatalf("on a full disk: %v", err)
	}
	back()
	for _, when := range []string{"at once", "after a restart"} {
		agents, err := d.Agents(t.Context())
		if err != nil || len(agents) > 0 {
			t.Errorf("%s: agents %v, %v", when, agents, err)
		}
		if _, err := d.LoadLedger(t.Context(), func(r ledger.Row) { t.Errorf("%s: row %v", when, r) }); err != nil {
			t.Error(err)
		}
		if _, err := d.Token(t.Context(), "a"); err != nil {
			t.Errorf("%s: the token: %v", when, err)
		}
		closed(t, s)
		s = open(t, path)
		d = s.Deployment("default")
	}
	if err := d.Admit(t.Context(), admission); err != nil {
		t.Errorf("with the same token: %v", err)
	}
	closed(t, s)
}

// TestHeaderNotSynced: the failure after which a commit is visible and may not be durable.
func TestHeaderNotSynced(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	s := open(t, path)
	d := s.Deployment("default")
	fill(t, d)

	// The second attempt succeeds.
	s.FailSync(func() {})
	if err := update(t.Context(), d, 1, "2"); err != nil {
		t.Error(err)
	}
	// The second attempt fails, too: no write succeeds before the header is synced.
	var back func()
	s.FailSync(func() { back = s.PutDevice(t, "/dev/full") })
	if err := update(t.Context(), d, 1, "3"); !errors.Is(err, syscall.ENODEV) && !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "a crash may undo the change") {
		t.Errorf("first: %v", err)
	}
	commits := s.Commits(t)
	if err := update(t.Context(), d, 2, "4"); err == nil {
		t.Error("written on top of a commit that may not be durable")
	}
	if s.Commits(t) != commits || s.HeaderSynced() {
		t.Error("another commit before the header was synced")
	}
	back()
	if err := update(t.Context(), d, 3, "5"); err != nil || !s.HeaderSynced() {
		t.Error(err)
	}
	closed(t, s)
	d = opened(t, path).Deployment("default")
	for n, version := range map[int]string{1: "3", 2: "1.0", 3: "5"} {
		if a, err := d.Agent(t.Context(), agentID(n)); err != nil || a.Version != version {
			t.Errorf("agent %d: %v, %v", n, a, err)
		}
	}
}

// TestDamageWhileOpen: after damage writes fail, and reads succeed.
func TestDamageWhileOpen(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	s := open(t, path)
	fill(t, s.Deployment("default"))
	want := mustContents(t, s)
	s.Panic()
	for range 2 {
		if err := update(t.Context(), s.Deployment("default"), 1, "2"); !errors.Is(err, store.ErrDamaged) || !strings.Contains(err.Error(), "backup") {
			t.Errorf("write: %v", err)
		}
	}
	if got := mustContents(t, s); got != want {
		t.Error("the contents have changed")
	}
	closed(t, s)
	if got := mustContents(t, opened(t, path)); got != want {
		t.Error("the contents have changed after Close")
	}
}
