package system_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"log/slog"
	"maps"
	mathrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/agent/node"
	"github.com/renewd/renewd/internal/agent/upstream"
	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/server"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/seal"
	"github.com/renewd/renewd/internal/server/store"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// crashes is the number of kills of the server.
const crashes = 200

// The server is repeatedly killed with SIGKILL at random moments, during keyset mutations
// and issuance, on the same store. After each kill the state is that before or after the
// step in progress, exactly one keyset is active and its keys sign, the audit log has every
// change, and the ledger has every SVID that a client received.
//
// RENEWD_SEED replays the moments and steps of one run, as far as processes can be
// replayed.
func TestServerKilledAtAnyInstant(t *testing.T) {
	t.Parallel()
	seed := uint64(time.Now().UnixNano())
	if s, err := strconv.ParseUint(os.Getenv("RENEWD_SEED"), 10, 64); err == nil {
		seed = s
	}
	t.Logf("RENEWD_SEED=%d", seed)
	w := newCrashWorld(t, seed)
	for range crashes {
		w.round()
		if t.Failed() {
			return
		}
	}
	t.Logf("%d crashes: %d mutations confirmed, %d in progress at a kill (%d of them took effect), %d X.509-SVIDs and %d JWT-SVIDs issued",
		crashes, w.confirmed, w.inFlight, w.happened, w.given, w.tokens)
	// The kills must hit steps in progress. Three of four rounds wait for the counts
	// here, however slow the machine is.
	if w.inFlight < crashes/2 || w.given < crashes/2 || w.tokens < crashes/2 {
		t.Error("too little was going on")
	}
}

// crashWorld is a store and what the server has confirmed about it.
type crashWorld struct {
	t    *testing.T
	rand *mathrand.Rand
	dir  string

	address string
	conn    *grpc.ClientConn

	// states is the last confirmed state, and step the mutation in progress. Both are
	// owned by the operator of a round.
	states map[string]keyset.State
	step   step

	did chan struct{} // capacity 1: wakes the readers of the counts

	mu        sync.Mutex
	issued    []ledger.Row         // X.509-SVIDs that the agent received
	issuedJWT map[string]time.Time // latest expiry of the tokens received, by key ID
	progress

	audited uint64            // records inspected
	changes uint64            // those of them that are about the keysets
	last    store.AuditRecord // the last of these

	inFlight, happened int
}

// step is one mutation.
type step struct{ operation, id string }

func newCrashWorld(t *testing.T, seed uint64) *crashWorld {
	dir, err := os.MkdirTemp("", "rn")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	free, err := ports(1)
	if err != nil {
		t.Fatal(err)
	}
	w := &crashWorld{t: t, rand: mathrand.New(mathrand.NewPCG(seed, 0)), dir: dir, address: "127.0.0.1:" + free[0], issuedJWT: map[string]time.Time{}, did: make(chan struct{}, 1)}
	if err := seal.NewFile(dir + "/key.json"); err != nil {
		t.Fatal(err)
	}
	config := fmt.Sprintf(`
trust_domain: example.org
data_dir: %[1]s/data
key_file: %[1]s/key.json
admin_socket: %[1]s/admin.sock
deployments: {default: {listen_address: "%[2]s"}}
metrics: {address: ""}
rotation: {mode: "off"}
`, dir, w.address)
	if err := os.WriteFile(dir+"/server.yaml", []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	if w.conn, err = grpc.NewClient("unix://"+dir+"/admin.sock", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableRetry()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.conn.Close() })
	w.prepare()
	return w
}

// start starts the server. The returned function kills it and waits for its end.
func (w *crashWorld) start() (kill func()) {
	w.t.Helper()
	var out bytes.Buffer
	cmd := exec.Command(filepath.Join(programs(), "server"), "run", "-config", w.dir+"/server.yaml")
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	ctx, cancel := context.WithTimeout(w.t.Context(), 5*time.Minute)
	defer cancel()
	for {
		_, err := api.NewOperatorClient(w.conn).ListKeysets(ctx, &api.ListKeysetsRequest{})
		if err == nil {
			break
		}
		w.conn.ResetConnectBackoff()
		select {
		case <-ended:
			w.t.Fatalf("the server ended at its start:\n%s", out.String())
		case <-ctx.Done():
			w.t.Fatalf("the server does not answer: %v\n%s", err, out.String())
		case <-time.After(2 * time.Millisecond):
		}
	}
	return func() {
		cmd.Process.Kill()
		<-ended
	}
}

