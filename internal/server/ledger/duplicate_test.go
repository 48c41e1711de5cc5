package ledger_test

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/server/ledger"
)

// by returns a report with a process and number.
func by(process string, number uint64, r ledger.Report) ledger.Report {
	r.Process, r.Number = process, number
	return r
}

// doubles is an agent "one" with two SVIDs of authority A, and a server that may be
// restarted.
type doubles struct {
	t      *testing.T
	m      *memory
	l      *ledger.Ledger
	log    strings.Builder
	number uint64
}

func newDoubles(t *testing.T) *doubles {
	d := &doubles{t: t, m: newMemory()}
	d.restart()
	check(t, d.l.RecordX509(t.Context(), row("A", "one", "", time.Now().Add(day)), row("A", "one", "x", time.Now().Add(day))))
	return d
}

func (d *doubles) restart() {
	d.t.Helper()
	l, err := ledger.Open(d.t.Context(), ledger.Config{Storage: d.m, Log: slog.New(slog.NewTextHandler(&d.log, nil))})
	check(d.t, err)
	d.l = l
}

// settled reports, from a process, that nothing depends on A.
func (d *doubles) settled(process string) {
	d.t.Helper()
	d.number++
	check(d.t, d.l.Report(d.t.Context(), "one", by(process, d.number, says("A", 0, 0, true))))
}

func (d *doubles) is(when string, clear, duplicated bool) {
	d.t.Helper()
	h := d.l.X509("A", true)
	if two := slices.Equal(d.l.Duplicated(), []string{"one"}); h.Clear != clear || two != duplicated {
		d.t.Errorf("%s: %+v, duplicated %v, want clear %v, duplicated %v", when, h, d.l.Duplicated(), clear, duplicated)
	}
	if lines := strings.Count(d.log.String(), "two processes"); duplicated && lines != 1 {
		d.t.Errorf("%s: %d lines in the log", when, lines)
	}
}

