package agent_test

import (
	"context"
	"crypto/x509"
	"errors"
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
	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentpb "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlepb "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidpb "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent"
	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/attest"
	"github.com/renewd/renewd/internal/keyset"
	"github.com/renewd/renewd/internal/ledger"
	"github.com/renewd/renewd/internal/listen/listentest"
	"github.com/renewd/renewd/internal/server"
	"github.com/renewd/renewd/metrics"
)

// world is a whole system in a bubble: the embedded server, an agent, and
// workloads with open streams, over connections in memory. Everything between
// them is the real protocol; only the kernel's word on who is calling is made
// up, and the clock.
type world struct {
	t        *testing.T
	storage  *keyset.Memory
	stranger keyset.Memory
	server   *server.Server
	ledger   *ledger.Ledger // of the server
	cfg      agent.Config
	logs     *slog.Logger

	serverLis  *bufconn.Listener
	stopServer func()

	agent     *agent.Agent
	workloads *pairListener
	stopAgent func()

	peers     sync.Map // *attest.Peer -> *process
	processes sync.Map // cache.Process -> *process

	// unchecked says that streams do not verify what they are sent: with a
	// server that signs by authorities it has removed, that is not to be had.
	unchecked bool
	lags      bool              // a replica may sign with an old keyset, behind the server's back
	cleared   map[string]bool   // keysets that the server called safe to remove
	signers   map[string]string // authorities of certificates that were looked at

	mu           sync.Mutex
	faults       faults
	states       map[string][]server.StoredEntry // every state that an entry was ever in, by SPIFFE ID
	listings     int                             // answers with the server's own list of entries
	mints        []mint
	signing      map[*mint]string // keysets that answers on their way are or will be of, by request
	attestations int              // answers on their way that have an agent SVID
	bundleCalls  int
	statusCalls  int
	process      string // of the last report
	attesting    atomic.Int64
	conns        []net.Conn // between agent and server
	skew         time.Duration
}

// faults are what goes wrong between agent and server.
type faults struct {
	down    bool          // no connection
	latency time.Duration // before every answer
	signing time.Duration // before every answer with SVIDs
	answer  time.Duration // after a stream's handler has signed, before its answer is sent
	garble  func(*svidpb.BatchNewX509SVIDRequest, *svidpb.BatchNewX509SVIDResponse) *svidpb.BatchNewX509SVIDResponse
	bundle  func(*types.Bundle)                 // changes the bundle that is answered
	lag     *keyset.Record                      // signs with this keyset whatever the state
	life    func(entryID string) time.Duration  // ends SVIDs sooner than the server would
	list    func([]*types.Entry) []*types.Entry // what a replica has instead of these entries
	policy  bool                                // as SPIRE 1.13: it lets no agent post a status
}

// mint is one request to sign, as the server saw it arrive.
type mint struct {
	at      time.Time
	entries []string // nil for the node's own SVID
}

// inWorld runs f in a bubble with a world of n entries, in which entry i is
// for workloads with the selector test:i. configure may change the agent's
// configuration before its first start. It runs beside other worlds: a bubble keeps
// one CPU busy. So a test calls it once, and one that runs it in subtests and wants
// a result of them puts those into a subtest of their own.
func inWorld(t *testing.T, n int, configure func(*world), f func(*world)) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, storage: &keyset.Memory{}, logs: testLog(t), signing: make(map[*mint]string)}
		deployment, err := keyset.Open(t.Context(), keyset.Config{TrustDomain: td, Storage: w.storage})
		w.check(err)
		w.ledger, err = ledger.Open(t.Context(), ledger.Config{})
		w.check(err)
		w.server, err = server.New(server.Config{
			TrustDomain: td, Keysets: deployment, Ledger: w.ledger, Options: []grpc.ServerOption{grpc.ChainUnaryInterceptor(w.intercept), grpc.ChainStreamInterceptor(w.delayStream)},
		})
		w.check(err)
		w.enter(entriesFor(n))
		token, err := w.server.CreateJoinToken(t.Context(), time.Hour)
		w.check(err)
		dir, err := os.MkdirTemp("", "renewd-drill")
		w.check(err)
		defer os.RemoveAll(dir)
		w.cfg = agent.Config{
			TrustDomain: td, ServerAddress: "server:8081", TrustBundle: w.trust(), JoinToken: token.Value, DataDir: dir,
			TaintDelay: time.Minute, CacheSize: n + 1000, Log: w.logs,
			Dial: w.dial, Attestors: []attest.Attestor{w}, Peers: w.peer, Life: w.life, Now: w.now,
		}
		if configure != nil {
			configure(w)
		}
		w.startServer()
		defer func() { w.stopServer() }()
		w.startAgent()
		defer func() { w.stopAgent() }() // the one that runs then
		f(w)
	})
}