// prepare creates the entries and reads the first state.
func (w *crashWorld) prepare() {
	defer w.start()()
	operator := api.NewOperatorClient(w.conn)
	var entries []*api.Entry
	for i := range 20 {
		entries = append(entries, &api.Entry{Id: entryID(i), SpiffeId: fmt.Sprintf("spiffe://example.org/w%d", i), Selectors: []*api.Selector{{Type: "unix", Value: "uid:0"}}})
	}
	if _, err := operator.ApplyEntries(w.t.Context(), &api.ApplyEntriesRequest{Entries: entries}); err != nil {
		w.t.Fatal(err)
	}
	w.states = w.list(operator)
}

// join attests a new agent within a time. It fails when the server was killed or the time
// is over.
func (w *crashWorld) join(ctx context.Context, within time.Duration) (_ *upstream.Client, agent string, end func()) {
	token, err := api.NewOperatorClient(w.conn).CreateJoinToken(ctx, &api.CreateJoinTokenRequest{})
	if err != nil {
		return nil, "", func() {}
	}
	dir, err := os.MkdirTemp(w.dir, "agent")
	if err != nil {
		w.t.Error(err)
		return nil, "", func() {}
	}
	nodes, err := node.OpenStore(dir, nil)
	if err != nil {
		w.t.Error(err)
		return nil, "", func() {}
	}
	var trust atomic.Pointer[bundle.Bundle]
	n, err := node.New(node.Config{TrustDomain: td, Attestor: node.JoinToken(token.GetToken(), ""), Store: nodes, Bundle: trust.Load})
	if err != nil {
		w.t.Error(err)
		return nil, "", func() { nodes.Close() }
	}
	client, err := upstream.New(upstream.Config{
		ServerAddress: w.address, TrustDomain: td, Node: n, Bundle: trust.Load, Insecure: true, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		w.t.Error(err)
		return nil, "", func() { nodes.Close() }
	}
	end = func() {
		client.Close()
		nodes.Close()
	}
	b, err := client.Bootstrap(ctx)
	if err != nil {
		return nil, "", end
	}
	trust.Store(b)
	attesting, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	if client.Attest(attesting) != nil {
		return nil, "", end
	}
	id := n.Identity()
	w.mu.Lock()
	w.issued = append(w.issued, ledger.Row{Authority: hex.EncodeToString(id.Chain[0].AuthorityKeyId), Agent: id.ID().String(), NotAfter: id.Chain[0].NotAfter})
	w.mu.Unlock()
	return client, id.ID().String(), end
}

func entryID(i int) string { return fmt.Sprintf("e%02d", i) }

// round starts the server, runs an operator and an agent, kills the server during that, and
// inspects the store.
//
// The moment of the kill follows from the number of operations, not from time, so that a
// slow machine reaches the same states.
func (w *crashWorld) round() {
	kill := w.start()
	ctx, cancel := context.WithCancel(w.t.Context())
	w.step = step{}
	begin := w.work()
	together := w.rand.IntN(4) == 0
	within := 5 * time.Minute
	if together {
		// If the active keyset changes meanwhile, this agent cannot attest.
		within = 200 * time.Millisecond
	}
	var work sync.WaitGroup
	left, idle := make(chan struct{}), make(chan struct{}) // closed by the agent, by both
	work.Go(func() {
		defer close(left)
		w.agent(ctx, within)
	})
	if !together { // otherwise the server may be killed during a join
		w.await(left, func(now progress) bool { return now.given > begin.given && now.tokens > begin.tokens })
	}
	work.Go(func() {
		defer close(idle)
		w.operate(ctx)
		<-left
	})
	started, before, goal := time.Now(), w.work().sum(), w.rand.IntN(30)
	w.await(idle, func(now progress) bool { return now.sum() >= before+goal })
	// A random number of operations from now.
	time.Sleep(time.Duration(w.rand.Int64N(int64(time.Since(started))/int64(goal+1) + int64(time.Millisecond))))
	kill()
	cancel()
	work.Wait()
	w.inspect()
}

// agent attests and requests SVIDs until a call fails.
func (w *crashWorld) agent(ctx context.Context, within time.Duration) {
	client, agent, end := w.join(ctx, within)
	defer end()
	if client == nil {
		return
	}
	var minting sync.WaitGroup
	defer minting.Wait()
	for range 2 {
		minting.Go(func() { w.mint(ctx, client, agent) })
	}
	minting.Go(func() { w.mintJWT(ctx, client) })
}

// progress counts the operations so far.
type progress struct{ confirmed, given, tokens int }

func (p progress) sum() int { return p.confirmed + p.given + p.tokens }

func (w *crashWorld) work() progress {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.progress
}

// done adds to the operations.
func (w *crashWorld) done(count func(*progress)) {
	w.mu.Lock()
	count(&w.progress)
	w.mu.Unlock()
	select {
	case w.did <- struct{}{}:
	default:
	}
}

// await waits for a number of operations, or for the end of the operator and the agent.
func (w *crashWorld) await(ended <-chan struct{}, enough func(progress) bool) {
	for !enough(w.work()) {
		select {
		case <-w.did:
		case <-ended:
			return
		}
	}
}

// operate mutates until a call fails. The step with an unknown outcome stays in w.step.
func (w *crashWorld) operate(ctx context.Context) {
	operator := api.NewOperatorClient(w.conn)
	for ctx.Err() == nil {
		w.step = w.choose()
		var err error
		switch w.step.operation {
		case "prepare":
			var answer *api.PrepareKeysetResponse
			if answer, err = operator.PrepareKeyset(ctx, &api.PrepareKeysetRequest{}); err == nil {
				w.step.id = answer.GetKeyset().GetId()
			}
		case "activate":
			_, err = operator.ActivateKeyset(ctx, &api.ActivateKeysetRequest{KeysetId: w.step.id})
		case "taint":
			_, err = operator.TaintKeyset(ctx, &api.TaintKeysetRequest{KeysetId: w.step.id})
		case "remove":
			_, err = operator.RemoveKeyset(ctx, &api.RemoveKeysetRequest{KeysetId: w.step.id, Force: true})
		}
		if err != nil {
			return
		}
		w.states = w.step.applied(w.states)
		w.step = step{}
		w.done(func(p *progress) { p.confirmed++ })
	}
}

// choose returns a random legal step.
func (w *crashWorld) choose() step {
	var steps []step
	for id, s := range w.states {
		switch s {
		case keyset.Prepared:
			steps = append(steps, step{"activate", id}, step{"taint", id})
		case keyset.Tainted:
			steps = append(steps, step{"remove", id})
		}
	}
	if len(w.states) < 4 {
		steps = append(steps, step{"prepare", ""})
	}
	return steps[mathrand.IntN(len(steps))]
}

// applied returns the states after a step.
func (s step) applied(states map[string]keyset.State) map[string]keyset.State {
	out := maps.Clone(states)
	switch s.operation {
	case "prepare":
		out[s.id] = keyset.Prepared
	case "activate":
		for id, state := range out {
			if state == keyset.Active {
				out[id] = keyset.Prepared
			}
		}
		out[s.id] = keyset.Active
	case "taint":
		out[s.id] = keyset.Tainted
	case "remove":
		delete(out, s.id)
	}
	return out
}

func (w *crashWorld) list(operator api.OperatorClient) map[string]keyset.State {
	answer, err := operator.ListKeysets(w.t.Context(), &api.ListKeysetsRequest{})
	if err != nil {
		w.t.Fatal(err)
	}
	out := map[string]keyset.State{}
	for _, k := range answer.GetKeysets() {
		out[k.GetId()] = keyset.State(k.GetState())
	}
	return out
}

// mint requests X.509-SVIDs until a call fails, and records those received.
func (w *crashWorld) mint(ctx context.Context, client *upstream.Client, agent string) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		w.t.Error(err)
		return
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		w.t.Error(err)
		return
	}
	for n := 0; ctx.Err() == nil; n++ {
		requests := make([]upstream.CSR, 1+n%3)
		for i := range requests {
			requests[i] = upstream.CSR{EntryID: entryID((n + i) % 20), DER: csr}
		}
		answers, err := client.MintX509(ctx, requests)
		if err != nil {
			return
		}
		for i, a := range answers {
			if a.Err != nil {
				continue
			}
			leaf, err := x509.ParseCertificate(a.Chain[0])
			if err != nil {
				w.t.Error(err)
				return
			}
			w.mu.Lock()
			w.issued = append(w.issued, ledger.Row{Authority: hex.EncodeToString(leaf.AuthorityKeyId), Agent: agent, Entry: requests[i].EntryID, NotAfter: leaf.NotAfter})
			w.mu.Unlock()
			w.done(func(p *progress) { p.given++ })
		}
	}
}