// A restart and a clone: a report of settled is trusted if there can be no other process.
func TestRestartOrClone(t *testing.T) {
	t.Parallel()
	for name, f := range map[string]func(d *doubles){
		"one process": func(d *doubles) {
			d.settled("a")
			d.is("at once", true, false)
		},
		"processes without an ID": func(d *doubles) {
			check(d.t, d.l.Report(d.t.Context(), "one", says("A", 2, 0, false)))
			check(d.t, d.l.Report(d.t.Context(), "one", says("A", 0, 0, true)))
			d.is("at once", true, false)
		},
		"a restart of the agent": func(d *doubles) {
			check(d.t, d.l.Report(d.t.Context(), "one", by("a", 1, says("A", 2, 0, false))))
			d.number = 0
			for range 3 {
				d.settled("b")
				d.is("the other could still be there", false, false)
				time.Sleep(time.Minute)
			}
			d.settled("b")
			d.is("it would have been heard of", true, false)
		},
		"a restart of the server": func(d *doubles) {
			d.restart()
			for range 3 {
				d.settled("a")
				d.is("there could be another", false, false)
				time.Sleep(time.Minute)
			}
			d.settled("a")
			d.is("it would have been heard of", true, false)
		},
		"a clone": func(d *doubles) {
			check(d.t, d.l.Report(d.t.Context(), "one", by("a", 1, ledger.Report{})))
			d.settled("b")
			d.is("the clone has settled", false, false)
			d.settled("a")
			d.is("and the first one", false, true)
			for range 20 {
				time.Sleep(time.Minute)
				d.settled("b")
				d.settled("a")
				d.is("and again", false, true)
			}
			if h := d.l.Holders("A"); len(h) != 1 || h[0].Reason != ledger.ReasonDuplicated || h[0].SVIDs != 2 {
				d.t.Errorf("holders %+v", h)
			}
			time.Sleep(day)
			d.is("what it was given has expired", true, true)
		},
		"a clone with its memory": func(d *doubles) {
			check(d.t, d.l.Report(d.t.Context(), "one", by("a", 7, ledger.Report{})))
			check(d.t, d.l.Report(d.t.Context(), "one", by("a", 8, ledger.Report{})))
			check(d.t, d.l.Report(d.t.Context(), "one", by("a", 8, says("A", 0, 0, true))))
			d.is("a number comes twice", false, true)
		},
		"a report that arrives late": func(d *doubles) {
			for _, number := range []uint64{1, 3, 70, 69, 8, 7} {
				check(d.t, d.l.Report(d.t.Context(), "one", by("a", number, ledger.Report{})))
				d.is("no number comes twice", false, false)
			}
			check(d.t, d.l.Report(d.t.Context(), "one", by("a", 69, ledger.Report{})))
			d.is("one comes twice", false, true)
		},
		"a report that comes twice, with another between": func(d *doubles) {
			for _, number := range []uint64{1, 3} {
				check(d.t, d.l.Report(d.t.Context(), "one", by("a", number, ledger.Report{})))
			}
			d.is("no number comes twice", false, false)
			check(d.t, d.l.Report(d.t.Context(), "one", by("a", 1, ledger.Report{})))
			d.is("one comes twice", false, true)
		},
		"a machine that is set back": func(d *doubles) {
			check(d.t, d.l.Report(d.t.Context(), "one", by("a", 70, ledger.Report{})))
			check(d.t, d.l.Report(d.t.Context(), "one", by("a", 6, ledger.Report{})))
			d.is("a number is far behind", false, true)
		},
		"one of a clone ends, and the server is restarted": func(d *doubles) {
			d.settled("a")
			check(d.t, d.l.RecordX509(d.t.Context(), row("A", "one", "", time.Now().Add(day))))
			d.settled("b")
			d.settled("a")
			d.restart()
			d.log.Reset()
			d.log.WriteString("two processes") // was logged before the restart
			for range 10 {
				time.Sleep(time.Minute)
				d.settled("a")
				d.is("what the other was given may be there still", false, true)
			}
			time.Sleep(day)
			d.is("expired", true, true)
			time.Sleep(5 * day)
			d.is("what was given at the end may live for a week", true, true)
			time.Sleep(2 * day)
			d.is("forgotten", true, false)
			check(d.t, d.l.RecordX509(d.t.Context(), row("A", "one", "", time.Now().Add(day))))
			d.settled("a")
			d.is("believed again", true, false)
		},
		"an SVID that was signed by a clock that was ahead": func(d *doubles) {
			check(d.t, d.l.RecordX509(d.t.Context(), row("A", "one", "", time.Now().Add(9*day))))
			check(d.t, d.l.Report(d.t.Context(), "one", by("a", 1, ledger.Report{})))
			d.settled("b")
			d.settled("a")
			time.Sleep(8 * day)
			d.settled("b")
			time.Sleep(5 * time.Minute)
			d.settled("b")
			d.is("before it has expired", false, true)
			time.Sleep(day)
			d.settled("b")
			d.is("expired", true, true)
			time.Sleep(time.Hour)
			d.is("forgotten", true, false)
		},
		"SVIDs of a clock that was ahead, and a restart of the server": func(d *doubles) {
			late := time.Now().Add(9 * day)
			check(d.t, d.l.RecordX509(d.t.Context(), row("A", "one", "", late), row("A", "one", "x", late)))
			d.restart()
			for _, process := range []string{"a", "b", "a"} {
				d.settled(process)
			}
			d.is("two processes", false, true)
			saves := d.m.saves
			d.restart()
			d.log.Reset()
			d.log.WriteString("two processes")
			for _, process := range []string{"a", "b", "a"} {
				d.settled(process)
			}
			d.is("and after another restart", false, true)
			if d.m.saves != saves {
				d.t.Errorf("%d writes of what is stored", d.m.saves-saves)
			}
		},
		"the operator's word": func(d *doubles) {
			d.settled("a")
			check(d.t, d.l.RecordX509(d.t.Context(), row("A", "one", "", time.Now().Add(day))))
			d.settled("b")
			d.settled("a")
			d.is("duplicated", false, true)
			check(d.t, d.l.RemoveAgent(d.t.Context(), "one"))
			d.is("gone", true, false)
			d.restart()
			d.is("after a restart", true, false)
		},
		"an agent that speaks of the mark": func(d *doubles) {
			check(d.t, d.l.Report(d.t.Context(), "one", by("a", 1, says("duplicated", 3, 0, false))))
			d.is("claims to be duplicated", false, false)
		},
		"it cannot be stored": func(d *doubles) {
			check(d.t, d.l.Report(d.t.Context(), "one", by("a", 1, ledger.Report{})))
			check(d.t, d.l.Report(d.t.Context(), "one", by("b", 1, ledger.Report{})))
			full := errors.New("disk full")
			d.m.hook = func(ledger.Change, bool) error { return full }
			if err := d.l.Report(d.t.Context(), "one", by("a", 2, says("A", 0, 0, true))); !errors.Is(err, full) {
				d.t.Errorf("got %v", err)
			}
			d.m.hook = nil
			d.is("not stored", false, true)
			check(d.t, d.l.Report(d.t.Context(), "one", by("b", 2, says("A", 0, 0, true))))
			d.restart()
			d.log.Reset()
			d.log.WriteString("two processes")
			d.is("stored with the next", false, true)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { f(newDoubles(t)) })
		})
	}
}

