package agent_test

import (
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"github.com/renewd/renewd/internal/server/spireapi"
)

// editedFor is entry 0 after an edit in place: another SPIFFE ID, for callers
// with this selector.
func editedFor(value string) spireapi.Entry {
	e := entryFor(0)
	e.SPIFFEID = spiffeid.RequireFromPath(td, "/web")
	e.Selectors = []spireapi.Selector{{Type: "test", Value: value}}
	return e
}

// toldNothing asks once, and fails the test unless the caller has to wait.
func (w *world) toldNothing(values ...string) {
	w.t.Helper()
	if u, err := w.askAs(values...); err == nil || !isCode(err, codes.DeadlineExceeded) {
		w.t.Errorf("a caller with %q is told %v, %v; want it to wait for the mint", values, u.ids, err)
	}
}

// An entry is edited in place and nothing is minted for it yet. Its old SPIFFE ID
// is shown to nobody from the sync on: not to the callers that it has now, and
// not to those of before.
func TestDrillEditedEntryIsNotServedAsItWas(t *testing.T) {
	for name, value := range map[string]string{"other callers": "web-user", "the same callers": "0"} {
		t.Run(name, func(t *testing.T) {
			keeping(t, 2, nil, func(w *world) {
				w.fill(2)
				token, err := w.fetchJWT(0)
				w.check(err)
				s := w.open(0)
				defer s.close()
				w.until("told", time.Minute, func() bool { _, ok := s.last(); return ok })
				w.set(func(f *faults) { f.signing = time.Hour }) // mint hangs, sync works
				w.enter([]spireapi.Entry{editedFor(value), entryFor(1)})
				w.until("synced", 10*time.Second, func() bool { return w.agent.Cache().Entries()[entryID(0)].SPIFFEID.Path() == "/web" })
				w.toldNothing(value)
				time.Sleep(time.Second)
				synctest.Wait()
				if value == "0" {
					if s.end != nil || len(s.updates) != 1 {
						w.t.Errorf("the open stream has %d updates and ended with %v; want it to wait", len(s.updates), s.end)
					}
				} else if !isCode(s.end, codes.PermissionDenied) {
					w.t.Errorf("the stream of a caller of before ended with %v, want PermissionDenied", s.end)
				}

				// Not after a restart in an outage, either.
				w.stopAgent()
				w.set(func(f *faults) { *f = faults{down: true} })
				w.startAgent()
				time.Sleep(10 * time.Second)
				for _, who := range []string{value, "0"} {
					if u, err := w.askAs(who); !isCode(err, codes.Unavailable) {
						w.t.Errorf("after a restart a caller with %q is told %v, %v; want Unavailable", who, u.ids, err)
					}
				}
				w.set(func(f *faults) { *f = faults{} })
				time.Sleep(15 * time.Second)
				if u, err := w.askAs(value); err != nil || !slices.Equal(u.ids, []string{"spiffe://example.org/web"}) {
					w.t.Errorf("after the mint a caller is told %v, %v", u.ids, err)
				}
				if value == "0" {
					if again, err := w.fetchJWT(0); err != nil || again == token {
						w.t.Errorf("JWT-SVID of the entry as it was: %v (%v)", again == token, err)
					}
				}
			})
		})
	}
}

// The entry is edited while the agent is away. What was kept is served until the
// server tells, and to nobody from then on.
func TestDrillEditWhileTheAgentIsAway(t *testing.T) {
	keeping(t, 2, nil, func(w *world) {
		w.fill(2)
		w.stopAgent()
		w.enter([]spireapi.Entry{editedFor("web-user"), entryFor(1)})
		w.set(func(f *faults) { f.signing = time.Hour })
		w.startAgent()
		time.Sleep(10 * time.Second)
		if err := w.fetchX509(0); !isCode(err, codes.PermissionDenied) {
			w.t.Errorf("a caller of before: %v, want PermissionDenied", err)
		}
		w.toldNothing("web-user")
	})
}

