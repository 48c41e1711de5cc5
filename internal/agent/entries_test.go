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

// editedFor returns entry 0 after an edit: another SPIFFE ID, for callers with this
// selector.
func editedFor(value string) spireapi.Entry {
	e := entryFor(0)
	e.SPIFFEID = spiffeid.RequireFromPath(td, "/web")
	e.Selectors = []spireapi.Selector{{Type: "test", Value: value}}
	return e
}

// mustWait makes one call, and fails the test unless that has to wait.
func (w *world) mustWait(values ...string) {
	w.t.Helper()
	if u, err := w.askAs(values...); err == nil || !isCode(err, codes.DeadlineExceeded) {
		w.t.Errorf("a caller with %q got %v, %v; want it to wait for the mint", values, u.ids, err)
	}
}

// An entry was edited and nothing is minted for it yet. From the sync on its old SPIFFE
// ID is not served, neither to the callers that match now nor to those from before.
func TestDrillEditedEntryIsNotServedInItsOldState(t *testing.T) {
	for name, value := range map[string]string{"other callers": "web-user", "the same callers": "0"} {
		t.Run(name, func(t *testing.T) {
			inWorldWithRuntimeDir(t, 2, nil, func(w *world) {
				w.waitHeld(2)
				token, err := w.fetchJWT(0)
				w.check(err)
				s := w.open(0)
				defer s.close()
				w.until("answered", time.Minute, func() bool { _, ok := s.last(); return ok })
				w.set(func(f *faults) { f.signing = time.Hour }) // mints hang, syncs succeed
				w.setEntries([]spireapi.Entry{editedFor(value), entryFor(1)})
				w.until("synced", 10*time.Second, func() bool { return w.agent.Cache().Entries()[entryID(0)].SPIFFEID.Path() == "/web" })
				w.mustWait(value)
				time.Sleep(time.Second)
				synctest.Wait()
				if value == "0" {
					if s.end != nil || len(s.updates) != 1 {
						w.t.Errorf("the open stream has %d updates and ended with %v; want it to wait", len(s.updates), s.end)
					}
				} else if !isCode(s.end, codes.PermissionDenied) {
					w.t.Errorf("the stream of a caller from before ended with %v, want PermissionDenied", s.end)
				}

				// The same after a restart in an outage.
				w.stopAgent()
				w.set(func(f *faults) { *f = faults{down: true} })
				w.startAgent()
				time.Sleep(10 * time.Second)
				for _, who := range []string{value, "0"} {
					if u, err := w.askAs(who); !isCode(err, codes.Unavailable) {
						w.t.Errorf("after a restart a caller with %q got %v, %v; want Unavailable", who, u.ids, err)
					}
				}
				w.set(func(f *faults) { *f = faults{} })
				time.Sleep(15 * time.Second)
				if u, err := w.askAs(value); err != nil || !slices.Equal(u.ids, []string{"spiffe://example.org/web"}) {
					w.t.Errorf("after the mint a caller got %v, %v", u.ids, err)
				}
				if value == "0" {
					if again, err := w.fetchJWT(0); err != nil || again == token {
						w.t.Errorf("JWT-SVID of the entry before the edit: %v (%v)", again == token, err)
					}
				}
			})
		})
	}
}

// The entry is edited while the agent is stopped. The stored SVID is served until the
// first sync.
func TestDrillEditWhileTheAgentIsStopped(t *testing.T) {
	inWorldWithRuntimeDir(t, 2, nil, func(w *world) {
		w.waitHeld(2)
		w.stopAgent()
		w.setEntries([]spireapi.Entry{editedFor("web-user"), entryFor(1)})
		w.set(func(f *faults) { f.signing = time.Hour })
		w.startAgent()
		time.Sleep(10 * time.Second)
		if err := w.fetchX509(0); !isCode(err, codes.PermissionDenied) {
			w.t.Errorf("a caller from before: %v, want PermissionDenied", err)
		}
		w.mustWait("web-user")
	})
}

// Entries that are missing from the server's answers are still served, counted, and
// logged once. Deleted ones are removed after the server has answered without them for
// the delay.
func TestDrillMissingEntriesAreServed(t *testing.T) {
	var log strings.Builder
	const n = 10
	inWorld(t, n, func(w *world) { w.cfg.Log = syncedLog(&log) }, func(w *world) {
		w.waitHeld(n)
		time.Sleep(4 * time.Minute) // longer than attestGrace
		s := w.open(0)
		defer s.close()
		logged := func(what string, times int) {
			w.t.Helper()
			synctest.Wait()
			if got := strings.Count(log.String(), what); got != times {
				w.t.Errorf("%q is logged %d times, want %d:\n%s", what, got, times, log.String())
			}
		}
		const missing, over = "entries missing from the server's answer, still served", "no entries missing"
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
		logged(missing, 2)
		logged(over, 2)

		// Entries are not missing during an outage.
		w.setEntries(entriesFor(n)[1:])
		w.until("missing", 10*time.Second, func() bool { return w.agent.State().EntriesMissing == 1 })
		w.set(func(f *faults) { f.down = true })
		time.Sleep(10 * time.Minute)
		w.set(func(f *faults) { f.down = false })
		// A taint, so that the agent tries to mint, in vain.
		time.Sleep(6 * time.Second) // the agent reconnects
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
		s.checkUnbroken()
		w.until("removed", 30*time.Second, func() bool { return len(w.agent.Cache().Entries()) == n-1 })
		<-s.done
		if !isCode(s.end, codes.PermissionDenied) {
			w.t.Errorf("the stream of the deleted entry ended with %v, want PermissionDenied", s.end)
		}
		s.close()
		w.until("settled", 2*time.Minute, func() bool { return settled(w.authority(old)) })
		logged(missing, 3)
		logged(over, 3)
		logged("X.509-SVID not renewed", 0)
	})
}

// A server may have no entries for a new node at first. Until it has some, or has had
// none for three minutes, no caller is denied.
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

// A workload with one SVID held and five that cannot be minted gets the one soon, even in
// an outage. The SVID stays held above the limit.
func TestDrillHeldSVIDsAreServedInAnOutage(t *testing.T) {
	inWorld(t, 10, func(w *world) { w.cfg.CacheSize = 2 }, func(w *world) {
		w.until("two held", time.Minute, func() bool { return w.held() == 2 })
		s := w.open(0)
		w.until("answered", time.Minute, func() bool { _, ok := s.last(); return ok })
		w.set(func(f *faults) { f.down = true })
		other := w.open(9) // cannot be minted
		defer other.close()
		time.Sleep(30 * time.Second)
		s.close() // the workload restarts
		again := w.open(0, 1, 2, 3, 4, 5)
		defer again.close()
		w.until("the SVID held is served", 6*time.Second, func() bool { _, ok := again.last(); return ok })
	})
}
