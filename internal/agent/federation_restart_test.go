package agent_test

import (
	"context"
	"net"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/test/bufconn"

	"github.com/renewd/renewd/internal/server/spireapi"
)

// firstAnswers opens the workload's stream repeatedly, as restarting workloads do. It
// returns the numbers of first answers with and without the bundle of the other side.
func (s *side) firstAnswers(of *side, within time.Duration) (with, without int) {
	for end := time.Now().Add(within); time.Now().Before(end); {
		open := s.openStreams()
		time.Sleep(100 * time.Millisecond)
		synctest.Wait()
		open.mu.Lock()
		if open.x509 != nil {
			if open.x509.FederatedBundles[of.td.IDString()] == nil {
				without++
			} else {
				with++
			}
		}
		open.mu.Unlock()
		open.close()
	}
	return with, without
}

// farAway is a connection with a latency of 20 ms.
type farAway struct{ net.Conn }

func (c farAway) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	time.Sleep(20 * time.Millisecond)
	return n, err
}

// An answer without a federated bundle withdraws that bundle from the workload. A restart
// of the agent never does that, with the server up or down.
func TestDrillRestartKeepsFederatedBundles(t *testing.T) {
	t.Parallel()
	runtime, err := os.MkdirTemp("/dev/shm", "renewd-drill")
	if err != nil {
		t.Fatalf("this test needs the memory file system /dev/shm: %v", err)
	}
	defer os.RemoveAll(runtime)
	synctest.Test(t, func(t *testing.T) {
		dir, n := t.TempDir(), &network{hosts: map[string]*bufconn.Listener{}}
		ours, theirs := newSide(t, n, dir, td, partnerTD), newSide(t, n, dir, partnerTD, td)
		defer func() { ours.stop(); theirs.stop() }()
		ours.federate(theirs, dir)
		theirs.federate(ours, dir)
		dial := ours.cfg.Dial
		ours.cfg.Dial = func(ctx context.Context, address string) (net.Conn, error) {
			conn, err := dial(ctx, address)
			return farAway{conn}, err
		}
		time.Sleep(settle)
		for _, keeping := range []string{"", runtime} {
			ours.cfg.RuntimeDir = keeping
			for _, down := range []bool{false, true} {
				if keeping == "" && down {
					continue // nothing to serve
				}
				ours.set(func(f *faults) { f.down = false })
				ours.startAgent()
				time.Sleep(time.Minute)
				ours.stopAgent()
				ours.set(func(f *faults) { f.down = down })
				ours.startAgent()
				if with, without := ours.firstAnswers(theirs, 20*time.Second); without > 0 || with == 0 {
					t.Errorf("runtime_dir %q, server down %v: %d first answers with the bundle of the other side, %d without it", keeping, down, with, without)
				}
				ours.stopAgent()
			}
		}
		ours.stopAgent = sync.OnceFunc(func() {})
	})
}

// The agent SVID has expired in an outage, and the restarted agent serves the stored
// SVIDs. The first answers of the server do not withdraw the federated bundles from the
// open streams.
func TestDrillReturnOfTheServerKeepsFederatedBundles(t *testing.T) {
	runtime, err := os.MkdirTemp("/dev/shm", "renewd-drill")
	if err != nil {
		t.Fatalf("this test needs the memory file system /dev/shm: %v", err)
	}
	defer os.RemoveAll(runtime)
	synctest.Test(t, func(t *testing.T) {
		dir, n := t.TempDir(), &network{hosts: map[string]*bufconn.Listener{}}
		ours, theirs := newSide(t, n, dir, td, partnerTD), newSide(t, n, dir, partnerTD, td)
		defer func() { ours.stop(); theirs.stop() }()
		ours.federate(theirs, dir)
		ours.setEntries([]spireapi.Entry{{
			ID: "web", SPIFFEID: spiffeid.RequireFromPath(td, "/web"), FederatesWith: []spiffeid.TrustDomain{partnerTD},
			Selectors: []spireapi.Selector{{Type: "test", Value: "web"}}, X509TTL: 72 * time.Hour,
		}})
		dial := ours.cfg.Dial
		ours.cfg.Dial = func(ctx context.Context, address string) (net.Conn, error) {
			conn, err := dial(ctx, address)
			return farAway{conn}, err
		}
		ours.cfg.RuntimeDir = runtime
		ours.startAgent()
		time.Sleep(time.Minute)
		ours.stopAgent()
		ours.stop()
		theirs.stop()
		time.Sleep(30 * time.Hour)
		ours.up()
		ours.set(func(f *faults) { f.down = true })
		token, err := ours.server.CreateJoinToken(t.Context(), time.Hour, "")
		ours.check(err)
		ours.cfg.JoinToken = token.Value
		ours.start()
		defer func() { ours.streams.close(); ours.stopAgent() }()
		time.Sleep(time.Minute)
		ours.set(func(f *faults) { f.down = false })
		for range 3000 {
			time.Sleep(10 * time.Millisecond)
			if ours.foreign(partnerTD) == nil {
				t.Fatal("an open stream lost the bundle of the other side")
			}
		}
		if !ours.agent.Cache().Ready() {
			t.Error("the server is not back")
		}
	})
}

// An entry begins to federate, and a workload starts at once. Its first answer is
// complete: it may be the only one that the workload reads.
func TestDrillNewFederationIsServedAtOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dir, n := t.TempDir(), &network{hosts: map[string]*bufconn.Listener{}}
		ours, theirs := newSide(t, n, dir, td, partnerTD), newSide(t, n, dir, partnerTD, td)
		defer func() { ours.stop(); theirs.stop() }()
		ours.federate(theirs, dir)
		alone := spireapi.Entry{ID: "web", SPIFFEID: spiffeid.RequireFromPath(td, "/web"), Selectors: []spireapi.Selector{{Type: "test", Value: "web"}}}
		ours.setEntries([]spireapi.Entry{alone})
		time.Sleep(settle)
		dial := ours.cfg.Dial
		ours.cfg.Dial = func(ctx context.Context, address string) (net.Conn, error) {
			conn, err := dial(ctx, address)
			return farAway{conn}, err
		}
		ours.startAgent()
		defer func() { ours.stopAgent() }()
		time.Sleep(time.Minute)
		for range 5 {
			federated := alone
			federated.FederatesWith = []spiffeid.TrustDomain{partnerTD}
			ours.setEntries([]spireapi.Entry{federated})
			for len(ours.agent.Cache().FederatesWith()) == 0 {
				time.Sleep(time.Millisecond)
			}
			if with, without := ours.firstAnswers(theirs, 3*time.Second); without > 0 || with == 0 {
				t.Errorf("%d first answers with the bundle of the other side, %d without it", with, without)
			}
			ours.setEntries([]spireapi.Entry{alone})
			time.Sleep(time.Minute)
		}
	})
}
