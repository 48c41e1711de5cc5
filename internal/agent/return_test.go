package agent_test

import (
	"os"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	"github.com/renewd/renewd/internal/server/spireapi"
)

// inWorldWithRuntimeDir is inWorld with a runtime_dir.
func inWorldWithRuntimeDir(t *testing.T, n int, configure func(*world), f func(*world)) {
	runtime, err := os.MkdirTemp("/dev/shm", "renewd-drill")
	if err != nil {
		t.Fatalf("this test needs the memory file system /dev/shm: %v", err)
	}
	defer os.RemoveAll(runtime)
	inWorld(t, n, func(w *world) {
		w.cfg.RuntimeDir = runtime
		if configure != nil {
			configure(w)
		}
	}, f)
}

// A restarted agent does not know of entries that were created while it was stopped. Until
// the first sync it denies no caller.
func TestDrillRestartWithUnknownEntries(t *testing.T) {
	inWorldWithRuntimeDir(t, 3, nil, func(w *world) {
		w.waitHeld(3)
		w.stopAgent()
		w.setEntries(entriesFor(4))
		w.set(func(f *faults) { f.down = true })
		w.startAgent()
		time.Sleep(time.Second)
		for range 2 {
			if err := w.fetchX509(1); err != nil {
				w.t.Errorf("a caller whose SVID was stored: %v", err)
			}
			if err := w.fetchX509(3); !isCode(err, codes.Unavailable) {
				w.t.Errorf("a caller whose entry was created while the agent was stopped: %v, want Unavailable", err)
			}
			time.Sleep(time.Hour)
		}
		w.set(func(f *faults) { f.down = false })
		time.Sleep(15 * time.Second)
		if err := w.fetchX509(3); err != nil {
			w.t.Errorf("after the server was back: %v", err)
		}
		if err := w.fetchX509(99); !isCode(err, codes.PermissionDenied) {
			w.t.Errorf("a caller that no entry matches: %v, want PermissionDenied", err)
		}
	})
}

// A restart loses no SVIDs of open streams, even if those are more than the cache's limit,
// with the server up or down.
func TestDrillRestartWithMoreStreamsThanTheCacheHolds(t *testing.T) {
	const n, limit = 20, 5
	inWorldWithRuntimeDir(t, n, func(w *world) { w.cfg.CacheSize = limit }, func(w *world) {
		openAll := func() (streams []*stream) {
			for i := range n {
				streams = append(streams, w.open(i))
			}
			return streams
		}
		answered := func(streams []*stream) (n int) {
			for _, s := range streams {
				if _, ok := s.last(); ok {
					n++
				}
			}
			return n
		}
		before := openAll()
		w.until("all streams answered", time.Minute, func() bool { return answered(before) == n })
		w.stopAgent()
		for _, s := range before {
			s.close()
		}
		w.set(func(f *faults) { f.down = true })
		w.startAgent()
		time.Sleep(144 * time.Second) // the longest pause of a client: see reconnectGrace
		after := openAll()
		time.Sleep(10 * time.Second)
		if got := answered(after); got != n {
			w.t.Errorf("%d of %d streams got the SVIDs held before the restart", got, n)
		}
		time.Sleep(10 * time.Minute)
		for _, s := range after {
			s.checkUnbroken()
			s.close()
		}
		time.Sleep(time.Minute)
		for i := range n {
			if err := w.fetchX509(i); err != nil {
				w.t.Errorf("workload %d restarts in the outage: %v", i, err)
			}
		}
		// SVIDs are evicted only after others were minted.
		w.set(func(f *faults) { f.down = false })
		time.Sleep(2 * time.Minute)
		changed := entriesFor(n)
		changed[0].DNSNames = []string{"changed.example.org"}
		w.setEntries(changed)
		time.Sleep(10 * time.Second)
		if w.held() != n {
			w.t.Errorf("%d SVIDs held two minutes after the server is back, want all of %d: clients may still reconnect", w.held(), n)
		}
		time.Sleep(time.Minute)
		changed[0].DNSNames = []string{"again.example.org"}
		w.setEntries(changed)
		w.until("the limit holds again", 10*time.Second, func() bool { return w.held() == limit })
	})
}

// A workload that reconnects in an outage gets the SVIDs held, even if it also matches a
// new entry for which nothing was minted.
func TestDrillNewEntryDuringAnOutage(t *testing.T) {
	inWorld(t, 2, nil, func(w *world) {
		w.waitHeld(2)
		w.set(func(f *faults) { f.signing = time.Hour }) // hangs
		w.setEntries(entriesFor(3))
		time.Sleep(10 * time.Second) // the agent has the entry
		w.set(func(f *faults) { f.down = true })
		s := w.open(1, 2)
		defer s.close()
		w.until("the SVID held is served", 10*time.Second, func() bool { _, ok := s.last(); return ok })
		w.set(func(f *faults) { *f = faults{} })
		w.until("the new entry is served", time.Minute, func() bool { u, _ := s.last(); return u.identities == 2 })
		s.checkUnbroken()
	})
}

