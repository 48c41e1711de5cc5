package ledger_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/internal/server/ledger"
)

// held makes each save of m wait for a value from the returned channel, which is the
// save's error.
func held(m *memory) chan error {
	c := make(chan error)
	m.hook = func(_ ledger.Change, stored bool) error {
		if stored {
			return nil
		}
		return <-c
	}
	return c
}

func async(f func() error) chan error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	synctest.Wait()
	return done
}

// During a save, reads do not wait, a row counts already, and calls that come meanwhile
// share the next save.
func TestReadsDoNotWaitForStorage(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		release := held(m)
		l := open(t, m, nil)
		in := time.Now().Add(day)
		var done []chan error
		for i := range 10 {
			done = append(done, async(func() error { return l.RecordX509(t.Context(), row("A", fmt.Sprint(i), "", in)) }))
		}
		jwt := async(func() error { return l.RecordJWT(t.Context(), "a", in) })
		l.Begin()()
		l.Applied("0", 1)
		_, known := l.Contact("0")
		if latest, _ := l.JWT("a", true); l.X509("A", true).SVIDs != 10 || len(l.Holders("A")) != 10 || latest.IsZero() || !known {
			t.Errorf("%+v, JWT until %v while they are stored", l.X509("A", true), latest)
		}
		select {
		case <-done[0]:
			t.Error("returned before it was durable")
		default:
		}
		release <- nil
		release <- nil
		for _, d := range append(done, jwt) {
			check(t, <-d)
		}
		if m.saves != 2 || m.count() != 10 {
			t.Errorf("%d saves of %d rows, want 2 of 10", m.saves, m.count())
		}
	})
}

// A canceled call returns at once; its row counts, and is stored with the next change.
func TestCanceledCall(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		release := held(m)
		l := open(t, m, nil)
		in := time.Now().Add(day)
		first := async(func() error { return l.RecordX509(t.Context(), row("A", "one", "", in)) })
		ctx, stop := context.WithCancel(t.Context())
		second := async(func() error { return l.RecordX509(ctx, row("A", "two", "", in)) })
		stop()
		if err := <-second; !errors.Is(err, context.Canceled) {
			t.Errorf("canceled: %v", err)
		}
		release <- nil
		check(t, <-first)
		if h := l.X509("A", true); h.Agents != 2 {
			t.Errorf("%+v, want both to count", h)
		}
		third := async(func() error { return l.RecordX509(t.Context(), row("A", "three", "", in)) })
		release <- nil
		check(t, <-third)
		if !m.has("A", "two", "") {
			t.Error("counts, and is not stored with the next change")
		}
	})
}

// All calls of a failed save return its error, and their rows count: they may have been
// stored.
func TestStorageFails(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		release := held(m)
		l := open(t, m, nil)
		in := time.Now().Add(day)
		full := errors.New("disk full")
		first := async(func() error { return l.RecordX509(t.Context(), row("A", "one", "", in)) })
		second := async(func() error { return l.RecordX509(t.Context(), row("A", "two", "", in)) })
		jwt := async(func() error { return l.RecordJWT(t.Context(), "a", in) })
		release <- nil
		check(t, <-first)
		release <- full
		for _, d := range []chan error{second, jwt} {
			if err := <-d; !errors.Is(err, full) {
				t.Errorf("%v, want that the disk is full", err)
			}
		}
		if h := l.X509("A", true); h.Agents != 2 {
			t.Errorf("%+v, want both to count", h)
		}
		again := async(func() error { return l.RecordJWT(t.Context(), "a", in) })
		release <- nil
		check(t, <-again)
		if m.jwt["a"].IsZero() {
			t.Error("the expiry that could not be stored was not stored the next time")
		}

		for what, drop := range map[string]func() error{
			"settled": func() error { return l.Report(t.Context(), "one", says("A", 0, 0, true)) },
			"gone":    func() error { return l.RemoveAgent(t.Context(), "one") },
			"removed": func() error { return l.Removed(t.Context(), "A", "a") },
		} {
			dropped := async(drop)
			release <- full
			if err := <-dropped; !errors.Is(err, full) {
				t.Errorf("%s: %v, want that the disk is full", what, err)
			}
			if h := l.X509("A", true); h.Agents != 2 || h.Clear || !m.has("A", "one", "") {
				t.Errorf("%s and not stored: %+v", what, h)
			}
		}
	})
}

// If storage panics, only the call that saves panics.
func TestStoragePanics(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		release := held(m)
		l := open(t, m, nil)
		in := time.Now().Add(day)
		give := func(agent string) func() error {
			return func() (err error) {
				defer func() {
					if x := recover(); x != nil {
						err = errCrashed
					}
				}()
				return l.RecordX509(t.Context(), row("A", agent, "", in))
			}
		}
		first, second, third := async(give("one")), async(give("two")), async(give("three"))
		wait := m.hook
		m.hook = func(c ledger.Change, stored bool) error {
			if err := wait(c, stored); err != nil {
				panic(err)
			}
			return nil
		}
		release <- nil
		check(t, <-first)
		release <- errCrashed
		crashed := 0
		for _, d := range []chan error{second, third} {
			if err := <-d; err == nil {
				t.Error("no error, and nothing was stored")
			} else if errors.Is(err, errCrashed) {
				crashed++
			}
		}
		again := async(give("four"))
		release <- nil
		check(t, <-again)
		if crashed != 1 || !m.has("A", "four", "") {
			t.Errorf("%d callers of two crashed", crashed)
		}
	})
}

