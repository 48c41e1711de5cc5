package runbook_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/operator/runbook"
	"github.com/renewd/renewd/test/runbooktest"
)

// kind holds all that Next may read of a keyset.
type kind struct {
	state       runbook.State
	steppedDown bool
	expired     bool
}

var now = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func statusOf(kinds []kind) runbook.Status {
	s := runbook.Status{Deployment: "default"}
	for i, k := range kinds {
		expires := now.Add(time.Hour)
		if k.expired {
			expires = now
		}
		s.Keysets = append(s.Keysets, runbook.Keyset{
			ID: fmt.Sprintf("ks_%d", i+1), State: k.state, SteppedDown: k.steppedDown,
			ExpiresAt: expires, X509AuthorityID: "a", JWTKeyID: "b",
		})
	}
	return s
}

// forEachState calls f with every state of up to three keysets.
func forEachState(f func([]kind)) {
	var kinds []kind
	for _, state := range []runbook.State{runbook.Prepared, runbook.Active, runbook.Tainted} {
		for _, bits := range []int{0, 1, 2, 3} {
			kinds = append(kinds, kind{state, bits&1 != 0, bits&2 != 0})
		}
	}
	var extend func([]kind)
	extend = func(s []kind) {
		f(s)
		if len(s) == 3 {
			return
		}
		for _, k := range kinds {
			extend(append(slices.Clone(s), k))
		}
	}
	extend(nil)
}

// The table of Next, for every state of up to three keysets and every choice.
func TestNextTable(t *testing.T) {
	t.Parallel()
	states := 0
	forEachState(func(kinds []kind) {
		states++
		var active []int
		for i, k := range kinds {
			if k.state == runbook.Active {
				active = append(active, i)
			}
		}
		// The columns of the table.
		columns := map[runbook.Action][]string{}
		for i, k := range kinds {
			id := fmt.Sprintf("ks_%d", i+1)
			switch k.state {
			case runbook.Tainted:
				columns[runbook.ActRemove] = append(columns[runbook.ActRemove], id)
			case runbook.Prepared:
				if len(active) == 1 && i > active[0] && !k.steppedDown && !k.expired {
					columns[runbook.ActActivate] = append(columns[runbook.ActActivate], id)
				} else {
					columns[runbook.ActTaint] = append(columns[runbook.ActTaint], id)
				}
			}
		}
		for _, chosen := range []string{"", "ks_1", "ks_2", "ks_3"} {
			got, err := runbook.Next(statusOf(kinds), chosen, now)
			if len(active) != 1 {
				if err == nil {
					t.Errorf("%v: %d active, and the next step is %v", kinds, len(active), got)
				}
				continue
			}
			want := runbook.Step{}
			var named []string
			for _, a := range []runbook.Action{runbook.ActRemove, runbook.ActTaint, runbook.ActActivate} {
				ids := columns[a]
				if len(ids) == 0 {
					continue
				}
				switch {
				case len(ids) == 1:
					want = runbook.Step{Action: a, Keyset: ids[0]}
				case slices.Contains(ids, chosen):
					want = runbook.Step{Action: a, Keyset: chosen}
				default:
					named = ids
				}
				break
			}
			switch {
			case named != nil:
				if err == nil || !strings.Contains(err.Error(), "--keyset") {
					t.Errorf("%v chosen %q: next is %v, %v; want an error that names %v", kinds, chosen, got, err, named)
					continue
				}
				for _, id := range named {
					if !strings.Contains(err.Error(), id) {
						t.Errorf("%v: %q does not name %s", kinds, err, id)
					}
				}
			case err != nil || got != want:
				t.Errorf("%v chosen %q: next is %v, %v; want %v", kinds, chosen, got, err, want)
			}
		}
	})
	if states != 1+12+12*12+12*12*12 {
		t.Errorf("%d states were tried", states)
	}
}