func entriesFor(n int) []server.Entry {
	out := make([]server.Entry, n)
	for i := range out {
		out[i] = entryFor(i)
	}
	return out
}

func entryFor(i int) server.Entry {
	return server.Entry{
		ID: entryID(i), SPIFFEID: spiffeid.RequireFromPathf(td, "/workload/%d", i),
		Selectors: []server.Selector{{Type: "test", Value: fmt.Sprint(i)}},
	}
}

func entryID(i int) string { return fmt.Sprintf("entry-%05d", i) }

func (w *world) check(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// enter makes entries all that the server has.
func (w *world) enter(entries []server.Entry) {
	w.t.Helper()
	_, err := w.server.ApplyEntries(w.t.Context(), entries, false)
	w.check(err)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.note(w.server.Entries())
}

// now is the agent's wall clock.
func (w *world) now() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return time.Now().Add(w.skew)
}

// trust is the published bundle, as an operator would copy it.
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
	// From one IP address: the server limits what the agent asks for.
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

// dial connects the agent to the server.
func (w *world) dial(ctx context.Context, _ string) (net.Conn, error) {
	w.mu.Lock()
	down := w.faults.down
	w.mu.Unlock()
	if down {
		return nil, errors.New("connection refused")
	}
	conn, err := w.serverLis.DialContext(ctx)
	if err == nil {
		w.mu.Lock()
		w.conns = append(w.conns, conn)
		w.mu.Unlock()
	}
	return conn, err
}

// set changes the faults. A server that goes down drops its connections.
func (w *world) set(change func(*faults)) {
	w.mu.Lock()
	change(&w.faults)
	var cut []net.Conn
	if w.faults.down {
		cut, w.conns = w.conns, nil
	}
	w.mu.Unlock()
	for _, c := range cut {
		c.Close()
	}
}

// intercept stands in front of the server: it records what is asked to be
// signed and applies the faults.
func (w *world) intercept(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	w.mu.Lock()
	switch r := req.(type) {
	case *bundlepb.GetBundleRequest:
		w.bundleCalls++
	case *agentpb.PostStatusRequest:
		w.statusCalls++
	case *svidpb.BatchNewX509SVIDRequest:
		m := mint{at: time.Now(), entries: []string{}}
		for _, p := range r.Params {
			m.entries = append(m.entries, p.EntryId)
		}
		w.mints = append(w.mints, m)
	case *agentpb.RenewAgentRequest:
		w.mints = append(w.mints, mint{at: time.Now()})
	case *api.ReportRequest:
		w.process = string(r.GetProcess())
	}
	f := w.faults
	if _, ok := req.(*svidpb.BatchNewX509SVIDRequest); ok && f.lag != nil {
		asked := &mint{at: time.Now()}
		w.signing[asked] = f.lag.ID
		defer func() {
			w.mu.Lock()
			defer w.mu.Unlock()
			delete(w.signing, asked)
		}()
	}
	w.mu.Unlock()
	if _, ok := req.(*agentpb.PostStatusRequest); ok && f.policy {
		return nil, status.Error(codes.PermissionDenied, "authorization denied for the method")
	}
	wait := f.latency
	if _, ok := req.(*svidpb.BatchNewX509SVIDRequest); ok {
		wait += f.signing
	}
	if err := sleep(ctx, wait); err != nil {
		return nil, err
	}
	res, err := handler(ctx, req)
	if b, ok := res.(*types.Bundle); ok && err == nil && f.bundle != nil {
		b = proto.CloneOf(b)
		f.bundle(b)
		return b, nil
	}
	if batch, ok := res.(*svidpb.BatchNewX509SVIDResponse); ok && err == nil {
		asked := req.(*svidpb.BatchNewX509SVIDRequest)
		by := f.lag
		if by == nil && f.life != nil {
			by = w.record(w.server.Keysets().Active().ID)
		}
		for i := range batch.Results {
			if by == nil {
				break
			}
			var life time.Duration
			if f.life != nil {
				life = f.life(asked.Params[i].EntryId)
			}
			w.resign(by, life, batch.Results[i])
		}
		if f.garble != nil {
			return f.garble(asked, batch), nil
		}
	}
	return res, err
}