// A node that was stopped from before a taint until after the removal has an agent SVID
// that no server accepts. The agent detects that, sends its workloads the current bundle,
// and attests with a new token.
func TestDrillStoppedUntilTheAuthorityIsRemoved(t *testing.T) {
	var token string
	inWorld(t, 3, func(w *world) {
		token = w.cfg.DataDir + "-token"
		w.check(os.WriteFile(token, []byte(w.cfg.JoinToken), 0o600))
		w.cfg.JoinToken, w.cfg.JoinTokenFile = "", token
	}, func(w *world) {
		defer os.Remove(token)
		w.unchecked = true
		w.waitHeld(3)
		s := w.open(1)
		defer s.close()
		old := w.activate()
		w.set(func(f *faults) { f.down = true })
		w.check(w.server.Keysets().Taint(w.t.Context(), old.ID))
		w.check(w.server.Keysets().Remove(w.t.Context(), old.ID))
		w.set(func(f *faults) { f.down = false })
		w.until("the removal is seen", 30*time.Second, func() bool { return w.authority(old).State == "removed" })
		fresh, err := w.server.CreateJoinToken(w.t.Context(), time.Hour, "")
		w.check(err)
		w.check(os.WriteFile(token, []byte(fresh.Value), 0o600))
		w.until("everything is renewed", time.Minute, func() bool { a := w.authority(old); return a.Held+a.Pending == 0 && w.held() == 3 })
		w.until("the stream has the replacement", 10*time.Second, func() bool {
			u, ok := s.last()
			return ok && len(u.authorities) == 1 && u.authorities[0] != old.X509AuthorityID
		})
	})
}

// The agent SVID may expire before those of the workloads. When it has expired in an
// outage, a restarted agent still serves the stored SVIDs. It trusts the server by what the
// operator configures, as at any attestation.
func TestDrillRestartAfterTheAgentSVIDHasExpired(t *testing.T) {
	// Rare polls: the test runs for two days.
	inWorldWithRuntimeDir(t, 0, func(w *world) { w.cfg.RefreshInterval = time.Minute }, func(w *world) {
		e := entryFor(0)
		e.X509TTL = 72 * time.Hour
		w.setEntries([]spireapi.Entry{e})
		w.waitHeld(1)
		w.set(func(f *faults) { f.down = true })
		time.Sleep(30 * time.Hour)
		if w.now().Before(w.agent.State().OwnExpiry) {
			w.t.Fatal("the agent SVID has not expired yet")
		}
		w.stopAgent()
		w.startAgent()
		time.Sleep(time.Second)
		if err := w.fetchX509(0); err != nil {
			w.t.Errorf("during the outage: %v, want the SVID held", err)
		}
		if err := w.fetchX509(1); !isCode(err, codes.Unavailable) {
			w.t.Errorf("another caller during the outage: %v, want Unavailable", err)
		}
		w.stopAgent()
		token, err := w.server.CreateJoinToken(w.t.Context(), time.Hour, "")
		w.check(err)
		w.cfg.JoinToken = token.Value
		w.startAgent()
		s := w.open(0)
		defer s.close()
		w.set(func(f *faults) { f.down = false })
		w.until("attested", 5*time.Minute, func() bool { return isCode(w.fetchX509(1), codes.PermissionDenied) })
		time.Sleep(10 * time.Hour) // past half of the lifetime
		s.checkUnbroken()
	})
}

// A banned node serves nothing, also after a restart.
func TestDrillRestartAfterABan(t *testing.T) {
	inWorldWithRuntimeDir(t, 1, nil, func(w *world) {
		w.waitHeld(1)
		w.check(w.server.BanAgent(w.t.Context(), spiffeid.RequireFromString(w.agent.State().OwnID)))
		time.Sleep(20 * time.Second) // it stops
		w.stopAgent = sync.OnceFunc(func() {})
		w.startAgent()
		time.Sleep(time.Second)
		if err := w.fetchX509(0); !isCode(err, codes.Unavailable) {
			w.t.Errorf("got %v, want Unavailable", err)
		}
	})
}

// Deleted entries are removed although the clock was ahead at the attestation and was
// corrected afterwards.
func TestDrillClockSetBackAfterTheAttestation(t *testing.T) {
	inWorld(t, 3, func(w *world) { w.skew = 30 * time.Minute }, func(w *world) {
		w.waitHeld(3)
		w.mu.Lock()
		w.skew = 0
		w.mu.Unlock()
		time.Sleep(20 * time.Second)
		w.setEntries(entriesFor(2))
		w.until("the deleted entry is gone", 4*time.Minute, func() bool { return w.held() == 2 })
	})
}

// An answer in flight when the taint was seen counts as pending, also when the clock was
// set back in between.
func TestSafeWaitsForAnswersInFlightOverAClockStep(t *testing.T) {
	inWorld(t, 1, func(w *world) { w.cfg.TaintDelay = 1000 * time.Hour }, func(w *world) {
		w.waitHeld(1)
		old := w.activate()
		w.setEntries(nil)
		w.until("nothing held", 4*time.Minute, func() bool { return w.held() == 0 })
		lagging := w.record(old.ID)
		w.set(func(f *faults) { f.lag, f.signing = lagging, 20*time.Second })
		asked := time.Now()
		w.setEntries(entriesFor(1))
		w.until("SVID asked for", 10*time.Second, func() bool { return len(w.mintsSince(asked)) > 0 })
		w.stepClock(-10 * time.Minute)
		w.check(w.server.Keysets().Taint(w.t.Context(), old.ID))
		w.waveBegins(old)
		if a := w.authority(old); a.Held != 0 || a.Pending != 2 {
			w.t.Errorf("with an answer in flight: %+v, want the agent SVID and the answer pending", a)
		}
	})
}
