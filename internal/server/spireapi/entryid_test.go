package spireapi_test

import (
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/server/spireapi"
)

// unnamed returns an entry without an ID.
func unnamed(path, parent string, selectors ...string) spireapi.Entry {
	e := spireapi.Entry{SPIFFEID: spiffeid.RequireFromPath(td, path)}
	if parent != "" {
		e.ParentID = spiffeid.RequireFromPath(td, parent)
	}
	for _, s := range selectors {
		e.Selectors = append(e.Selectors, spireapi.Selector{Type: "unix", Value: s})
	}
	return e
}

// TestEntryID: the ID is stable, and what the documents say.
func TestEntryID(t *testing.T) {
	t.Parallel()
	const id = "spiffe://example.org/web"
	got := spireapi.EntryID("", id, []string{"unix:user:web", "unix:uid:1000", "unix:uid:1000"})
	if want := "entry-b0b3e713beafc187"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	out, err := exec.Command("sh", "-c", `(printf '%s\n' "" `+id+`; printf '%s\n' unix:user:web unix:uid:1000 unix:uid:1000 | LC_ALL=C sort -u) | sha256sum | cut -c1-16`).Output()
	if err != nil || "entry-"+strings.TrimSpace(string(out)) != got {
		t.Errorf("by the documented command it is %q (%v)", out, err)
	}
	if !regexp.MustCompile(`^[-._0-9A-Za-z]+$`).MatchString(got) { // sqlstore of SPIRE 1.13.3
		t.Errorf("%s has characters that no ID of a SPIRE server has", got)
	}
	for _, other := range []string{
		spireapi.EntryID(id, id, []string{"unix:user:web", "unix:uid:1000"}),
		spireapi.EntryID("", id+"2", []string{"unix:user:web", "unix:uid:1000"}),
		spireapi.EntryID("", id, []string{"unix:user:web"}),
	} {
		if other == got {
			t.Errorf("two entries have the ID %s", got)
		}
	}
}

// TestEntriesWithoutIDs: an entry that is written without an ID keeps its own over an edit.
func TestEntriesWithoutIDs(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		before, after []spireapi.Entry
		want          []string // the changes: by the index in before and in after, - for none
		unchanged     int
	}{
		"new":             {nil, []spireapi.Entry{unnamed("/a", "", "uid:1")}, []string{"- 0"}, 0},
		"the same":        {[]spireapi.Entry{unnamed("/a", "", "uid:1", "uid:2")}, []spireapi.Entry{unnamed("/a", "", "uid:2", "uid:1")}, nil, 1},
		"selector":        {[]spireapi.Entry{unnamed("/a", "", "uid:1")}, []spireapi.Entry{unnamed("/a", "", "uid:2")}, []string{"0 0"}, 0},
		"parent":          {[]spireapi.Entry{unnamed("/a", "", "uid:1")}, []spireapi.Entry{unnamed("/a", "/node", "uid:1")}, []string{"0 0"}, 0},
		"SPIFFE ID":       {[]spireapi.Entry{unnamed("/a", "", "uid:1")}, []spireapi.Entry{unnamed("/b", "", "uid:1")}, []string{"0 0"}, 0},
		"two of three":    {[]spireapi.Entry{unnamed("/a", "", "uid:1")}, []spireapi.Entry{unnamed("/b", "", "uid:2")}, []string{"0 -", "- 0"}, 0},
		"ID was stripped": {[]spireapi.Entry{entry("a")}, []spireapi.Entry{unnamed("/workload/a", "", "uid:1000")}, nil, 1},
		"ID was given":    {[]spireapi.Entry{unnamed("/workload/a", "", "uid:1000")}, []spireapi.Entry{entry("a")}, []string{"- 0", "0 -"}, 0},
		"exact before edited": {
			[]spireapi.Entry{unnamed("/a", "", "uid:1"), unnamed("/a", "", "uid:2")},
			[]spireapi.Entry{unnamed("/a", "", "uid:3"), unnamed("/a", "", "uid:1")},
			[]string{"1 0"}, 1,
		},
		"most in common": {
			[]spireapi.Entry{unnamed("/a", "", "uid:1", "gid:1"), unnamed("/a", "", "uid:2", "gid:2"), unnamed("/a", "", "uid:3", "gid:3")},
			[]spireapi.Entry{unnamed("/a", "", "uid:2", "gid:4")},
			[]string{"0 -", "1 0", "2 -"}, 0,
		},
		"selectors before the SPIFFE ID": {
			[]spireapi.Entry{unnamed("/b", "", "uid:2"), unnamed("/a", "", "uid:1")},
			[]spireapi.Entry{unnamed("/a", "", "uid:2")},
			[]string{"0 -", "1 0"}, 0,
		},
		"an ID keeps its entry": {
			[]spireapi.Entry{entry("a")},
			[]spireapi.Entry{unnamed("/workload/a", "", "uid:7"), entry("a")},
			[]string{"- 0"}, 1,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
				s.apply(t, tt.before)
				// index returns the place of an entry in a list, by all but its ID.
				index := func(list []spireapi.Entry, e *spireapi.Entry) string {
					if e == nil {
						return "-"
					}
					return fmt.Sprint(slices.IndexFunc(list, func(o spireapi.Entry) bool {
						slices.SortFunc(o.Selectors, func(a, b spireapi.Selector) int { return strings.Compare(a.Value, b.Value) })
						return o.SPIFFEID == e.SPIFFEID && o.ParentID == e.ParentID && slices.Equal(o.Selectors, e.Selectors)
					}))
				}
				dry, err := s.ApplyEntries(t.Context(), tt.after, true)
				check(t, err)
				diff := s.apply(t, tt.after)
				var got []string
				for i, c := range diff.Changes {
					got = append(got, index(tt.before, c.Before)+" "+index(tt.after, c.After))
					if c.Before != nil && c.After != nil && c.Before.ID != c.After.ID {
						t.Errorf("%s became %s", c.Before.ID, c.After.ID)
					}
					if d := dry.Changes[i]; index(tt.after, d.After) != index(tt.after, c.After) || index(tt.before, d.Before) != index(tt.before, c.Before) {
						t.Errorf("the dry run had %v, not %v", d, c)
					}
				}
				slices.Sort(got)
				slices.Sort(tt.want)
				if !slices.Equal(got, tt.want) || diff.Unchanged != tt.unchanged || len(dry.Changes) != len(diff.Changes) {
					t.Errorf("changes %q, want %q; %d are unchanged; the dry run had %d", got, tt.want, diff.Unchanged, len(dry.Changes))
				}
				if again := s.apply(t, tt.after); len(again.Changes) > 0 {
					t.Errorf("applied again it changes %v", again.Changes)
				}
			})
		})
	}
}

