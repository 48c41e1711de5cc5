package agent_test

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// The whole rotation on one node with 1,000 SVIDs and 100 streams.
func TestDrillRotation(t *testing.T) {
	const svids, open = 1000, 100
	inWorld(t, svids, nil, func(w *world) {
		w.waitHeld(svids)
		var streams []*stream
		for i := range open {
			s := w.open(i * 7) // spread over the entries
			defer s.close()
			streams = append(streams, s)
		}
		old, begins := w.rotate()
		tainted := time.Now()
		if a := w.authority(old); time.Now().Before(begins) && (settled(a) || a.Held != svids || a.Streams != open || a.Pending != svids+1) {
			w.t.Errorf("right after the taint: %+v, want all SVIDs held and pending with the node's own, and every stream on it", a)
		}
		if n := w.gauge("renewd_svids", "stale"); time.Now().Before(begins) && n != svids {
			w.t.Errorf("right after the taint %v SVIDs are stale, want all", n)
		}
		w.until("settled", 10*time.Minute, func() bool { return settled(w.authority(old)) })
		if n := w.gauge("renewd_svids", "fresh"); n != svids {
			w.t.Errorf("after the wave %v SVIDs are fresh, want all", n)
		}

		mints := w.mintsSince(tainted)
		if len(mints) != svids+1 {
			w.t.Fatalf("%d signatures, want one for each SVID and one for the node", len(mints))
		}
		if mints[0].entries != nil {
			w.t.Errorf("the first renewal is of %v, want the agent SVID", mints[0].entries)
		}
		if mints[0].at.Before(begins) {
			w.t.Errorf("the wave began %v before the delay was over", begins.Sub(mints[0].at))
		}
		if last := mints[len(mints)-1].at; last.After(begins.Add(svids*time.Second/20 + time.Second)) {
			w.t.Errorf("the last renewal began %v after the delay, want at most N/20 s + 1 s", last.Sub(begins))
		}
		w.checkRate(mints)
		streamed := make([]string, open)
		for i := range streamed {
			streamed[i] = entryID(i * 7)
		}
		for i, m := range mints[1:] {
			if len(m.entries) != 1 {
				w.t.Fatalf("renewal %d asks for %d SVIDs, want one by one", i, len(m.entries))
			}
			if slices.Contains(streamed, m.entries[0]) != (i < open) {
				w.t.Fatalf("renewal %d is %s: those with streams come first", i, m.entries[0])
			}
		}
		for _, s := range streams {
			s.checkUnbroken()
			if last, _ := s.last(); slices.Contains(last.authorities, old.X509AuthorityID) {
				w.t.Error("settled, and a stream has not got its replacement")
			}
		}
		w.check(w.server.Keysets().Remove(w.t.Context(), old.ID))
		time.Sleep(10 * time.Second)
		synctest.Wait()
		for _, s := range streams {
			s.checkUnbroken()
		}
		if extra := len(w.mintsSince(tainted)) - len(mints); extra != 0 {
			w.t.Errorf("%d renewals after the removal, want none", extra)
		}
	})
}

// An agent that starts with more SVIDs than the server signs for one node at once waits,
// and requests each once.
func TestDrillMoreThanTheServerSignsAtOnce(t *testing.T) {
	const svids = 3000
	inWorld(t, svids, nil, func(w *world) {
		begin := time.Now()
		w.waitHeld(svids)
		asked := 0
		for _, m := range w.mintsSince(begin) {
			asked += len(m.entries)
		}
		if asked != svids {
			w.t.Errorf("%d SVIDs were requested, want each of %d once", asked, svids)
		}
		// 500 at once, then 500 a second; waitHeld waits for one more second.
		if took := time.Since(begin); took < 6*time.Second || took > 10*time.Second {
			w.t.Errorf("it took %v", took)
		}
	})
}