// The report of one of two processes does not remove what the other reports to hold.
func TestClaimsOfTwo(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := open(t, newMemory(), nil)
		l.X509("A", true)
		for i := range uint64(5) {
			check(t, l.Report(t.Context(), "one", by("a", i+1, says("A", 3, 1, false))))
			check(t, l.Report(t.Context(), "one", by("b", i+1, says("A", 0, 0, true))))
			check(t, l.Report(t.Context(), "one", by("b", i+2, ledger.Report{})))
			if h := l.X509("A", true); h.Clear || h.Agents != 1 {
				t.Errorf("round %d: %+v", i, h)
			}
		}
	})
}

// Of the waves that two processes announce the later one is shown.
func TestBeginOfTwo(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := open(t, newMemory(), nil)
		l.X509("A", true)
		soon, late := time.Now().Add(time.Minute), time.Now().Add(time.Hour)
		begins := func(process string, number uint64, at, want time.Time) {
			t.Helper()
			r := by(process, number, says("A", 1, 0, false))
			r.Authorities[0].BeginsAt = at
			check(t, l.Report(t.Context(), "one", r))
			if h := l.Holders("A"); len(h) != 1 || !h[0].BeginsAt.Equal(want) {
				t.Errorf("after report %d of %s: %+v, want the begin at %v", number, process, h, want)
			}
		}
		begins("a", 1, soon, soon)
		begins("b", 1, late, late)
		begins("a", 2, soon, late)
		begins("b", 2, late.Add(1), late.Add(1))
	})
}

// Two processes that report each minute cost a write an hour. The memory for restarts is
// bounded.
func TestDuplicatesAreCheap(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		l := open(t, m, nil)
		for i := range uint64(240) {
			check(t, l.Report(t.Context(), "one", by("a", i+1, ledger.Report{})))
			check(t, l.Report(t.Context(), "one", by("b", i+1, ledger.Report{})))
			time.Sleep(time.Minute)
		}
		if m.saves < 4 || m.saves > 5 {
			t.Errorf("%d writes in four hours", m.saves)
		}
		for i := range 1000 {
			check(t, l.Report(t.Context(), "two", by(fmt.Sprint(i), 1, ledger.Report{})))
			time.Sleep(time.Second)
		}
		// The number of earlier processes is bounded: the first one counts as new.
		check(t, l.Report(t.Context(), "two", by("0", 2, ledger.Report{})))
		if got := l.Duplicated(); !slices.Equal(got, []string{"one"}) {
			t.Errorf("duplicated are %v", got)
		}
		check(t, l.Report(t.Context(), "two", by("998", 2, ledger.Report{})))
		if got := l.Duplicated(); !slices.Equal(got, []string{"one", "two"}) {
			t.Errorf("the last but one has come back: duplicated are %v", got)
		}
	})
}

// The last 64 processes before the one that reports are known.
func TestEarlierProcesses(t *testing.T) {
	t.Parallel()
	for n, two := range map[int]bool{65: true, 66: false} {
		synctest.Test(t, func(t *testing.T) {
			l := open(t, nil, nil)
			for i := range n {
				check(t, l.Report(t.Context(), "one", by(fmt.Sprint(i), 1, ledger.Report{})))
				time.Sleep(time.Second)
			}
			check(t, l.Report(t.Context(), "one", by("0", 2, ledger.Report{})))
			if got := len(l.Duplicated()) == 1; got != two {
				t.Errorf("the first of %d processes has come back: duplicated is %v, want %v", n, got, two)
			}
		})
	}
}

// A clock step that is trusted does not shorten the wait for the other process.
func TestClockIsNoSilence(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var ahead time.Duration
		d := &doubles{t: t, m: newMemory()}
		l, err := ledger.Open(t.Context(), ledger.Config{Storage: d.m, Clock: clock.New(func() time.Time { return time.Now().Add(ahead) }, nil, time.Time{})})
		check(t, err)
		d.l = l
		check(t, l.RecordX509(t.Context(), row("A", "one", "", time.Now().Add(2*day)), row("A", "one", "x", time.Now().Add(2*day))))
		ahead = 4 * time.Hour
		d.is("the clock goes ahead", false, false)
		time.Sleep(day - 30*time.Second)
		check(t, l.Report(t.Context(), "one", by("a", 1, ledger.Report{})))
		d.settled("b")
		time.Sleep(time.Minute)
		d.settled("b")
		d.is("the clock is believed", false, false)
		time.Sleep(2 * time.Minute)
		d.settled("b")
		d.is("the other would have been heard of", true, false)
	})
}