// Entries that are missing from the server's answers are served on, which is
// said once and counted, and no fault; those that are really gone leave after a
// while in which the server answered.
func TestDrillMissingEntriesAreServed(t *testing.T) {
	var log strings.Builder
	const n = 10
	inWorld(t, n, func(w *world) { w.cfg.Log = syncedLog(&log) }, func(w *world) {
		w.fill(n)
		time.Sleep(4 * time.Minute) // the attestation is long past
		s := w.open(0)
		defer s.close()
		said := func(what string, times int) {
			w.t.Helper()
			synctest.Wait()
			if got := strings.Count(log.String(), what); got != times {
				w.t.Errorf("%q is logged %d times, want %d:\n%s", what, got, times, log.String())
			}
		}
		const missing, over = "entries missing from the server's answer, still served", "no entry missing any more"
		at := time.Now()
		for range 2 {
			w.replica(func(now []*types.Entry) []*types.Entry { return now[1:] })
			w.until("missing", 10*time.Second, func() bool { return w.gauge("renewd_entries_missing") == 1 })
			time.Sleep(20 * time.Second)
			w.set(func(f *faults) { *f = faults{} })
			w.until("back", 10*time.Second, func() bool { return w.gauge("renewd_entries_missing") == 0 })
		}
		if mints := w.mintsSince(at); len(mints) > 0 {
			w.t.Errorf("minted again, though nothing has changed: %v", mints)
		}
		said(missing, 2)
		said(over, 2)

		// What is not told in an outage is not missing.
		w.enter(entriesFor(n)[1:])
		w.until("missing", 10*time.Second, func() bool { return w.agent.State().EntriesMissing == 1 })
		w.set(func(f *faults) { f.down = true })
		time.Sleep(10 * time.Minute)
		w.set(func(f *faults) { f.down = false })
		// A taint, which has it minted, in vain.
		time.Sleep(6 * time.Second) // the server is found again
		old := w.activate()
		w.check(w.server.Keysets().Taint(w.t.Context(), old.ID))
		for at := time.Now(); time.Since(at) < 8*time.Second; {
			time.Sleep(100 * time.Millisecond)
			synctest.Wait()
			if a := w.authority(old); settled(a) {
				w.t.Fatal("settled, while an SVID of it is served")
			}
		}
		if err := w.fetchX509(0); err != nil {
			w.t.Errorf("a caller whose entry has been missing for some of the answers: %v", err)
		}
		s.unbroken()
		w.until("removed", 30*time.Second, func() bool { return len(w.agent.Cache().Entries()) == n-1 })
		<-s.done
		if !isCode(s.end, codes.PermissionDenied) {
			w.t.Errorf("the stream of the deleted entry ended with %v, want PermissionDenied", s.end)
		}
		s.close()
		w.until("settled", 2*time.Minute, func() bool { return settled(w.authority(old)) })
		said(missing, 3)
		said(over, 3)
		said("X.509-SVID not renewed", 0)
	})
}

// A server that does not know its new node yet has no entries for it. Until it
// has, or has had none for three minutes, nobody is told that there is no entry.
func TestDrillNewNodeWithoutEntries(t *testing.T) {
	for name, n := range map[string]int{"entries come late": 3, "there are none": 0} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, n, func(w *world) { w.replica(none) }, func(w *world) {
				w.until("attested", 10*time.Second, func() bool { return w.agent.Bundle() != nil })
				for range 9 {
					for _, i := range []int{0, 99} {
						if err := w.fetchX509(i); !isCode(err, codes.Unavailable) {
							w.t.Errorf("before there are entries: %v, want Unavailable", err)
						}
					}
					time.Sleep(10 * time.Second)
				}
				w.set(func(f *faults) { *f = faults{} })
				if n > 0 {
					w.until("served", 15*time.Second, func() bool { return w.fetchX509(0) == nil })
				} else {
					time.Sleep(100 * time.Second)
				}
				if err := w.fetchX509(99); !isCode(err, codes.PermissionDenied) {
					w.t.Errorf("a caller that no entry matches: %v, want PermissionDenied", err)
				}
			})
		})
	}
}

// With one SVID that is held and five that cannot be had a workload gets the one,
// soon, though an outage goes on. It stays held above the limit.
func TestDrillWhatIsHeldIsToldInAnOutage(t *testing.T) {
	inWorld(t, 10, func(w *world) { w.cfg.CacheSize = 2 }, func(w *world) {
		w.until("two held", time.Minute, func() bool { return w.held() == 2 })
		s := w.open(0)
		w.until("told", time.Minute, func() bool { _, ok := s.last(); return ok })
		w.set(func(f *faults) { f.down = true })
		other := w.open(9) // cannot be had
		defer other.close()
		time.Sleep(30 * time.Second)
		s.close() // the workload is restarted
		again := w.open(0, 1, 2, 3, 4, 5)
		defer again.close()
		w.until("what is held is told", 6*time.Second, func() bool { _, ok := again.last(); return ok })
	})
}
