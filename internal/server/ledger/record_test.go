package ledger_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/internal/server/ledger"
)

// A row that is recorded while rows are being deleted is not lost, neither in memory nor
// in storage.
func TestRecordDuringDeletion(t *testing.T) {
	t.Parallel()
	drops := map[string]func(ctx context.Context, l *ledger.Ledger) error{
		"settled": func(ctx context.Context, l *ledger.Ledger) error { return l.Report(ctx, "one", says("A", 0, 0, true)) },
		"gone":    func(ctx context.Context, l *ledger.Ledger) error { return l.RemoveAgent(ctx, "one") },
		"removed": func(ctx context.Context, l *ledger.Ledger) error { return l.Removed(ctx, "A", "") },
	}
	for what, drop := range drops {
		for _, entry := range []string{"", "new"} {
			t.Run(fmt.Sprintf("%s while %q is given with something else", what, entry), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) { recordWithDuringDeletion(t, drop, what, entry) })
			})
			t.Run(fmt.Sprintf("%s while %q is given", what, entry), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					m := newMemory()
					l := open(t, m, nil)
					in := time.Now().Add(day)
					check(t, l.RecordX509(t.Context(), row("A", "one", "", in), row("A", "one", "x", in)))
					release := held(m)
					dropped := async(func() error { return drop(t.Context(), l) })
					if what == "removed" {
						release <- nil // that of the JWT key
						synctest.Wait()
					}
					given := async(func() error { return l.RecordX509(t.Context(), row("A", "one", entry, in)) })
					other := async(func() error { return l.RecordX509(t.Context(), row("B", "one", "", in)) })
					if h := l.X509("A", true); h.Clear || h.Agents != 1 {
						t.Errorf("while it is stored: %+v", h)
					}
					release <- nil
					check(t, <-dropped)
					release <- nil
					check(t, <-given)
					check(t, <-other)
					if h := l.X509("A", true); h.Agents != 1 || !m.has("A", "one", entry) {
						t.Errorf("%+v, in storage %v: the recorded row is lost", h, m.rows)
					}
					if h := l.X509("B", true); h.SVIDs != 1 || !m.has("B", "one", "") {
						t.Errorf("of another authority: %+v", h)
					}
					dropped = async(func() error { return l.Report(t.Context(), "one", says("A", 0, 0, true)) })
					release <- nil
					check(t, <-dropped)
					if h := l.X509("A", true); !h.Clear || m.count() != 1 {
						t.Errorf("settled again: %+v, in storage %v", h, m.rows)
					}
				})
			})
		}
	}
}

// While rows are being deleted, a row is recorded and the agent reports that it holds
// SVIDs, or a second process is noticed: each of these keeps the holding.
func TestReportDuringDeletion(t *testing.T) {
	t.Parallel()
	for name, reports := range map[string][]ledger.Report{
		"it holds an SVID": {by("a", 1, says("A", 1, 0, false))},
		"two processes":    {by("a", 1, ledger.Report{}), by("b", 1, ledger.Report{}), by("a", 2, ledger.Report{})},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				m := newMemory()
				l := open(t, m, nil)
				in := time.Now().Add(day)
				check(t, l.RecordX509(t.Context(), row("A", "one", "x", in)))
				release := held(m)
				gone := async(func() error { return l.RemoveAgent(t.Context(), "one") })
				given := async(func() error { return l.RecordX509(t.Context(), row("A", "one", "new", in)) })
				reported := async(func() error {
					for _, r := range reports {
						if err := l.Report(t.Context(), "one", r); err != nil {
							return err
						}
					}
					return nil
				})
				release <- nil
				check(t, <-gone)
				release <- nil
				check(t, <-given)
				check(t, <-reported)
				if h := l.X509("A", true); h.Agents != 1 || h.Latest.IsZero() || !m.has("A", "one", "new") {
					t.Errorf("%+v, in storage %v: the recorded row is lost", h, m.rows)
				}
			})
		})
	}
}

