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

// keeping is inWorld with a runtime_dir.
func keeping(t *testing.T, n int, configure func(*world), f func(*world)) {
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

// What an agent holds from its last run says nothing about entries that it does
// not have: until the server has been asked, nobody is told that there is none.
func TestDrillRestartKnowsNotEveryEntry(t *testing.T) {
	keeping(t, 3, nil, func(w *world) {
		w.fill(3)
		w.stopAgent()
		w.enter(entriesFor(4))
		w.set(func(f *faults) { f.down = true })
		w.startAgent()
		time.Sleep(time.Second)
		for range 2 {
			if err := w.fetchX509(1); err != nil {
				w.t.Errorf("a caller whose SVID was kept: %v", err)
			}
			if err := w.fetchX509(3); !isCode(err, codes.Unavailable) {
				w.t.Errorf("a caller whose entry came while the agent was away: %v, want Unavailable", err)
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

// With more open streams than the cache holds for those without one, a restart
// loses none of them, server or not.
func TestDrillRestartWithMoreStreamsThanTheCacheHolds(t *testing.T) {
	const n, limit = 20, 5
	keeping(t, n, func(w *world) { w.cfg.CacheSize = limit }, func(w *world) {
		openAll := func() (streams []*stream) {
			for i := range n {
				streams = append(streams, w.open(i))
			}
			return streams
		}
		told := func(streams []*stream) (n int) {
			for _, s := range streams {
				if _, ok := s.last(); ok {
					n++
				}
			}
			return n
		}
		before := openAll()
		w.until("all streams told", time.Minute, func() bool { return told(before) == n })
		w.stopAgent()
		for _, s := range before {
			s.close()
		}
		w.set(func(f *faults) { f.down = true })
		w.startAgent()
		time.Sleep(144 * time.Second) // the longest pause of a client: see reconnectGrace
		after := openAll()
		time.Sleep(10 * time.Second)
		if got := told(after); got != n {
			w.t.Errorf("%d of %d streams got what was held before the restart", got, n)
		}
		time.Sleep(10 * time.Minute)
		for _, s := range after {
			s.unbroken()
			s.close()
		}
		time.Sleep(time.Minute)
		for i := range n {
			if err := w.fetchX509(i); err != nil {
				w.t.Errorf("workload %d is restarted in the outage: %v", i, err)
			}
		}
		// Evicted is what can be had again: when others were minted.
		w.set(func(f *faults) { f.down = false })
		time.Sleep(2 * time.Minute)
		changed := entriesFor(n)
		changed[0].DNSNames = []string{"changed.example.org"}
		w.enter(changed)
		time.Sleep(10 * time.Second)
		if w.held() != n {
			w.t.Errorf("%d SVIDs held two minutes after the server is back, want all of %d: clients may be on their way", w.held(), n)
		}
		time.Sleep(time.Minute)
		changed[0].DNSNames = []string{"again.example.org"}
		w.enter(changed)
		w.until("the limit holds again", 10*time.Second, func() bool { return w.held() == limit })
	})
}

// A workload that comes back during an outage gets the SVIDs that there are,
// also when another entry has come to match it that was never minted.
func TestDrillNewEntryDuringAnOutage(t *testing.T) {
	inWorld(t, 2, nil, func(w *world) {
		w.fill(2)
		w.set(func(f *faults) { f.signing = time.Hour }) // hangs
		w.enter(entriesFor(3))
		time.Sleep(10 * time.Second) // the entry is known
		w.set(func(f *faults) { f.down = true })
		s := w.open(1, 2)
		defer s.close()
		w.until("what is held is told", 10*time.Second, func() bool { _, ok := s.last(); return ok })
		w.set(func(f *faults) { *f = faults{} })
		w.until("the new entry is told", time.Minute, func() bool { u, _ := s.last(); return u.identities == 2 })
		s.unbroken()
	})
}

// A node that slept through taint and removal has an own SVID that no server
// accepts. It learns of that by itself, tells its workloads the bundle of now,
// and comes back with a new token.
func TestDrillAwayUntilTheAuthorityIsRemoved(t *testing.T) {
	var token string
	inWorld(t, 3, func(w *world) {
		token = w.cfg.DataDir + "-token"
		w.check(os.WriteFile(token, []byte(w.cfg.JoinToken), 0o600))
		w.cfg.JoinToken, w.cfg.JoinTokenFile = "", token
	}, func(w *world) {
		defer os.Remove(token)
		w.unchecked = true
		w.fill(3)
		s := w.open(1)
		defer s.close()
		old := w.activate()
		w.set(func(f *faults) { f.down = true })
		w.check(w.server.Keysets().Taint(w.t.Context(), old.ID))
		w.check(w.server.Keysets().Remove(w.t.Context(), old.ID))
		w.set(func(f *faults) { f.down = false })
		w.until("the removal is seen", 30*time.Second, func() bool { return w.authority(old).State == "removed" })
		fresh, err := w.server.CreateJoinToken(w.t.Context(), time.Hour)
		w.check(err)
		w.check(os.WriteFile(token, []byte(fresh.Value), 0o600))
		w.until("everything is renewed", time.Minute, func() bool { a := w.authority(old); return a.Held+a.Pending == 0 && w.held() == 3 })
		w.until("the stream is told", 10*time.Second, func() bool {
			u, ok := s.last()
			return ok && len(u.authorities) == 1 && u.authorities[0] != old.X509AuthorityID
		})
	})
}

// The own SVID may live shorter than those of the workloads. When it has ended
// in an outage, a restarted agent still serves what it held. The server is then
// trusted by what the operator gives, as at any new proof.
func TestDrillRestartAfterTheOwnSVIDHasEnded(t *testing.T) {
	// Two days of the usual polls are of no interest.
	keeping(t, 0, func(w *world) { w.cfg.RefreshInterval = time.Minute }, func(w *world) {
		e := entryFor(0)
		e.X509TTL = 72 * time.Hour
		w.enter([]spireapi.Entry{e})
		w.fill(1)
		w.set(func(f *faults) { f.down = true })
		time.Sleep(30 * time.Hour)
		if w.now().Before(w.agent.State().OwnExpiry) {
			w.t.Fatal("the own SVID has not ended yet")
		}
		w.stopAgent()
		w.startAgent()
		time.Sleep(time.Second)
		if err := w.fetchX509(0); err != nil {
			w.t.Errorf("during the outage: %v, want what was held", err)
		}
		if err := w.fetchX509(1); !isCode(err, codes.Unavailable) {
			w.t.Errorf("another caller during the outage: %v, want Unavailable", err)
		}
		w.stopAgent()
		token, err := w.server.CreateJoinToken(w.t.Context(), time.Hour)
		w.check(err)
		w.cfg.JoinToken = token.Value
		w.startAgent()
		s := w.open(0)
		defer s.close()
		w.set(func(f *faults) { f.down = false })
		w.until("proved anew", 5*time.Minute, func() bool { return isCode(w.fetchX509(1), codes.PermissionDenied) })
		time.Sleep(10 * time.Hour) // past the half-life
		s.unbroken()
	})
}

// A node that the server has banned serves nothing any more, also after a
// restart.
func TestDrillRestartAfterABan(t *testing.T) {
	keeping(t, 1, nil, func(w *world) {
		w.fill(1)
		w.check(w.server.BanAgent(w.t.Context(), spiffeid.RequireFromString(w.agent.State().OwnID)))
		time.Sleep(20 * time.Second) // it stops by itself
		w.stopAgent = sync.OnceFunc(func() {})
		w.startAgent()
		time.Sleep(time.Second)
		if err := w.fetchX509(0); !isCode(err, codes.Unavailable) {
			w.t.Errorf("got %v, want Unavailable", err)
		}
	})
}

// A clock that was ahead when the node was proved, and is set right afterwards,
// does not keep entries that are deleted.
func TestDrillClockSetBackAfterTheProof(t *testing.T) {
	inWorld(t, 3, func(w *world) { w.skew = 30 * time.Minute }, func(w *world) {
		w.fill(3)
		w.mu.Lock()
		w.skew = 0
		w.mu.Unlock()
		time.Sleep(20 * time.Second)
		w.enter(entriesFor(2))
		w.until("the deleted entry is gone", 4*time.Minute, func() bool { return w.held() == 2 })
	})
}

// An answer that was on its way when the taint was seen is waited for, also
// where the clock was set back in between.
func TestSafeWaitsForAnswersOnTheirWayOverAClockStep(t *testing.T) {
	inWorld(t, 1, func(w *world) { w.cfg.TaintDelay = 1000 * time.Hour }, func(w *world) {
		w.fill(1)
		old := w.activate()
		w.enter(nil)
		w.until("nothing held", 4*time.Minute, func() bool { return w.held() == 0 })
		lagging := w.record(old.ID)
		w.set(func(f *faults) { f.lag, f.signing = lagging, 20*time.Second })
		asked := time.Now()
		w.enter(entriesFor(1))
		w.until("SVID asked for", 10*time.Second, func() bool { return len(w.mintsSince(asked)) > 0 })
		w.stepClock(-10 * time.Minute)
		w.check(w.server.Keysets().Taint(w.t.Context(), old.ID))
		w.begins(old)
		if a := w.authority(old); a.Held != 0 || a.Pending != 2 {
			w.t.Errorf("with an answer on its way: %+v, want the node's own SVID and the answer pending", a)
		}
	})
}
