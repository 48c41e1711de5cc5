package agent_test

import (
	"slices"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/server/spireapi"
)

// All entries are edited. If an edit changes nothing in the SVID, the server signs nothing
// and the streams get no answer; otherwise the agent mints at once.
func TestDrillEditThatChangesNoSVID(t *testing.T) {
	const entries = 30
	inWorld(t, entries, nil, func(w *world) {
		w.waitHeld(entries)
		s := w.open(0)
		defer s.close()
		w.until("first answer", time.Second, func() bool { _, ok := s.last(); return ok })
		edit := func(change func(*spireapi.Entry)) {
			w.t.Helper()
			all := entriesFor(entries)
			for i := range all {
				change(&all[i])
			}
			w.setEntries(all)
		}
		for name, change := range map[string]func(*spireapi.Entry){
			"hint":                  func(e *spireapi.Entry) { e.Hint = "h" },
			"JWT TTL":               func(e *spireapi.Entry) { e.JWTTTL = time.Minute },
			"jti":                   func(e *spireapi.Entry) { e.JWTSVIDIncludeJTI = true },
			"no prefetch and back":  func(e *spireapi.Entry) { e.DisableX509SVIDPrefetch = true },
			"selectors given twice": func(e *spireapi.Entry) { e.Selectors = slices.Concat(e.Selectors, e.Selectors) },
		} {
			at := time.Now()
			edit(change)
			time.Sleep(20 * time.Second)
			edit(func(*spireapi.Entry) {})
			time.Sleep(20 * time.Second)
			if got := w.mintsSince(at); len(got) > 0 {
				w.t.Errorf("%s: the server signed %v", name, got)
			}
		}
		at := time.Now()
		edit(func(e *spireapi.Entry) { e.X509TTL = 2 * time.Hour })
		time.Sleep(20 * time.Second)
		n := 0
		for _, m := range w.mintsSince(at) {
			n += len(m.entries)
		}
		if n != entries {
			w.t.Errorf("%d minted after a change of the lifetime, want %d", n, entries)
		}
		s.checkUnbroken()
	})
}

// Both attributes: an entry with disabled prefetch is minted when a stream opens, and each
// call gets another token.
func TestDrillAttributes(t *testing.T) {
	const entries = 5
	inWorld(t, entries, func(w *world) {
		e := entryFor(0)
		e.DisableX509SVIDPrefetch, e.JWTSVIDIncludeJTI = true, true
		_, err := w.server.UpsertEntry(w.t.Context(), e)
		w.check(err)
	}, func(w *world) {
		w.waitHeld(entries - 1)
		for _, m := range w.mintsSince(time.Time{}) {
			if slices.Contains(m.entries, entryID(0)) {
				w.t.Error("minted without a stream")
			}
		}
		first, err := w.fetchJWT(0)
		w.check(err)
		second, err := w.fetchJWT(0)
		w.check(err)
		if first == second {
			w.t.Error("two calls got the same token")
		}
		at := time.Now()
		s := w.open(0)
		defer s.close()
		w.until("the answer", 5*time.Second, func() bool { _, ok := s.last(); return ok })
		if got := w.mintsSince(at); len(got) != 1 || !slices.Equal(got[0].entries, []string{entryID(0)}) {
			w.t.Errorf("the server signed %v, want %s once", got, entryID(0))
		}
	})
}
