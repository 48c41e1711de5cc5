package agent_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// inTranscript runs f in a world of n entries. Their SVIDs expire a minute apart: of
// twelve the order is 0, 5, 10, 3, 8, 1, 6, 11, 4, 9, 2, 7. The workloads 1, 4 and 10 have
// open streams. The transcript is compared even if f fails; about is its first sentence.
func inTranscript(t *testing.T, name, about string, n int, configure func(*world), f func(w *world, tr *transcript, streams []*stream)) {
	var tr *transcript
	inWorldWithRuntimeDir(t, 0, func(w *world) {
		w.setEntries(transcriptEntries(n))
		if configure != nil {
			configure(w)
		}
		tr = transcribe(w)
	}, func(w *world) {
		w.waitHeld(n)
		var streams []*stream
		for _, i := range []int{1, 4, 10} {
			s := tr.open(i)
			defer s.close()
			streams = append(streams, s)
		}
		time.Sleep(time.Second)
		defer func() {
			tr.compare(name, fmt.Sprintf("%s\n%d SVIDs. Workloads 1, 4 and 10 have open streams.\n", about, n))
		}()
		f(w, tr, streams)
	})
}

func transcriptEntries(n int) []spireapi.Entry {
	entries := entriesFor(n)
	for i := range entries {
		entries[i*5%n].X509TTL = 6*time.Hour + time.Duration(i)*time.Minute
	}
	return entries
}

func checkUnbroken(streams ...*stream) {
	for _, s := range streams {
		s.w.t.Helper()
		s.checkUnbroken()
	}
}

// The agent SVID goes first, then the SVIDs with streams, then the soonest to expire.
func TestTranscriptWave(t *testing.T) {
	inTranscript(t, "wave", "A taint wave.", 24, nil, func(w *world, tr *transcript, streams []*stream) {
		time.Sleep(cache.ReconnectGrace) // workloads of an earlier run could reconnect
		tr.beginRotation()
		tr.pass(time.Second)
		tr.figures()
		tr.untilSettled(time.Minute)
		tr.asked()
		w.checkRate(w.mintsSince(tr.from()))
		w.check(w.server.Keysets().Remove(w.t.Context(), tr.tainted.ID))
		tr.begin("The agent reads that the authority is removed.", "x509 authority removed", exact, 10*time.Second)
		tr.pass(20 * time.Second)
		tr.asked()
		checkUnbroken(streams...)
	})
}

// A wave that an outage interrupts goes on at its rate.
func TestTranscriptOutage(t *testing.T) {
	inTranscript(t, "outage", "An outage of the server, which begins half a second after the first renewal.", 56, nil, func(w *world, tr *transcript, streams []*stream) {
		time.Sleep(cache.ReconnectGrace)
		tr.beginRotation()
		tr.pass(transcriptDelay + 520*time.Millisecond)
		tr.beginNow("The server is down for ten minutes. The pauses between probes are random.", random)
		w.set(func(f *faults) { f.down = true })
		tr.pass(10 * time.Minute)
		tr.figures()
		tr.probes()
		w.set(func(f *faults) { f.down = false })
		// Which SVIDs were probed last and wait for a pause is random.
		tr.beginUnnamed("The server answers again. The rest is renewed.", "server recovered, renewals resumed", 15*time.Second)
		tr.untilSettled(time.Minute)
		tr.asked()
		w.checkRate(w.mintsSince(tr.sections[0].from))
		checkUnbroken(streams...)
	})
}