func (w *world) delayStream(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	w.mu.Lock()
	latency := w.faults.latency
	w.mu.Unlock()
	if err := sleep(stream.Context(), latency); err != nil {
		return err
	}
	return handler(srv, &lateStream{stream, w})
}

// lateStream: the answer leaves late.
type lateStream struct {
	grpc.ServerStream
	w *world
}

func (l *lateStream) SendMsg(m any) error {
	l.w.mu.Lock()
	d, list := l.w.faults.answer, l.w.faults.list
	l.w.mu.Unlock()
	if answer, ok := m.(*agentpb.AttestAgentResponse); ok && answer.GetResult() != nil {
		defer l.w.attests()()
	}
	if err := sleep(l.Context(), d); err != nil {
		return err
	}
	if res, ok := m.(*entryv1.SyncAuthorizedEntriesResponse); !ok {
	} else if list != nil {
		m = &entryv1.SyncAuthorizedEntriesResponse{Entries: list(res.Entries)} // short lists come whole
	} else {
		l.w.mu.Lock()
		l.w.listings++
		l.w.mu.Unlock()
	}
	return l.ServerStream.SendMsg(m)
}

// attests notes that an agent SVID is on its way, which the active keyset has signed,
// until done is called.
func (w *world) attests() (done func()) {
	by, asked := w.server.Keysets().Active().ID, &mint{at: time.Now()}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.signing[asked] = by
	w.attestations++
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.signing, asked)
		w.attestations--
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
}

// resign replaces an answer's certificate by one that another keyset signs: a
// replica that has not heard of the rotation. A life that is not 0 is that of the new one.
func (w *world) resign(by *keyset.Record, life time.Duration, r *svidpb.BatchNewX509SVIDResponse_Result) {
	if r.Svid == nil {
		return
	}
	leaf, err := x509.ParseCertificate(r.Svid.CertChain[0])
	if err != nil {
		panic(err)
	}
	if life != 0 {
		leaf.NotAfter = time.Now().Add(life)
		r.Svid.ExpiresAt = leaf.NotAfter.Unix()
	}
	r.Svid.CertChain[0] = signWith(by, leaf, nil)
}

// record finds a stored keyset with its keys.
func (w *world) record(id string) *keyset.Record {
	doc, err := w.storage.Load(context.Background())
	w.check(err)
	i := slices.IndexFunc(doc.Records, func(r keyset.Record) bool { return r.ID == id })
	if i < 0 {
		w.t.Fatalf("no keyset %s", id)
	}
	return &doc.Records[i]
}

// peer and the Attestor methods tell the agent which process made a connection.
func (w *world) peer(conn net.Conn) (*attest.Peer, error) {
	p := conn.(*agentEnd).link.process
	peer := attest.Made(p.name, uint32(os.Getuid()), uint32(os.Getgid()), p.alive)
	w.peers.Store(peer, p)
	return peer, nil
}

func (w *world) life(name cache.Process) cache.Life {
	p, ok := w.processes.Load(name)
	switch {
	case !ok || p.(*process).alive() != nil:
		return cache.Ended
	case p.(*process).stopped():
		return cache.Stopped
	}
	return cache.Running
}

func (w *world) Name() string { return "test" }

func (w *world) Attest(_ context.Context, peer *attest.Peer) ([]cache.Selector, error) {
	if d := w.attesting.Load(); d > 0 {
		time.Sleep(time.Duration(d)) // in the queue of programs to be hashed
	}
	p, ok := w.peers.Load(peer)
	if !ok {
		return nil, errors.New("unknown peer")
	}
	return p.(*process).selectors, nil
}

// connect opens the connection of a new workload to the agent.
func (w *world) connect(selectors ...int) *connection {
	return w.connectAs(testValues(selectors)...)
}

func testValues(selectors []int) []string {
	values := make([]string, len(selectors))
	for i, s := range selectors {
		values[i] = fmt.Sprint(s)
	}
	return values
}