func (w *crashWorld) mintJWT(ctx context.Context, client *upstream.Client) {
	for n := 0; ctx.Err() == nil; n++ {
		token, err := client.MintJWT(ctx, entryID(n%20), []string{"a"})
		if err != nil {
			return
		}
		svid, err := jwtsvid.ParseInsecure(token, []string{"a"})
		if err != nil {
			w.t.Error(err)
			return
		}
		parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256})
		if err != nil {
			w.t.Error(err)
			return
		}
		kid := parsed.Headers[0].KeyID
		w.mu.Lock()
		if svid.Expiry.After(w.issuedJWT[kid]) {
			w.issuedJWT[kid] = svid.Expiry
		}
		w.mu.Unlock()
		w.done(func(p *progress) { p.tokens++ })
	}
}

// inspect reads the store of the killed server.
func (w *crashWorld) inspect() {
	t := w.t
	t.Helper()
	ctx := t.Context()
	key, err := seal.File(w.dir + "/key.json")
	if err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(filepath.Join(w.dir, "data", server.FileName), store.Options{TrustDomain: td, Seal: key, ReadOnly: true})
	if err != nil {
		t.Fatalf("after %+v: %v", w.step, err)
	}
	defer s.Close()
	kept := s.Deployment("default")

	doc, err := kept.Load(ctx)
	if err != nil {
		t.Fatal(err)
	}
	states := map[string]keyset.State{}
	x509IDs, jwtIDs := map[string]bool{}, map[string]bool{}
	for _, r := range doc.Records {
		states[r.ID] = r.State
		ca, err := x509.ParseCertificate(r.CA)
		if err != nil {
			t.Fatal(err)
		}
		x509IDs[hex.EncodeToString(ca.SubjectKeyId)], jwtIDs[r.JWTKeyID] = true, true
		for _, der := range [][]byte{r.CAKey, r.JWTKey} {
			if _, err := x509.ParsePKCS8PrivateKey(der); err != nil {
				t.Errorf("keyset %s has lost a key", r.ID)
			}
		}
	}
	w.settle(states)

	// Exactly one is active, and it signs: keyset.Open checks it all.
	d, err := keyset.Open(ctx, keyset.Config{TrustDomain: td, Storage: kept})
	if err != nil {
		t.Fatalf("after %+v: %v", w.step, err)
	}
	probe, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.SignX509(spiffeid.RequireFromPath(td, "/probe"), probe.Public(), 0); err != nil {
		t.Errorf("after %+v the active keyset does not sign: %v", w.step, err)
	}

	records, err := kept.Audit(ctx, w.audited, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range records {
		if w.audited++; r.Number != w.audited {
			t.Errorf("the audit log has record %d after %d", r.Number, w.audited-1)
		}
		if len(r.After) > 0 { // of the keysets; the others are of entries, tokens and agents
			w.changes, w.last = w.changes+1, r
		}
	}
	if w.changes != doc.Version {
		t.Errorf("the audit log has %d records of %d changes", w.changes, doc.Version)
	}
	if !maps.Equal(w.last.After, states) {
		t.Errorf("the audit log ends with %v, the state is %v", w.last.After, states)
	}

	known := map[string]time.Time{}
	jwtKnown, err := kept.LoadLedger(ctx, func(r ledger.Row) { known[r.Authority+" "+r.Agent+" "+r.Entry] = r.NotAfter })
	if err != nil {
		t.Fatal(err)
	}
	var still []ledger.Row
	for _, r := range w.issued {
		if !x509IDs[r.Authority] {
			continue // removed: its SVIDs no longer verify
		}
		still = append(still, r)
		if known[r.Authority+" "+r.Agent+" "+r.Entry].Before(r.NotAfter) {
			t.Errorf("an X.509-SVID for %s, valid until %v, was issued and the ledger has %v", r.Entry, r.NotAfter, known[r.Authority+" "+r.Agent+" "+r.Entry])
		}
	}
	w.issued = still
	for kid, expiry := range w.issuedJWT {
		if jwtIDs[kid] && jwtKnown[kid].Before(expiry) {
			t.Errorf("a JWT-SVID valid until %v was issued and the ledger has %v", expiry, jwtKnown[kid])
		}
	}
}

// settle checks that the states are those before or after the step in progress, and
// continues from there.
func (w *crashWorld) settle(states map[string]keyset.State) {
	w.t.Helper()
	if w.step.operation == "" {
		if !maps.Equal(states, w.states) {
			w.t.Fatalf("no step was in progress, and the state is %v instead of %v", states, w.states)
		}
		return
	}
	w.inFlight++
	if maps.Equal(states, w.states) {
		return
	}
	if w.step.operation == "prepare" && w.step.id == "" {
		for id := range states {
			if _, old := w.states[id]; !old {
				w.step.id = id
			}
		}
	}
	if want := w.step.applied(w.states); !maps.Equal(states, want) {
		w.t.Fatalf("%+v was in progress: the state is %v, must be %v or %v", w.step, states, w.states, want)
	}
	w.happened++
	w.states = states
}