// SVIDs that the tainted authority signs again are used only if they are no worse than
// those held, and are replaced after pauses that grow.
func TestTranscriptLag(t *testing.T) {
	inTranscript(t, "lag", "A replica lags: it signs with the tainted authority. What it signs for workload 1\n"+
		"expires sooner than the SVID held, and for the others later.", 18, nil, func(w *world, tr *transcript, streams []*stream) {
		time.Sleep(cache.ReconnectGrace)
		w.set(func(f *faults) {
			f.lag = w.record(tr.tainted.ID)
			f.life = func(entry string) time.Duration {
				if entry == entryID(1) {
					return 2 * time.Hour
				}
				return 0
			}
		})
		tr.beginRotation()
		tr.pass(transcriptDelay + 940*time.Millisecond)
		tr.beginNow("The replica lags for four more minutes. The pauses between attempts are random.", random)
		tr.pass(4 * time.Minute)
		if settled(w.authority(tr.tainted)) {
			w.t.Error("settled while the server still signs with the tainted authority")
		}
		tr.attempts(5)
		tr.beginNow("The replica has caught up. Each SVID is renewed after its pause.", paused)
		w.set(func(f *faults) { *f = faults{} })
		tr.untilSettled(paused - time.Second)
		checkUnbroken(streams...)
	})
}

// A restarted agent renews the rest.
func TestTranscriptRestart(t *testing.T) {
	inTranscript(t, "restart", "A restart of the agent with its runtime_dir, half a second after the first renewal.", 24, nil, func(w *world, tr *transcript, streams []*stream) {
		tr.beginRotation()
		tr.pass(transcriptDelay + 520*time.Millisecond)
		w.stopAgent()
		for _, s := range streams {
			<-s.done
		}
		w.startAgent()
		tr.pass(transcriptDelay + 620*time.Millisecond)
		for _, s := range streams {
			again := s.conn.process.open()
			defer again.close()
			tr.streams = append(tr.streams, again)
		}
		tr.figures()
		tr.untilSettled(2 * cache.ReconnectGrace)
		tr.asked()
		w.checkRate(w.mintsSince(tr.sections[0].from))
		checkUnbroken(tr.streams[len(streams):]...)
	})
}

// What depends on a removed authority is renewed at once, without delay and rate.
func TestTranscriptRemovedEarly(t *testing.T) {
	inTranscript(t, "removed-early", "The tainted authority is removed before it is settled. The rate of the wave is 1 a second.", 24, func(w *world) {
		// The removal is read between two renewals.
		w.cfg.TaintRate, w.cfg.RefreshInterval = 1, 200*time.Millisecond
	}, func(w *world, tr *transcript, streams []*stream) {
		tr.beginRotation()
		tr.pass(transcriptDelay + 1300*time.Millisecond)
		w.check(w.server.Keysets().Remove(w.t.Context(), tr.tainted.ID))
		tr.begin("The agent reads that the authority is removed.", messageRemovedEarly, exact, time.Second)
		tr.pass(20 * time.Second)
		checkUnbroken(streams...)
	})
}

// An edit applies at once, and a removal after a delay that depends on how much is missing.
func TestTranscriptEntries(t *testing.T) {
	inTranscript(t, "entries", "Entries are edited and deleted.", 12, nil, func(w *world, tr *transcript, streams []*stream) {
		time.Sleep(3 * time.Minute) // until the server's list counts as complete after the attestation
		entries := transcriptEntries(12)
		for i := 4; i < 6; i++ {
			entries[i].DNSNames = []string{"web.example.org"}
		}
		tr.beginNow("Two entries are edited.", polled)
		w.setEntries(entries)
		tr.pass(9 * time.Second)

		without := func(indexes ...int) (left []spireapi.Entry) {
			for i, e := range entries {
				if !slices.Contains(indexes, i) {
					left = append(left, e)
				}
			}
			return left
		}
		w.setEntries(without(4, 5))
		tr.begin("Two entries are deleted.", messageMissing, polled, 10*time.Second)
		tr.pass(39 * time.Second)

		w.setEntries(without(4, 5, 10))
		tr.begin("One entry is deleted and, after twelve seconds, created again.", messageMissing, polled, 10*time.Second)
		tr.pass(12 * time.Second)
		w.setEntries(without(4, 5))
		tr.pass(39 * time.Second)

		w.setEntries(entries[:3])
		tr.begin("More than half of the entries are deleted.", messageMissing, polled, 10*time.Second)
		tr.pass(199 * time.Second)
		checkUnbroken(streams[0])
	})
}
