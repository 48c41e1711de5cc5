package agent_test

import (
	"context"
	"encoding/hex"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	svidpb "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/server/keyset"
)

// notSettled fails the test if k is settled within d.
func (w *world) notSettled(k keyset.Keyset, d time.Duration, why string) {
	w.t.Helper()
	for from := time.Now(); time.Since(from) < d; time.Sleep(100 * time.Millisecond) {
		synctest.Wait()
		if a := w.authority(k); settled(a) {
			w.t.Fatalf("settled after %v, %s: %+v", time.Since(from), why, a)
		}
	}
}

// taintedWhileAway gives a workload an SVID and taints its keyset while the agent is
// stopped. It returns both. The workload keeps its SVID.
func (w *world) taintedWhileAway() (*process, keyset.Keyset) {
	w.t.Helper()
	s := w.open(1)
	w.until("answered", time.Minute, func() bool { _, ok := s.last(); return ok })
	old := w.activate()
	w.stopAgent()
	s.leave()
	w.check(w.server.Keysets().Taint(w.t.Context(), old.ID))
	return s.conn.process, old
}

// Without runtime_dir the agent does not know the workloads from before a restart. It waits
// three minutes for them, from when it can answer.
func TestSettledWaitsForUnknownWorkloads(t *testing.T) {
	inWorld(t, 2, func(w *world) { w.cfg.TaintDelay = 0 }, func(w *world) {
		w.waitHeld(2)
		p, old := w.taintedWhileAway()
		w.set(func(f *faults) { f.down = true })
		w.startAgent()
		time.Sleep(10 * time.Minute)
		if err := w.fetchX509(1); !isCode(err, codes.Unavailable) {
			t.Fatalf("without a server: %v, want Unavailable", err)
		}
		w.set(func(f *faults) { f.down = false })
		w.notSettled(old, cache.ReconnectGrace-10*time.Second, "since the server is back: workloads may be on their way")
		// A workload that reconnects in time counts until it has its answer.
		w.attesting.Store(int64(30 * time.Second))
		s := p.open()
		defer s.close()
		w.notSettled(old, 25*time.Second, "while a workload that is back is being attested")
		w.until("settled", time.Minute, func() bool { return settled(w.authority(old)) })
	})
}

// Moving the identity file aside does not make a restart a first start.
func TestSettledWaitsAfterARestartWithoutAnIdentity(t *testing.T) {
	inWorld(t, 2, func(w *world) { w.cfg.TaintDelay = 0 }, func(w *world) {
		w.waitHeld(2)
		p, old := w.taintedWhileAway()
		defer p.kill()
		w.check(os.WriteFile(filepath.Join(w.cfg.DataDir, "identity.json"), []byte("{"), 0o600))
		token, err := w.server.CreateJoinToken(w.t.Context(), time.Hour, "")
		w.check(err)
		w.cfg.JoinToken, w.cfg.TrustBundle = token.Value, w.trust()
		w.startAgent()
		w.notSettled(old, cache.ReconnectGrace, "after a re-attestation")
		w.until("settled", time.Minute, func() bool { return settled(w.authority(old)) })
	})
}

// An attestation in flight may return an agent SVID of a key that was tainted meanwhile.
func TestSettledWaitsForAnAttestation(t *testing.T) {
	dir, err := os.MkdirTemp("", "renewd-token")
	if err != nil {
		t.Fatal(err)
	}
	token := filepath.Join(dir, "token")
	inWorld(t, 1, func(w *world) {
		w.cfg.TaintDelay = 0
		w.check(os.WriteFile(token, []byte(w.cfg.JoinToken), 0o600))
		w.cfg.JoinToken, w.cfg.JoinTokenFile = "", token
	}, func(w *world) {
		defer os.RemoveAll(dir)
		w.waitHeld(1)
		w.activate() // the keyset before has signed the agent SVID
		k := w.server.Keysets().Active()
		fresh, err := w.server.CreateJoinToken(w.t.Context(), time.Hour, "")
		w.check(err)
		w.check(os.WriteFile(token, []byte(fresh.Value), 0o600))
		before := w.agent.State().OwnID
		w.check(w.server.EvictAgent(w.t.Context(), spiffeid.RequireFromString(before), true))
		w.set(func(f *faults) { f.answer = 50 * time.Second })
		time.Sleep(15 * time.Second) // the attestation has begun
		w.activate()
		w.check(w.server.Keysets().Taint(w.t.Context(), k.ID))
		w.waveBegins(k)
		w.until("the agent SVID arrives", time.Minute, func() bool {
			if w.agent.State().OwnID != before {
				return true
			}
			if a := w.authority(k); settled(a) {
				w.t.Fatalf("settled while an attestation is in flight: %+v", a)
			}
			return false
		})
		w.set(func(f *faults) { f.answer = 0 })
		w.until("settled", 3*time.Minute, func() bool { return settled(w.authority(k)) })
	})
}

