package spireapi_test

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/test/memory"
)

// brokenEntries is a storage that cannot store entries.
type brokenEntries struct{ *memory.Server }

func (brokenEntries) PutEntries(context.Context, []spireapi.StoredEntry, []string, ...*spireapi.AuditRecord) error {
	return errors.New("disk full")
}

func TestEntriesThatAreNotStoredDoNotCount(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{Storage: brokenEntries{memory.NewServer()}}, func(t *testing.T, s *running) {
		_, applied := s.ApplyEntries(t.Context(), []spireapi.Entry{entry("a")}, false)
		_, upserted := s.UpsertEntry(t.Context(), entry("a"))
		if applied == nil || upserted == nil || len(s.Entries()) > 0 {
			t.Errorf("%v, %v; entries are %v", applied, upserted, s.Entries())
		}
	})
}

// failsAfterStoring is a storage that stores entries and may then return an error.
type failsAfterStoring struct {
	*memory.Server
	fail func() // called after entries were stored; nil: no error
}

func (o *failsAfterStoring) PutEntries(ctx context.Context, put []spireapi.StoredEntry, gone []string, audit ...*spireapi.AuditRecord) error {
	if err := o.Server.PutEntries(ctx, put, gone, audit...); err != nil || o.fail == nil {
		return err
	}
	o.fail()
	return errors.New("sync failed")
}

func (o *failsAfterStoring) Entries(ctx context.Context) ([]spireapi.StoredEntry, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return o.Server.Entries(ctx)
}

// TestFailedChangeThatWasStored: the next change is compared with what the failed
// one has stored. Otherwise that entry would reappear with the next start.
func TestFailedChangeThatWasStored(t *testing.T) {
	t.Parallel()
	storage := &failsAfterStoring{Server: memory.NewServer()}
	bubble(t, spireapi.Config{Storage: storage}, func(t *testing.T, s *running) {
		caller, _ := s.join(t)
		s.apply(t, []spireapi.Entry{entry("a"), entry("b")})
		fail := func(want ...spireapi.Entry) {
			t.Helper()
			ctx, cancel := context.WithCancel(t.Context())
			storage.fail = cancel
			if _, err := s.ApplyEntries(ctx, want, false); err == nil {
				t.Error("no error")
			}
			storage.fail = nil
			got := s.fetch(t, caller)
			for _, e := range want {
				if got[e.ID] == nil || len(got) != len(want) {
					t.Errorf("served are %v, stored are %v", got, want)
				}
			}
		}
		fail(entry("a"), entry("c"))
		c := s.Entries()[1]
		fail(entry("a"))
		if diff := s.apply(t, []spireapi.Entry{entry("a"), entry("c")}); len(diff.Changes) != 1 {
			t.Errorf("%d changes, want c to be added", len(diff.Changes))
		}
		if again := s.Entries()[1]; again.ID != "c" || again.Revision <= c.Revision {
			t.Errorf("entry %s has revision %d, before it was %d", again.ID, again.Revision, c.Revision)
		}
	})
}

// TestConcurrentChanges: with many writers at once, no change is lost, all
// revisions differ, and the stored entries are the served ones.
func TestConcurrentChanges(t *testing.T) {
	t.Parallel()
	storage := memory.NewServer()
	s := newServer(t, spireapi.Config{Storage: storage})
	const writers, rounds = 8, 50
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for n := range rounds {
				id := fmt.Sprintf("w%d-%d", w, n)
				_, err := s.UpsertEntry(t.Context(), entry(id))
				if err == nil && n%2 == 1 {
					err = s.DeleteEntry(t.Context(), id)
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	served := s.Entries()
	stored, err := storage.Entries(t.Context())
	slices.SortFunc(stored, func(a, b spireapi.StoredEntry) int { return strings.Compare(a.ID, b.ID) })
	if err != nil || len(served) != writers*rounds/2 || !reflect.DeepEqual(stored, served) {
		t.Errorf("%d entries are served and %d stored, want %d, the same (%v)", len(served), len(stored), writers*rounds/2, err)
	}
	revisions := map[int64]string{}
	for _, e := range served {
		if other, twice := revisions[e.Revision]; twice {
			t.Errorf("%s and %s have the same revision", e.ID, other)
		}
		revisions[e.Revision] = e.ID
	}
}