// TestIDOfAnEditedEntry: an edited entry keeps the ID that its first form has given it, and an
// entry like its first form gets another one. Agents see an edit: nothing vanishes.
func TestIDOfAnEditedEntry(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		caller, _ := s.join(t)
		first, edited := unnamed("/a", "", "uid:1"), unnamed("/a", "", "uid:2")
		id := spireapi.EntryID("", first.SPIFFEID.String(), []string{"unix:uid:1"})
		s.apply(t, []spireapi.Entry{first})
		old := s.fetch(t, caller)[id]
		s.apply(t, []spireapi.Entry{edited})
		got := s.fetch(t, caller)[id]
		if old == nil || got == nil || got.GetSelectors()[0].GetValue() != "uid:2" || got.GetRevisionNumber() <= old.GetRevisionNumber() {
			t.Fatalf("the agent has %v, before the edit %v", got, old)
		}
		diff := s.apply(t, []spireapi.Entry{first, edited})
		if len(diff.Changes) != 1 || diff.Changes[0].Before != nil || diff.Changes[0].After.ID != id+"-2" {
			t.Errorf("changes %+v, want %s-2 to be added", diff.Changes, id)
		}
		change, err := s.UpsertEntry(t.Context(), unnamed("/a", "", "uid:1", "uid:1"))
		check(t, err)
		if change.After.ID != id+"-2" || change.Before != change.After {
			t.Errorf("put again it is the change %+v", change)
		}
		change, err = s.UpsertEntry(t.Context(), unnamed("/a", "", "uid:4"))
		check(t, err)
		if change.Before != nil || len(s.Entries()) != 3 {
			t.Errorf("put, an entry like others is the change %+v", change)
		}
	})
}

// TestManyAlike: that all entries have one parent and one SPIFFE ID, and all are edited, takes
// no quadratic time.
func TestManyAlike(t *testing.T) {
	t.Parallel()
	s := newServer(t, spireapi.Config{})
	const n = 5_000
	list := func(group string) (out []spireapi.Entry) {
		for i := range n {
			out = append(out, unnamed("/a", "", fmt.Sprintf("user:u%d", i), "group:"+group))
		}
		return out
	}
	_, err := s.ApplyEntries(t.Context(), list("a"), false)
	check(t, err)
	diff, err := s.ApplyEntries(t.Context(), list("b"), false)
	check(t, err)
	if removed, _ := diff.Removed(); removed != 0 || len(diff.Changes) != n {
		t.Errorf("%d of %d changes are removals", removed, len(diff.Changes))
	}
}

// TestManyProblems: all problems of a list are in one error, of which 20 are listed.
func TestManyProblems(t *testing.T) {
	t.Parallel()
	s := newServer(t, spireapi.Config{})
	list := make([]spireapi.Entry, 30)
	for i := range list {
		list[i] = unnamed(fmt.Sprintf("/a%d", i), "", "uid:1")
		list[i].X509TTL = 1
	}
	_, err := s.ApplyEntries(t.Context(), list, false)
	wrong, _ := errors.AsType[spireapi.EntryErrors](err)
	lines := strings.Split(wrong.Error(), "\n")
	if len(wrong) != 30 || len(lines) != 21 || lines[20] != "and 10 more" || !strings.HasPrefix(lines[1], `entries[1] "spiffe://example.org/a1": x509_ttl: `) {
		t.Errorf("%v", err)
	}
}
