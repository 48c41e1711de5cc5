package agent_test

import (
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	svidpb "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc/codes"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/metrics"
)

func TestDrillTaintDuringStart(t *testing.T) {
	var old keyset.Keyset
	inWorld(t, svids, func(w *world) {
		// The first SVIDs still come from the old keyset.
		old = w.activate()
		w.cfg.TrustBundle = w.trust()
		w.set(func(f *faults) { f.lag = w.record(old.ID) })
	}, func(w *world) {
		w.until("first SVIDs arrive", 20*time.Second, func() bool { return w.authority(old).Held > 0 })
		w.check(w.server.Keysets().Taint(w.t.Context(), old.ID))
		w.set(func(f *faults) { f.lag = nil })
		s := w.open(0)
		defer s.close()
		begins := w.waveBegins(old)
		waveFinished(w, old, begins, 3*time.Minute, []*stream{s})
		if w.held() != svids {
			w.t.Errorf("%d SVIDs held, want %d", w.held(), svids)
		}
	})
}

func TestDrillTwoTaints(t *testing.T) {
	inWorldWithStreams(t, nil, func(w *world, streams []*stream) {
		since := time.Now()
		first, _ := w.rotate()
		second, _ := w.rotate() // while the first wave waits or runs
		w.until("first settled", 5*time.Minute, func() bool { return settled(w.authority(first)) })
		waveFinished(w, second, since, 5*time.Minute, streams)
		if a := w.authority(first); !settled(a) {
			w.t.Errorf("the first authority is no longer settled: %+v", a)
		}
		if w.agent.TaintDelay(first.X509AuthorityID) == w.agent.TaintDelay(second.X509AuthorityID) {
			w.t.Error("two taints have the same delay")
		}
	})
}

func TestDrillTaintAndEntryChangeTogether(t *testing.T) {
	inWorldWithStreams(t, nil, func(w *world, streams []*stream) {
		old := w.activate()
		w.check(w.server.Keysets().Taint(w.t.Context(), old.ID))
		at := time.Now()
		changed := entriesFor(svids)
		for i := range changed[:10] {
			changed[i].DNSNames = []string{"changed.example.org"}
		}
		changed = append(changed, entryFor(svids))
		w.setEntries(changed)
		// Entry changes are minted at the next sync and not in the wave.
		time.Sleep(6 * time.Second)
		synctest.Wait()
		minted := map[string]bool{}
		for _, m := range w.mintsSince(at) {
			for _, id := range m.entries {
				minted[id] = true
			}
		}
		for _, i := range []int{0, 9, svids} {
			if !minted[entryID(i)] {
				w.t.Errorf("%s was changed and not minted at the next sync", entryID(i))
			}
		}
		w.waveBegins(old)
		w.until("settled", 3*time.Minute, func() bool { return settled(w.authority(old)) })
		for _, s := range streams {
			s.checkUnbroken()
		}
	})
}

func TestDrillEntryDeletedInMidWave(t *testing.T) {
	inWorldWithStreams(t, nil, func(w *world, streams []*stream) {
		old, begins := w.rotate()
		time.Sleep(time.Until(begins.Add(200 * time.Millisecond)))
		var left []spireapi.Entry
		for i := range svids {
			if i >= 5 && i < svids-20 {
				left = append(left, entryFor(i))
			}
		}
		w.setEntries(left)
		// A missing entry keeps its SVID, which depends on the authority, until it
		// counts as removed. So do its workloads, until they have ended.
		for _, s := range streams[:5] {
			<-s.done
			if !isCode(s.end, codes.PermissionDenied) {
				w.t.Errorf("the stream of a deleted entry ended with %v, want PermissionDenied", s.end)
			}
			s.close()
		}
		w.until("settled", 5*time.Minute, func() bool { return settled(w.authority(old)) })
		if w.held() != len(left) {
			w.t.Errorf("%d SVIDs held, want %d", w.held(), len(left))
		}
		for _, s := range streams[5:] {
			s.checkUnbroken()
		}
	})
}

// An SVID with 20 s left when the taint comes does not wait for delay or rate.
func TestDrillShortLifetimeLeftAtTheTaint(t *testing.T) {
	inWorldWithStreams(t, func(w *world) {
		w.cfg.TaintDelay = 24 * time.Hour // so that the random delay is longer than their lifetime
		entries := entriesFor(svids)
		for i := range entries {
			entries[i].X509TTL = time.Hour
		}
		w.setEntries(entries)
	}, func(w *world, streams []*stream) {
		last, _ := streams[0].last()
		old := w.activate()
		// The server's answers are unusable for almost all of their lifetime.
		w.set(func(f *faults) {
			f.garble = func(_ *svidpb.BatchNewX509SVIDRequest, res *svidpb.BatchNewX509SVIDResponse) *svidpb.BatchNewX509SVIDResponse {
				for i := range res.Results {
					res.Results[i] = &svidpb.BatchNewX509SVIDResponse_Result{}
				}
				return res
			}
		})
		time.Sleep(time.Until(last.expiry.Add(-26 * time.Second)))
		w.check(w.server.Keysets().Taint(w.t.Context(), old.ID))
		w.waveBegins(old)
		w.set(func(f *faults) { f.garble = nil })
		time.Sleep(time.Until(last.expiry.Add(-time.Second)))
		synctest.Wait()
		for _, s := range streams {
			s.checkUnbroken()
			if now, _ := s.last(); !now.expiry.After(last.expiry) {
				w.t.Fatal("an SVID with 20 s left was not renewed at once")
			}
		}
	})
}