// recordWithDuringDeletion deletes rows before, during and after a RecordWith: the
// recorded row is never lost.
func recordWithDuringDeletion(t *testing.T, drop func(context.Context, *ledger.Ledger) error, what, entry string) {
	in := time.Now().Add(day)
	holds := func(when string, l *ledger.Ledger, m *memory) {
		t.Helper()
		if h := l.X509("A", true); h.Agents != 1 || !m.has("A", "one", entry) {
			t.Errorf("%s: %+v, in storage %v: the recorded row is lost", when, h, m.rows)
		}
	}
	set := func() (*memory, *ledger.Ledger) {
		m := newMemory()
		l := open(t, m, nil)
		check(t, l.RecordX509(t.Context(), row("A", "one", "", in), row("A", "one", "x", in)))
		return m, l
	}
	saves := 1 // for the deletion
	if what == "removed" {
		saves = 2 // the first is for the JWT key
	}

	// The row is stored during the deletion.
	m, l := set()
	release := held(m)
	dropped := async(func() error { return drop(t.Context(), l) })
	for range saves - 1 {
		release <- nil
		synctest.Wait()
	}
	given := async(func() error { return recordWith(t.Context(), l, m, row("A", "one", entry, in), func() {}) })
	release <- nil
	check(t, <-dropped)
	synctest.Wait()
	if entry == "" { // the same row: in the order of the ledger's changes, once more
		release <- nil
	}
	check(t, <-given)
	m.hook = nil
	holds("while it is deleted", l, m)

	// The deletion begins and ends while the row is being stored.
	m, l = set()
	store := make(chan struct{})
	given = async(func() error { return recordWith(t.Context(), l, m, row("A", "one", entry, in), func() { <-store }) })
	check(t, drop(t.Context(), l))
	close(store)
	check(t, <-given)
	holds("within", l, m)

	// A later deletion deletes it.
	check(t, drop(t.Context(), l))
	if h := l.X509("A", true); !h.Clear || m.count() > 0 {
		t.Errorf("dropped afterwards: %+v, in storage %v", h, m.rows)
	}
}

// recordWith stores a row by itself; pause is between the decision and the storing.
func recordWith(ctx context.Context, l *ledger.Ledger, m *memory, r ledger.Row, pause func()) error {
	return l.RecordWith(ctx, r, func(_ context.Context, give func() ledger.Row) error {
		r := give()
		pause()
		m.mu.Lock()
		defer m.mu.Unlock()
		m.rows[key{r.Authority, r.Agent, r.Entry}] = r.NotAfter
		return nil
	})
}

// A refused row does not count. A row whose storing failed counts, since it may have been
// stored. The later expiry counts.
func TestRecordWith(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		l := open(t, m, nil)
		in := time.Now().Add(day)
		full := errors.New("disk full")
		err := l.RecordWith(t.Context(), row("A", "one", "", in), func(context.Context, func() ledger.Row) error { return full })
		if err != full || l.X509("A", true).Agents != 0 || l.Knows("one") { //nolint:errorlint // it is to be returned as it is
			t.Errorf("refused: %v, %+v", err, l.X509("A", true))
		}
		err = l.RecordWith(t.Context(), row("A", "one", "", in), func(_ context.Context, give func() ledger.Row) error {
			give()
			if l.X509("A", true).Agents != 1 {
				t.Error("does not count while it is stored")
			}
			return full
		})
		if err != full || l.X509("A", true).Agents != 1 { //nolint:errorlint // it is to be returned as it is
			t.Errorf("failed: %v, %+v", err, l.X509("A", true))
		}
		for _, end := range []time.Time{in.Add(time.Hour), in} {
			check(t, recordWith(t.Context(), l, m, row("A", "one", "", end), func() {}))
			if got := m.rows[key{"A", "one", ""}]; !got.Equal(in.Add(time.Hour)) || m.saves > 0 {
				t.Errorf("stored until %v after %d saves of the ledger, want %v", got, m.saves, in.Add(time.Hour))
			}
		}
	})
}
