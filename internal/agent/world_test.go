package agent_test

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/agent"
	"github.com/renewd/renewd/internal/agent/attest"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/metrics"
	"github.com/renewd/renewd/test/listentest"
	"github.com/renewd/renewd/test/memory"
)

// world is a whole system in a bubble: the embedded server, an agent, and workloads with
// open streams, over connections in memory. They speak the real protocol; only peer
// credentials and the clock are simulated.
type world struct {
	t           *testing.T
	storage     *memory.Keysets
	unknownKeys memory.Keysets
	server      *spireapi.Server
	ledger      *ledger.Ledger // of the server
	cfg         agent.Config
	logs        *slog.Logger

	serverLis  *bufconn.Listener
	stopServer func()

	agent     *agent.Agent
	workloads *pairListener
	stopAgent func()

	peers     sync.Map // *attest.Peer -> *process
	processes sync.Map // cache.Process -> *process

	// unchecked makes streams skip verification, which fails with a server that signs
	// with authorities that it has removed.
	unchecked bool
	lags      bool              // a replica may sign with an old keyset, without the ledger
	cleared   map[string]bool   // keysets that the server reported as safe to remove
	signers   map[string]string // authorities of certificates, as a cache

	mu            sync.Mutex
	faults        faults
	states        map[string][]spireapi.StoredEntry // every state that an entry was ever in, by SPIFFE ID
	listings      int                               // answers with the server's own list of entries
	mints         []mint
	signing       map[*mint]string // keysets of the answers in flight, by request
	attestations  int              // answers in flight with an agent SVID
	bundleCalls   int
	statusCalls   int
	process, host string // of the last report
	attesting     atomic.Int64
	conns         []net.Conn // between agent and server
	skew          time.Duration
	noCredential  bool // of testNode
}

// inWorld runs f in a bubble with a world of n entries, in which entry i is
// for workloads with the selector test:i. configure may change the agent's
// configuration before its first start. Worlds run in parallel, because a bubble uses one
// CPU: inWorld calls t.Parallel. So a test that needs the results of several worlds runs
// them in subtests of one subtest.
func inWorld(t *testing.T, n int, configure func(*world), f func(*world)) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, storage: new(memory.Keysets), logs: testLog(t), signing: make(map[*mint]string)}
		deployment, err := keyset.Open(t.Context(), keyset.Config{TrustDomain: td, Storage: w.storage})
		w.check(err)
		w.ledger, err = ledger.Open(t.Context(), ledger.Config{Storage: memory.Ledger{}})
		w.check(err)
		w.server, err = spireapi.New(spireapi.Config{
			TrustDomain: td, Keysets: deployment, Storage: memory.NewServer(), Ledger: w.ledger, NodeVerifiers: w.verifiers(), Options: []grpc.ServerOption{grpc.ChainUnaryInterceptor(w.intercept), grpc.ChainStreamInterceptor(w.delayStream)},
		})
		w.check(err)
		w.setEntries(entriesFor(n))
		token, err := w.server.CreateJoinToken(t.Context(), time.Hour, "")
		w.check(err)
		dir, err := os.MkdirTemp("", "renewd-drill")
		w.check(err)
		defer os.RemoveAll(dir)
		w.cfg = agent.Config{
			TrustDomain: td, ServerAddress: "server:8081", TrustBundle: w.trust(), JoinToken: token.Value, DataDir: dir,
			TaintDelay: time.Minute, CacheSize: n + 1000, Log: w.logs,
			Dial: w.dial, Attestors: []attest.Attestor{w}, LogSelectors: []string{"test"}, Peers: w.peer, Life: w.life, Now: w.now,
		}
		if configure != nil {
			configure(w)
		}
		w.startServer()
		defer func() { w.stopServer() }()
		w.startAgent()
		defer func() { w.stopAgent() }() // the agent that runs at the end
		f(w)
	})
}

func entriesFor(n int) []spireapi.Entry {
	out := make([]spireapi.Entry, n)
	for i := range out {
		out[i] = entryFor(i)
	}
	return out
}

func entryFor(i int) spireapi.Entry {
	return spireapi.Entry{
		ID: entryID(i), SPIFFEID: spiffeid.RequireFromPathf(td, "/workload/%d", i),
		Selectors: []spireapi.Selector{{Type: "test", Value: fmt.Sprint(i)}},
	}
}

func entryID(i int) string { return fmt.Sprintf("entry-%05d", i) }

func (w *world) check(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// setEntries replaces all entries of the server.
func (w *world) setEntries(entries []spireapi.Entry) {
	w.t.Helper()
	_, err := w.server.ApplyEntries(w.t.Context(), entries, false)
	w.check(err)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.noteStatesLocked(w.server.Entries())
}

// now is the agent's wall clock.
func (w *world) now() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return time.Now().Add(w.skew)
}