func (w *world) stepClock(skew time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.skew = skew
}

func TestDrillClockStepped(t *testing.T) {
	wave := 2*time.Minute + svids*50*time.Millisecond // a step is detected within a minute
	t.Run("forward", func(t *testing.T) {
		inWorldWithStreams(t, nil, func(w *world, streams []*stream) {
			old, _ := w.rotate()
			since := time.Now()
			w.stepClock(time.Hour)
			waveFinished(w, old, since, wave, streams)
		})
	})
	// An hour behind, new SVIDs are not valid yet by this node's clock. The server's
	// clock counts, and the wave finishes.
	t.Run("back", func(t *testing.T) {
		inWorldWithStreams(t, nil, func(w *world, streams []*stream) {
			old, _ := w.rotate()
			since := time.Now()
			w.stepClock(-time.Hour)
			waveFinished(w, old, since, wave, streams)
		})
	})
	// The clock was ahead when the taint was seen and is then corrected. The delay can
	// no longer be measured, so the agent does not wait for it.
	t.Run("ahead and set right", func(t *testing.T) {
		inWorldWithStreams(t, func(w *world) { w.stepClock(30 * time.Minute) }, func(w *world, streams []*stream) {
			old, _ := w.rotate()
			since := time.Now()
			w.stepClock(0)
			waveFinished(w, old, since, wave, streams)
		})
	})
}

// After a restart in mid-wave only the rest is renewed, and no new token is needed.
func TestDrillRestartInMidWave(t *testing.T) {
	runtime, err := os.MkdirTemp("/dev/shm", "renewd-drill")
	if err != nil {
		t.Fatalf("this test needs the memory file system /dev/shm: %v", err)
	}
	defer os.RemoveAll(runtime)
	inWorldWithStreams(t, func(w *world) { w.cfg.RuntimeDir = runtime }, func(w *world, streams []*stream) {
		old, begins := w.rotate()
		time.Sleep(time.Until(begins.Add(5 * time.Second)))
		w.stopAgent()
		done := map[string]bool{}
		for _, m := range w.mintsSince(begins) {
			for _, id := range m.entries {
				done[id] = true
			}
		}
		for _, s := range streams {
			<-s.done
			if !isCode(s.end, codes.Unavailable) {
				w.t.Errorf("a stream ended with %v at the restart, want Unavailable", s.end)
			}
		}
		restarted := time.Now()
		w.set(func(f *faults) { f.down = true })
		w.startAgent()
		synctest.Wait()
		if err := w.fetchX509(3); err != nil {
			w.t.Errorf("restarted with the server down: %v, want the SVID held", err)
		}
		for _, s := range streams {
			defer s.conn.process.open().close()
		}
		w.set(func(f *faults) { f.down = false })
		again := w.waveBegins(old)
		if !again.Equal(begins) {
			w.t.Errorf("the wave begins at %v after the restart, it was %v: the delay has changed", again, begins)
		}
		w.until("settled", 5*time.Minute, func() bool { return settled(w.authority(old)) })
		// Unknown workloads may still reconnect.
		if after := time.Since(restarted); after < cache.ReconnectGrace {
			w.t.Errorf("settled %v after the restart, want at least the time for workloads to reconnect", after)
		}
		repeated := 0
		for _, m := range w.mintsSince(restarted) {
			for _, id := range m.entries {
				if done[id] {
					repeated++
				}
			}
		}
		// An SVID in flight at the stop, and one that had just arrived and was not
		// stored yet, may be requested again.
		if repeated > 2 || len(done) < 80 {
			w.t.Errorf("%d of %d SVIDs that were renewed before the restart were renewed again", repeated, len(done))
		}
		w.checkRate(w.mintsSince(begins))
	})
}