// Next completes a step that only one key has, and fails for a keyset with one key.
func TestNextInconsistentKeys(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		older, olderJWT, newer, newerJWT runbook.State
		want                             runbook.Action
	}{
		{runbook.Prepared, runbook.Tainted, runbook.Active, "", runbook.ActTaint},
		{runbook.Tainted, runbook.Prepared, runbook.Active, "", runbook.ActTaint},
		{runbook.Prepared, runbook.Active, runbook.Active, runbook.Prepared, runbook.ActActivate},
		{runbook.Active, runbook.Prepared, runbook.Prepared, runbook.Active, runbook.ActActivate},
		{runbook.Tainted, runbook.Active, runbook.Active, runbook.Prepared, runbook.ActActivate},
	} {
		s := statusOf([]kind{{state: tt.older}, {state: tt.newer}})
		s.Keysets[0].JWTState, s.Keysets[0].SteppedDown, s.Keysets[1].JWTState = tt.olderJWT, true, tt.newerJWT
		if step, err := runbook.Next(s, "", now); err != nil || step.Action != tt.want {
			t.Errorf("%+v: %v, %v", tt, step, err)
		}
	}
	s := statusOf([]kind{{state: runbook.Prepared}, {state: runbook.Active}})
	s.Keysets[0].JWTState = runbook.Prepared // as State
	if step, err := runbook.Next(s, "", now); err != nil || step.Action != runbook.ActTaint {
		t.Errorf("keys in the same state: %v, %v", step, err)
	}
	s.Keysets[0].JWTKeyID = ""
	if step, err := runbook.Next(s, "", now); err == nil || !strings.Contains(err.Error(), "ks_1 lacks one") {
		t.Errorf("a key is missing: %v, %v", step, err)
	}
	s.Keysets[0].State, s.Keysets[0].JWTState = runbook.Tainted, "" // half of it is removed
	if step, err := runbook.Next(s, "", now); err != nil || step.Action != runbook.ActRemove {
		t.Errorf("a key of a tainted one is missing: %v, %v", step, err)
	}
	s = statusOf([]kind{{state: runbook.Active}, {state: runbook.Prepared}})
	s.Keysets[1].Lacking = []string{"b"}
	if step, err := runbook.Next(s, "", now); err != nil || step.Action != runbook.ActPrepare {
		t.Errorf("a server lacks its key: %v, %v", step, err)
	}
}

// reach applies a history to real keysets: "p" prepares, "a2" activates the second
// keyset, "t1" taints the first.
func reach(t *testing.T, history []string) (s *runbooktest.Server, ids []string, legal bool) {
	t.Helper()
	s = runbooktest.NewServer(t)
	ids = []string{s.Deployment.Active().ID}
	for _, op := range history {
		var err error
		switch op[0] {
		case 'p':
			k, perr := s.Deployment.Prepare(t.Context())
			ids, err = append(ids, k.ID), perr
		case 'a':
			err = s.Deployment.Activate(t.Context(), ids[op[1]-'1'])
		case 't':
			err = s.Deployment.Taint(t.Context(), ids[op[1]-'1'])
		}
		if err != nil {
			return nil, nil, false
		}
	}
	return s, ids, true
}

// stateString returns the state of a server without keyset IDs.
func stateString(t *testing.T, s *runbooktest.Server) string {
	t.Helper()
	status, err := s.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, k := range status.Keysets {
		fmt.Fprintf(&b, "%s/%v ", k.State, k.SteppedDown)
	}
	return b.String()
}

// histories returns a history for every state that operations on up to three keysets
// lead to.
func histories(t *testing.T) map[string][]string {
	t.Helper()
	found := map[string][]string{}
	queue := [][]string{nil}
	for len(queue) > 0 {
		history := queue[0]
		queue = queue[1:]
		s, ids, legal := reach(t, history)
		if !legal || len(ids) > 3 {
			continue
		}
		p := stateString(t, s)
		if _, known := found[p]; known {
			continue
		}
		found[p] = history
		for _, op := range []string{"p", "a1", "a2", "a3", "t1", "t2", "t3"} {
			if op == "p" || int(op[1]-'0') <= len(ids) {
				queue = append(queue, append(slices.Clone(history), op))
			}
		}
	}
	return found
}

// From every reachable state a rotation ends with one keyset, if --keyset chooses when
// an error asks for it. The server refuses no step.
func TestRotateFromEveryState(t *testing.T) {
	t.Parallel()
	all := histories(t)
	if len(all) < 15 {
		t.Fatalf("only %d states were reached: %v", len(all), all)
	}
	for from, history := range all {
		t.Run(from, func(t *testing.T) {
			t.Parallel()
			s, ids, _ := reach(t, history)
			active := s.Deployment.Active().ID
			alone := len(ids) == 1
			chosen := ""
			for range 6 {
				r, err := runbook.Rotate(t.Context(), s, runbook.RotateOptions{Keyset: chosen})
				if err == nil {
					status, _ := s.Status(t.Context())
					if !r.Complete || len(status.Keysets) != 1 || status.Keysets[0].ID != r.Active || status.Keysets[0].State != runbook.Active {
						t.Fatalf("reported as complete: %+v\n%+v", r, status)
					}
					if alone && r.Active == active {
						t.Errorf("a new rotation left the old keyset")
					}
					return
				}
				_, names, asks := strings.Cut(err.Error(), "the next step is to ")
				if !asks {
					t.Fatalf("%v after %v", err, s.Calls())
				}
				// Any named keyset must do; take the last.
				for _, id := range ids {
					if strings.Contains(names, id) {
						chosen = id
					}
				}
			}
			t.Errorf("the rotation does not end: %v", s.Calls())
		})
	}
}