// An agent SVID on disk that could not be replaced counts for its authority, until it has
// expired.
func TestStoredAgentSVIDCountsByItsAuthority(t *testing.T) {
	inWorld(t, 1, func(w *world) { w.cfg.TaintDelay = 0 }, func(w *world) {
		w.waitHeld(1)
		first := w.activate()
		w.fillDisk()
		w.check(w.server.Keysets().Taint(w.t.Context(), first.ID))
		w.waveBegins(first)
		time.Sleep(20 * time.Second)
		w.notSettled(first, time.Minute, "with an agent SVID of it on disk")
		second := w.activate()
		w.check(w.server.Keysets().Taint(w.t.Context(), second.ID))
		w.waveBegins(second)
		w.notSettled(first, time.Minute, "with an agent SVID of it on disk")
		w.freeDisk()
		w.until("settled", 2*time.Minute, func() bool { return settled(w.authority(first)) && settled(w.authority(second)) })
	})
}

// A restart may find a workload's SVID in runtime_dir that could neither be replaced nor
// removed.
func TestSettledWaitsForRuntimeDir(t *testing.T) {
	inWorldWithRuntimeDir(t, 1, func(w *world) { w.cfg.TaintDelay = 0 }, func(w *world) {
		w.waitHeld(1)
		w.hideRuntimeDir()
		old, _ := w.rotate()
		w.until("SVID replaced", time.Minute, func() bool { return w.authority(old).Held == 0 })
		w.notSettled(old, time.Minute, "with an SVID of it in runtime_dir")
		w.showRuntimeDir()
		w.until("settled", time.Minute, func() bool { return settled(w.authority(old)) })
	})
}

// A workload whose entry is never signed has no SVID, so it does not count forever.
func TestUnsignedEntryDoesNotPreventSettled(t *testing.T) {
	inWorld(t, 2, func(w *world) { w.cfg.TaintDelay = 0 }, func(w *world) {
		w.waitHeld(2)
		w.set(func(f *faults) {
			f.garble = func(req *svidpb.BatchNewX509SVIDRequest, res *svidpb.BatchNewX509SVIDResponse) *svidpb.BatchNewX509SVIDResponse {
				for i, p := range req.Params {
					if p.EntryId == entryID(2) {
						res.Results[i].Svid = nil
						res.Results[i].Status.Code = int32(codes.Internal)
					}
				}
				return res
			}
		})
		w.setEntries(entriesFor(3))
		time.Sleep(10 * time.Second)
		s := w.open(2)
		defer s.close()
		old, _ := w.rotate()
		w.until("settled", time.Minute, func() bool { return settled(w.authority(old)) })
		w.stopAgent()
		s.leave()
		w.startAgent()
		again := s.conn.process.open()
		defer again.close()
		w.until("settled after a restart", 7*time.Minute, func() bool { return settled(w.authority(old)) })
	})
}

// However long the agent was stopped, the reference client has its replacement before the
// authority is settled.
func TestSettledWaitsForTheReferenceClient(t *testing.T) {
	t.Run("away", func(t *testing.T) {
		for _, away := range []time.Duration{20 * time.Second, 70 * time.Second, 3 * time.Minute, 7 * time.Minute, 13*time.Minute + 7*time.Second} {
			t.Run(away.String(), func(t *testing.T) { referenceClient(t, away) })
		}
	})
}

func referenceClient(t *testing.T, away time.Duration) {
	inWorld(t, 2, func(w *world) { w.cfg.TaintDelay = 0 }, func(w *world) {
		w.waitHeld(2)
		p := w.begin("1")
		ctx, cancel := context.WithCancel(context.Background())
		client, err := workloadapi.New(ctx, workloadapi.WithAddr("tcp://127.0.0.1:1"), workloadapi.WithDialOptions(
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
				w.mu.Lock()
				lis := w.workloads
				w.mu.Unlock()
				return lis.dial(ctx, p)
			})))
		w.check(err)
		last := &lastAuthority{}
		done := make(chan error, 1)
		go func() { done <- client.WatchX509Context(ctx, last) }()
		w.until("answered", time.Minute, func() bool { return last.get() != "" })
		old := w.activate()
		w.stopAgent()
		w.check(w.server.Keysets().Taint(w.t.Context(), old.ID))
		time.Sleep(away)
		w.startAgent()
		w.until("settled", 5*time.Minute, func() bool { return settled(w.authority(old)) })
		if last.get() == old.X509AuthorityID {
			w.t.Error("settled, and the client does not have its replacement")
		}
		cancel()
		<-done
		client.Close()
	})
}

// lastAuthority is the authority of the last SVID that a go-spiffe client received.
type lastAuthority struct {
	mu sync.Mutex
	id string
}

func (a *lastAuthority) OnX509ContextUpdate(c *workloadapi.X509Context) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.id = hex.EncodeToString(c.SVIDs[0].Certificates[0].AuthorityKeyId)
}

func (*lastAuthority) OnX509ContextWatchError(error) {}

func (a *lastAuthority) get() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.id
}
