package agent_test

import (
	"os"
	"slices"
	"testing"
	"time"
)

// The DNS names of an entry change repeatedly. Each time its stream gets an X.509-SVID
// with the new names after the next sync, and no other SVID is minted. A restarted agent
// serves the stored names first and the changed ones after the first sync.
func TestDrillDNSNamesChange(t *testing.T) {
	runtime, err := os.MkdirTemp("/dev/shm", "renewd-drill")
	if err != nil {
		t.Fatalf("this test needs the memory file system /dev/shm: %v", err)
	}
	defer os.RemoveAll(runtime)
	const entries = 20
	first := []string{"web.example.org", "*.apps.example.org"}
	inWorld(t, entries, func(w *world) {
		w.cfg.RuntimeDir = runtime
		w.nameEntry(first)
	}, func(w *world) {
		w.waitHeld(entries)
		s, other := w.open(0), w.open(1)
		defer s.close()
		defer other.close()
		w.until("first answer", time.Second, func() bool { return s.has(first) && other.has(nil) })
		for _, names := range [][]string{{"web.example.org"}, nil, {"b.example.org", "a.example.org"}, {"a.example.org", "b.example.org"}} {
			at := time.Now()
			w.nameEntry(names)
			// The agent syncs every 5 s ±10 %.
			w.until("the stream has the new names", 5500*time.Millisecond, func() bool { return s.has(names) })
			time.Sleep(20 * time.Second)
			if got := w.mintsSince(at); len(got) != 1 || !slices.Equal(got[0].entries, []string{entryID(0)}) {
				w.t.Errorf("%q: the server signed %v, want %s once", names, got, entryID(0))
			}
		}
		s.checkUnbroken()
		other.checkUnbroken()
		if len(s.updates) != 5 || len(other.updates) != 1 {
			w.t.Errorf("the streams had %d and %d answers, want 5 and 1", len(s.updates), len(other.updates))
		}

		w.stopAgent()
		w.nameEntry(first)
		w.set(func(f *faults) { f.down = true })
		w.startAgent()
		again := w.open(0)
		defer again.close()
		w.until("the names from before the restart", 10*time.Second, func() bool { return again.has([]string{"a.example.org", "b.example.org"}) })
		w.set(func(f *faults) { f.down = false })
		w.until("the names that changed meanwhile", 15*time.Second, func() bool { return again.has(first) })
		again.checkUnbroken()
	})
}

// nameEntry sets the DNS names of the first entry.
func (w *world) nameEntry(names []string) {
	w.t.Helper()
	e := entryFor(0)
	e.DNSNames = names
	_, err := w.server.UpsertEntry(w.t.Context(), e)
	w.check(err)
}

// has reports whether the last answer's SVID has exactly these DNS names.
func (s *stream) has(names []string) bool {
	last, ok := s.last()
	return ok && slices.Equal(last.names, names)
}