func TestDrillJWT(t *testing.T) {
	inWorld(t, 1, func(w *world) {
		e := entryFor(0)
		e.JWTTTL = 2 * time.Hour
		w.setEntries([]spireapi.Entry{e})
	}, func(w *world) {
		w.waitHeld(1)
		fetch := func() string {
			w.t.Helper()
			token, err := w.fetchJWT(0)
			w.check(err)
			return token
		}
		first := fetch()
		old, begins := w.rotate()
		time.Sleep(time.Until(begins.Add(time.Minute)))
		if fetch() != first {
			w.t.Error("the JWT-SVID changed with the taint")
		}
		expiry := w.agent.State().JWTExpiry[old.JWTKeyID]
		if left := time.Until(expiry); left < 115*time.Minute || left > 2*time.Hour {
			w.t.Errorf("latest expiry of the tainted JWT key is in %v, want just under 2 h", left)
		}
		w.set(func(f *faults) { f.down = true })
		time.Sleep(70 * time.Minute) // past half of its lifetime, server down
		if fetch() != first {
			w.t.Error("with the server down a valid token was not served")
		}
		w.set(func(f *faults) { f.down = false })
		time.Sleep(20 * time.Second)
		fetch() // starts a refresh behind the answer
		time.Sleep(time.Second)
		second := fetch()
		if second == first {
			w.t.Error("past half of its lifetime the token was not replaced")
		}
		if at := w.agent.State().JWTExpiry[old.JWTKeyID]; !at.Equal(expiry) {
			w.t.Errorf("latest expiry of the tainted JWT key moved to %v", at)
		}
		w.check(w.server.Keysets().Remove(w.t.Context(), old.ID))
		time.Sleep(10 * time.Second)
		if fetch() != second {
			w.t.Error("a token was dropped though its key is still in the bundle")
		}
		if _, known := w.agent.State().JWTExpiry[old.JWTKeyID]; known {
			w.t.Error("a removed JWT key is still reported")
		}

		// Removal of the key that signed the token held drops it at once.
		current, _ := w.rotate()
		w.until("settled", 5*time.Minute, func() bool { return settled(w.authority(current)) })
		if fetch() != second {
			w.t.Error("the JWT-SVID changed with the second taint")
		}
		w.check(w.server.Keysets().Remove(w.t.Context(), current.ID))
		time.Sleep(10 * time.Second)
		third := fetch()
		if third == second {
			w.t.Error("a token is served whose key has left the bundle")
		}
		time.Sleep(2*time.Hour + time.Second)
		if fetch() == third {
			w.t.Error("an expired token is served")
		}
	})
}

// One stream with 1,000 identities, whose answers are larger than gRPC clients accept by
// default.
func TestDrillOneStreamHoldsAll(t *testing.T) {
	const n = 1000
	var log strings.Builder
	inWorld(t, n, func(w *world) {
		w.cfg.Log, w.cfg.TaintRate = syncedLog(&log), 80 // to save time: building an answer costs in proportion to its SVIDs
		entries := entriesFor(n)
		for i := range entries {
			entries[i].Selectors = []spireapi.Selector{{Type: "test", Value: "all"}}
			entries[i].SPIFFEID = longID(i) // 4.5 KB and more for each identity
		}
		w.setEntries(entries)
	}, func(w *world) {
		w.waitHeld(n)
		s := w.openAs("all")
		defer s.close()
		w.until("first answer", 10*time.Second, func() bool { _, ok := s.last(); return ok })
		old, begins := w.rotate()
		w.until("settled", 3*time.Minute, func() bool { return settled(w.authority(old)) })
		s.checkUnbroken()
		wave := 0
		for i, u := range s.updates {
			if u.identities != n {
				w.t.Fatalf("push %d has %d identities, want the full set of %d", i, u.identities, n)
			}
			if i > 0 && u.at.Sub(s.updates[i-1].at) < 250*time.Millisecond {
				w.t.Fatalf("two pushes within %v", u.at.Sub(s.updates[i-1].at))
			}
			if !u.at.Before(begins) {
				wave++
			}
		}
		// 1,000 SVIDs at 80 a second take 12.5 s, at four pushes a second.
		if wave < 38 || wave > 55 {
			w.t.Errorf("%d pushes in the wave, want about 50", wave)
		}
		if last := s.updates[len(s.updates)-1]; slices.Contains(last.authorities, old.X509AuthorityID) {
			w.t.Error("the last state was not delivered")
		}
		for _, want := range []string{"larger than gRPC clients accept", "test:all"} {
			if n := strings.Count(log.String(), want); n != 1 {
				w.t.Errorf("%q is logged %d times, want once", want, n)
			}
		}
		if w.counter("renewd_oversize_answers_total") < float64(wave) {
			w.t.Error("answers above 4 MiB are not counted")
		}
	})
}

// A caller above the cache's limit is served, too.
func TestDrillMoreEntriesThanTheCacheHolds(t *testing.T) {
	inWorld(t, 50, func(w *world) { w.cfg.CacheSize = 10 }, func(w *world) {
		w.waitHeld(10)
		var streams []*stream
		for i := 20; i < 50; i++ {
			s := w.open(i)
			defer s.close()
			streams = append(streams, s)
		}
		synctest.Wait()
		time.Sleep(time.Second)
		for _, s := range streams {
			s.checkUnbroken()
		}
		old, _ := w.rotate()
		waveFinished(w, old, time.Now(), 3*time.Minute, streams)
		if w.held() != 30 {
			w.t.Errorf("%d SVIDs held, want the 30 with a stream", w.held())
		}
		if a, _ := authorityOf(w.agent.State(), metrics.TypeX509, old.X509AuthorityID); a.Held != 0 {
			w.t.Errorf("%d SVIDs of the tainted authority are held", a.Held)
		}
	})
}