// trust returns the published bundle, as an operator copies it.
func (w *world) trust() *bundle.Bundle {
	var c bundle.Content
	for _, cert := range w.server.Keysets().Bundle().Certificates() {
		c.X509 = append(c.X509, bundle.X509Authority{Certificate: cert})
	}
	b, err := bundle.New(td, c)
	w.check(err)
	return b
}

func (w *world) startServer() {
	w.serverLis = bufconn.Listen(1 << 20)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	// From one IP address, so that the server limits the calls.
	lis := listentest.From(w.serverLis, &net.TCPAddr{IP: net.IPv4(10, 0, 0, 1), Port: 40000})
	go func() { done <- w.server.Serve(ctx, lis) }()
	w.stopServer = sync.OnceFunc(func() {
		cancel()
		w.check(<-done)
	})
}

func (w *world) startAgent() {
	w.mu.Lock()
	w.workloads = newPairListener()
	w.mu.Unlock()
	w.cfg.Listener = w.workloads
	a, err := agent.New(w.cfg)
	w.check(err)
	w.agent = a
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	w.stopAgent = sync.OnceFunc(func() {
		cancel()
		w.check(<-done)
	})
}

// waitHeld waits until the agent holds n SVIDs.
func (w *world) waitHeld(n int) {
	w.t.Helper()
	w.until("all SVIDs held", 2*time.Minute, func() bool { return w.held() == n })
	time.Sleep(time.Second) // so that times separate these mints from later ones
}

func (w *world) held() int {
	n := 0
	for _, a := range w.agent.State().Authorities {
		if a.Type == metrics.TypeX509 {
			n += a.Held
		}
	}
	return n
}

// until polls until ok, or fails the test after limit of the bubble's time.
func (w *world) until(what string, limit time.Duration, ok func() bool) {
	w.t.Helper()
	deadline := time.Now().Add(limit)
	for {
		synctest.Wait()
		if ok() {
			return
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("%s: not within %v", what, limit)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// activate prepares and activates a new keyset and returns the old one.
func (w *world) activate() keyset.Keyset {
	w.t.Helper()
	old := w.server.Keysets().Active()
	next, err := w.server.Keysets().Prepare(w.t.Context())
	w.check(err)
	time.Sleep(6 * time.Second) // as an operator waits: the agents get the bundle
	w.check(w.server.Keysets().Activate(w.t.Context(), next.ID))
	return old
}

// rotate activates a new keyset and taints the old one. It returns the old one and the time
// at which the agent begins its wave.
func (w *world) rotate() (old keyset.Keyset, begins time.Time) {
	w.t.Helper()
	old = w.activate()
	w.check(w.server.Keysets().Taint(w.t.Context(), old.ID))
	return old, w.waveBegins(old)
}

// waveBegins waits until the agent has seen the taint.
func (w *world) waveBegins(old keyset.Keyset) time.Time {
	w.t.Helper()
	var since time.Time
	w.until("taint seen", 20*time.Second, func() bool {
		if s := w.agent.Bundle(); s != nil {
			_, since = s.State(old.X509AuthorityID)
		}
		return !since.IsZero()
	})
	return since.Add(w.agent.TaintDelay(old.X509AuthorityID))
}

// authority returns the agent's figures for a keyset's X.509 authority.
func (w *world) authority(k keyset.Keyset) metrics.Authority {
	a, _ := authorityOf(w.agent.State(), metrics.TypeX509, k.X509AuthorityID)
	return a
}

// settled reports whether the authority is settled, as the gauge does.
func settled(a metrics.Authority) bool {
	return a.State == metrics.StateSettled
}

// counter reads one metric of the agent as a scrape would.
func (w *world) counter(name string) float64 {
	w.t.Helper()
	families, err := w.agent.Metrics().Gather()
	w.check(err)
	for _, f := range families {
		if f.GetName() == name {
			return f.Metric[0].GetCounter().GetValue()
		}
	}
	w.t.Fatalf("no metric %s", name)
	return 0
}

// gauge reads one series of a gauge as a scrape would, by the values of its
// labels.
func (w *world) gauge(name string, labels ...string) float64 {
	w.t.Helper()
	families, err := w.agent.Metrics().Gather()
	w.check(err)
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.Metric {
			if slices.EqualFunc(m.Label, labels, func(l *dto.LabelPair, want string) bool { return l.GetValue() == want }) {
				return m.GetGauge().GetValue()
			}
		}
	}
	w.t.Fatalf("no metric %s of %v", name, labels)
	return 0
}

// longID is a SPIFFE ID close to the 2,048 bytes that the standard allows.
func longID(i int) spiffeid.ID {
	return spiffeid.RequireFromPathf(td, "/%s/%d", strings.Repeat("x", 1900), i)
}

// syncedLog logs to a buffer that several goroutines write to.
func syncedLog(b *strings.Builder) *slog.Logger {
	return slog.New(slog.NewTextHandler(b, nil)) // a TextHandler locks
}

func isCode(err error, c codes.Code) bool { return status.Code(err) == c }

var serials atomic.Int64