// connectAs is connect with other selectors of the type test.
func (w *world) connectAs(values ...string) *connection { return w.begin(values...).connect() }

func workloadContext(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

// fill waits until the agent holds n SVIDs.
func (w *world) fill(n int) {
	w.t.Helper()
	w.until("all SVIDs held", 2*time.Minute, func() bool { return w.held() == n })
	time.Sleep(time.Second) // so that a time tells the fill from what follows
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

// until sleeps until ok, or fails the test after limit of the bubble's time.
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
	time.Sleep(6 * time.Second) // the operator's step: the bundle reaches the agents
	w.check(w.server.Keysets().Activate(w.t.Context(), next.ID))
	return old
}

// rotate activates a new keyset and taints the old one, which it returns, and
// the time at which the agent begins its wave.
func (w *world) rotate() (old keyset.Keyset, begins time.Time) {
	w.t.Helper()
	old = w.activate()
	w.check(w.server.Keysets().Taint(w.t.Context(), old.ID))
	return old, w.begins(old)
}

// begins waits until the agent has seen the taint.
func (w *world) begins(old keyset.Keyset) time.Time {
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

// authority is what the agent says of a keyset's X.509 authority.
func (w *world) authority(k keyset.Keyset) metrics.Authority {
	a, _ := authorityOf(w.agent.State(), metrics.TypeX509, k.X509AuthorityID)
	return a
}

// settled reports what the gauge would.
func settled(a metrics.Authority) bool {
	return a.State == metrics.StateTainted && a.Settled && a.Held == 0 && a.Pending == 0 && a.Streams == 0
}

// unknown makes a keyset that no bundle has.
func (w *world) unknown() *keyset.Record {
	w.t.Helper()
	_, err := keyset.Open(w.t.Context(), keyset.Config{TrustDomain: td, Storage: &w.stranger})
	w.check(err)
	doc, err := w.stranger.Load(w.t.Context())
	w.check(err)
	return &doc.Records[0]
}

func (w *world) mintsSince(t time.Time) []mint {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []mint
	for _, m := range w.mints {
		if !m.at.Before(t) {
			out = append(out, m)
		}
	}
	return out
}

// paced fails the test if the server was asked for more than 20 SVIDs in any one
// second.
func (w *world) paced(mints []mint) {
	w.t.Helper()
	var arrivals []time.Time
	for _, m := range mints {
		for range max(len(m.entries), 1) {
			arrivals = append(arrivals, m.at)
		}
	}
	for i := 20; i < len(arrivals); i++ {
		if d := arrivals[i].Sub(arrivals[i-20]); d < time.Second {
			w.t.Fatalf("21 taint renewals within %v", d)
		}
	}
}

// fetchX509 asks once, as a new caller.
func (w *world) fetchX509(selectors ...int) error {
	_, err := w.askAs(testValues(selectors)...)
	return err
}

// askAs asks once, as a new caller with these selectors of the type test.
func (w *world) askAs(values ...string) (update, error) {
	p := w.begin(values...)
	defer p.kill()
	return p.ask()
}

// ask has the process ask once, on a connection of its own.
func (p *process) ask() (update, error) {
	w, conn := p.w, p.connect()
	defer conn.leave()
	// An answer that comes the moment that its caller gives up was read by the process,
	// and yet not by who asked. So this is no time that the agent waits for anything.
	ctx, cancel := context.WithTimeout(workloadContext(context.Background()), 7777*time.Millisecond)
	defer cancel()
	rpc, err := workloadpb.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(ctx, &workloadpb.X509SVIDRequest{})
	if err != nil {
		return update{}, err
	}
	res, err := rpc.Recv()
	if err != nil {
		return update{}, err
	}
	return w.read(res), nil
}

// fetchJWT asks for a JWT-SVID.
func (w *world) fetchJWT(i int) (string, error) {
	conn := w.connect(i)
	defer conn.Close()
	ctx, cancel := context.WithTimeout(workloadContext(context.Background()), 10*time.Second)
	defer cancel()
	res, err := workloadpb.NewSpiffeWorkloadAPIClient(conn).FetchJWTSVID(ctx, &workloadpb.JWTSVIDRequest{Audience: []string{"api"}})
	if err != nil {
		return "", err
	}
	return res.Svids[0].Svid, nil
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