// The later of two changes of one row in one save counts.
func TestOneSave(t *testing.T) {
	t.Parallel()
	for _, last := range []string{"given", "settled"} {
		t.Run(last, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				m := newMemory()
				l := open(t, m, nil)
				in := time.Now().Add(day)
				check(t, l.RecordX509(t.Context(), row("A", "one", "", in)))
				give := func() error { return l.RecordX509(t.Context(), row("A", "one", "", in)) }
				settle := func() error { return l.Report(t.Context(), "one", says("A", 0, 0, true)) }
				if last == "given" {
					give, settle = settle, give
				}
				release := held(m)
				before := async(func() error { return l.RecordX509(t.Context(), row("B", "one", "", in)) })
				first, second := async(give), async(settle)
				release <- nil
				release <- nil
				for _, d := range []chan error{before, first, second} {
					check(t, <-d)
				}
				if h := l.X509("A", true); h.Clear != (last == "settled") || h.Clear == m.has("A", "one", "") || m.saves != 3 {
					t.Errorf("%+v, in storage %v after %d saves", h, m.rows, m.saves)
				}
			})
		})
	}
}

// A report that an SVID is held again overrides the one before, which is still being
// stored.
func TestNewerReportWins(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		l := open(t, m, nil)
		check(t, l.RecordX509(t.Context(), row("A", "one", "", time.Now().Add(day)), row("A", "one", "x", time.Now().Add(day))))
		release := held(m)
		settled := async(func() error { return l.Report(t.Context(), "one", says("A", 0, 0, true)) })
		check(t, l.Report(t.Context(), "one", says("A", 2, 0, false)))
		release <- nil
		check(t, <-settled)
		if h := l.X509("A", true); h.SVIDs != 2 {
			t.Errorf("%+v, want the two that the last report has", h)
		}
		ctx, stop := context.WithCancel(t.Context())
		stop()
		if err := l.Report(ctx, "one", says("A", 0, 0, true)); !errors.Is(err, context.Canceled) || l.X509("A", true).Clear {
			t.Errorf("report with a canceled context: %v, %+v", err, l.X509("A", true))
		}
	})
}

// After any concurrent calls, memory and storage are the same.
func TestMemoryIsWhatIsStored(t *testing.T) {
	t.Parallel()
	m := newMemory()
	l := open(t, m, nil)
	in := time.Now().Add(day)
	var wg sync.WaitGroup
	for worker := range uint64(8) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(worker, 0))
			pick := func(prefix string, n int) string { return fmt.Sprint(prefix, r.IntN(n)) }
			for range 400 {
				end := l.Begin()
				var err error
				switch r.IntN(12) {
				case 0:
					err = l.Report(t.Context(), pick("agent", 4), says(pick("A", 3), 0, 0, true))
				case 1:
					err = l.Report(t.Context(), pick("agent", 4), says(pick("A", 3), 1, 0, false))
				case 2:
					err = l.RemoveAgent(t.Context(), pick("agent", 4))
				case 3:
					err = l.Removed(t.Context(), pick("A", 3), pick("J", 2))
				case 4:
					err = l.RecordJWT(t.Context(), pick("J", 2), in.Add(time.Duration(r.IntN(9))*time.Hour))
				case 5:
					l.X509(pick("A", 3), r.IntN(2) == 0)
					l.Holders(pick("A", 3))
				case 6: // already expired
					err = l.RecordX509(t.Context(), row(pick("A", 3), pick("agent", 4), pick("x", 2), in.Add(-2*day)))
				case 8:
					err = recordWith(t.Context(), l, m, row(pick("A", 3), pick("agent", 4), pick("", 4), in.Add(time.Duration(r.IntN(9))*time.Hour)), func() {})
				case 7:
					_, err = ledger.Sweep(l, t.Context())
				default:
					err = l.RecordX509(t.Context(), row(pick("A", 3), pick("agent", 4), pick("", 4), in.Add(time.Duration(r.IntN(9))*time.Hour)),
						row(pick("A", 3), pick("agent", 4), pick("", 4), in))
				}
				end()
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for n := 1; n > 0; {
		var err error
		n, err = ledger.Sweep(l, t.Context())
		check(t, err)
	}
	for i := range 4 { // claims are in memory only
		check(t, l.Report(t.Context(), fmt.Sprint("agent", i), ledger.Report{}))
	}
	again := open(t, m, nil)
	for i := range 3 {
		a := fmt.Sprint("A", i)
		if x, y := l.X509(a, false), again.X509(a, false); x != y {
			t.Errorf("%s: in memory %+v, stored %+v", a, x, y)
		}
	}
}