// A lost connection before or after any step stops the rotation. The next run ends with
// one keyset, and not the first one.
func TestRotateResumes(t *testing.T) {
	t.Parallel()
	lost := fmt.Errorf("connection lost: %w", runbook.ErrOutcomeUnknown)
	for _, carriedOut := range []bool{false, true} {
		for i, call := range []string{"prepare", "activate", "taint", "remove"} {
			t.Run(fmt.Sprintf("%s carried out %v", call, carriedOut), func(t *testing.T) {
				t.Parallel()
				s := runbooktest.NewServer(t)
				first := s.Deployment.Active().ID
				fail := func(c, _ string) error {
					if c == call {
						return lost
					}
					return nil
				}
				if carriedOut {
					s.After = fail
				} else {
					s.Before = fail
				}
				r, err := runbook.Rotate(t.Context(), s, runbook.RotateOptions{})
				if !errors.Is(err, runbook.ErrOutcomeUnknown) || r.Complete {
					t.Fatalf("an unknown outcome was ignored: %+v, %v", r, err)
				}
				if got := s.Calls(); len(got) != i+1 || !strings.HasPrefix(got[i], call) {
					t.Errorf("the rotation continued or retried: %v", got)
				}
				s.Before, s.After = nil, nil
				r, err = runbook.Rotate(t.Context(), s, runbook.RotateOptions{})
				if err != nil || !r.Complete || r.Active == first {
					t.Fatalf("second run: %+v, %v", r, err)
				}
				want := map[bool]int{false: 4 - i, true: 3 - i}[carriedOut]
				if want == 0 {
					want = 4 // the first was complete: a new rotation
				}
				if len(r.Steps) != want {
					t.Errorf("second run: steps %v, want %d", r.Steps, want)
				}
			})
		}
	}
}

// The rotation stops at a refused step and does not retry it.
func TestRotateStopsAtRefusal(t *testing.T) {
	t.Parallel()
	s := runbooktest.NewServer(t)
	s.Before = func(call, _ string) error {
		if call == "activate" {
			return errors.New("The request failed due to an internal error, please try again.")
		}
		return nil
	}
	_, err := runbook.Rotate(t.Context(), s, runbook.RotateOptions{})
	if err == nil || !strings.Contains(runbook.Remedy(err), "automatic rotation") || len(s.Calls()) != 2 {
		t.Errorf("%v after %v", err, s.Calls())
	}
}

// Without a yes the rotation takes no step.
func TestRotateAsks(t *testing.T) {
	t.Parallel()
	for stop, want := range []string{"Prepare", "Activate", "Taint", "Remove"} {
		t.Run(want, func(t *testing.T) {
			t.Parallel()
			s := runbooktest.NewServer(t)
			asked := 0
			_, err := runbook.Rotate(t.Context(), s, runbook.RotateOptions{Ask: func(q string) (bool, error) {
				asked++
				if asked <= stop {
					return true, nil
				}
				if !strings.Contains(q, want) {
					t.Errorf("question %d is %q", asked, q)
				}
				return false, nil
			}})
			if err == nil || len(s.Calls()) != stop || asked != stop+1 {
				t.Errorf("%v, %d questions, then %v", err, asked, s.Calls())
			}
		})
	}
}

// An ID that no step can be about is an error.
func TestRotateKeysetFlag(t *testing.T) {
	t.Parallel()
	s := runbooktest.NewServer(t)
	for _, id := range []string{"ks_nosuch", s.Deployment.Active().ID} {
		if _, err := runbook.Rotate(context.Background(), s, runbook.RotateOptions{Keyset: id}); err == nil || !strings.Contains(err.Error(), id) {
			t.Errorf("--keyset %s: %v", id, err)
		}
	}
	if len(s.Calls()) != 0 {
		t.Errorf("calls %v, want none", s.Calls())
	}
}

// A rotation continues with the keyset that it prepared and the one that this replaced,
// and needs no --keyset for them.
func TestRotateContinuesWithItsKeysets(t *testing.T) {
	t.Parallel()
	s, ids, _ := reach(t, []string{"p", "p"})
	r, err := runbook.Rotate(t.Context(), s, runbook.RotateOptions{Keyset: ids[2]})
	want := fmt.Sprintf("[activate %[3]s taint %[1]s remove %[1]s taint %[2]s remove %[2]s]", ids[0], ids[1], ids[2])
	if err != nil || !r.Complete || fmt.Sprint(s.Calls()) != want {
		t.Errorf("%v, %v\nwant %s", err, s.Calls(), want)
	}

	s = runbooktest.NewServer(t)
	var other string
	s.After = func(call, _ string) error {
		if call != "prepare" {
			return nil
		}
		k, err := s.Deployment.Prepare(t.Context()) // by somebody else
		other = k.ID
		return err
	}
	r, err = runbook.Rotate(t.Context(), s, runbook.RotateOptions{})
	if !strings.HasPrefix(fmt.Sprint(s.Calls()), "[prepare activate "+r.Steps[0].Keyset+" taint") {
		t.Errorf("%v, %v", err, s.Calls())
	}
	// The other keyset is newer, so the rotation goes on to it.
	if err != nil || !r.Complete || r.Active != other {
		t.Errorf("%+v, %v", r, err)
	}
}
