package server_test

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/test/bufconn"

	"github.com/renewd/renewd/internal/server"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/rotation"
	"github.com/renewd/renewd/internal/server/seal"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/test/listentest"
)

// TestNoClockCostsAKeyset repeatedly sets the clock of a server with automatic rotation,
// ahead and back, by minutes to years, at runtime and at restarts. Some agents report,
// others do not, and one reports the time of the server's clock. A clock that is up to
// three days ahead is corrected within a day, any other at any time. By the true time:
//
//   - No keyset is removed from the trust bundle while an SVID that it signed is valid or
//     will be.
//   - No keyset is reported safe to remove before.
//   - No keyset that an operator replaced is tainted before it has expired.
//   - Nothing is done while the clock is in doubt and no other clock agrees with it.
//   - A minute after the clock is right the server attests and signs, and the SVIDs verify.
//     It serves every agent whose agent SVID has not expired, whichever clock that began by.
//
// RENEWD_SEED replays one history; RENEWD_HISTORIES sets their number.
func TestNoClockCostsAKeyset(t *testing.T) {
	t.Parallel()
	histories := 2
	if n, err := strconv.Atoi(os.Getenv("RENEWD_HISTORIES")); err == nil {
		histories = n
	}
	var met tally
	if seed, err := strconv.ParseUint(os.Getenv("RENEWD_SEED"), 10, 64); err == nil {
		playClock(t, seed, &met)
		return
	}
	base := rand.Uint64()
	for i := range histories {
		playClock(t, base+uint64(i), &met)
		if t.Failed() {
			return
		}
	}
	// Without any of these the checks above would check nothing.
	if histories >= 8 && (met.removed == 0 || met.safe == 0 || met.doubts == 0 || met.served == 0) {
		t.Errorf("met %+v, want some of each", met)
	}
}

// TestCallsEndTheWait: after an outage of four days automatic rotation waits for an
// hour, and then for an agent whose clock agrees. A stock agent does not report its
// clock. An agent's report does not make the server believe its clock.
func TestCallsEndTheWait(t *testing.T) {
	t.Parallel()
	inClockHistory(t, 1, 90*day, func(h *clockHistory) {
		h.config.X509TTL = 3 * day
		h.restart(0, 0)
		h.entries()
		h.restart(4*day, 0)
		reports := &clockNode{reports: true, svids: map[string][]*identity{}}
		stock := &clockNode{svids: map[string][]*identity{}}
		visit := func(n *clockNode, doubt time.Duration, waits bool) {
			h.t.Helper()
			check(h.t, h.visit(n))
			if s := h.Clock(); s.Doubt.Round(time.Hour) != doubt || s.Waits != waits {
				h.t.Errorf("after %v: %+v, want doubt %v, waits %v", s.SteadyFor, s, doubt, waits)
			}
		}
		visit(reports, 4*day, true)
		time.Sleep(59 * time.Minute)
		visit(reports, 4*day, true)
		time.Sleep(time.Minute)
		visit(stock, 4*day, true)
		visit(reports, 4*day, false)
		time.Sleep(2 * day)
		visit(stock, 4*day, false)
		if s := h.Clock(); time.Until(s.AtLeast).Round(time.Hour) != -4*day {
			h.t.Errorf("after an agent's report it is at least %v, now %v", s.AtLeast, time.Now())
		}
		h.stop()
	})
}

// tally counts what the histories have covered.
type tally struct{ removed, safe, doubts, lies, served int }

func playClock(t *testing.T, seed uint64, met *tally) {
	t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
		inClockHistory(t, seed, 4*day, func(h *clockHistory) {
			h.met = met
			h.play()
		})
	})
}

func inClockHistory(t *testing.T, seed uint64, lifetime time.Duration, f func(*clockHistory)) {
	dir := t.TempDir()
	check(t, seal.NewFile(filepath.Join(dir, "key.json")))
	synctest.Test(t, func(t *testing.T) {
		h := &clockHistory{t: t, rand: rand.New(rand.NewPCG(seed, 0)), known: map[string]keyset.Keyset{}}
		h.config = server.Config{
			TrustDomain: td, DataDir: filepath.Join(dir, "data"), KeyFile: filepath.Join(dir, "key.json"),
			KeysetLifetime: lifetime, Now: h.wall,
		}
		f(h)
	})
}

type clockHistory struct {
	*running
	t      *testing.T
	rand   *rand.Rand
	config server.Config
	met    *tally
	off    atomic.Int64 // of the server's clock
	lis    *bufconn.Listener
	nodes  []*clockNode
	known  map[string]keyset.Keyset
	lied   bool          // an agent has reported a wrong time since the clock is wrong
	down   time.Duration // total of the outages since the last confirmation
}

func (h *clockHistory) wall() time.Time { return time.Now().Add(time.Duration(h.off.Load())) }

// between draws a duration.
func (h *clockHistory) between(least, most time.Duration) time.Duration {
	return least + time.Duration(h.rand.Int64N(int64(most-least)))
}

func (h *clockHistory) chance(of int) bool { return h.rand.IntN(of) == 0 }

// restart stops the server, if one runs, and starts another after a while.
func (h *clockHistory) restart(after time.Duration, off time.Duration) {
	if h.running != nil {
		h.stop()
	}
	time.Sleep(after)
	h.off.Store(int64(off))
	h.lis = bufconn.Listen(1 << 16)
	h.config.Deployments = []server.DeploymentConfig{{Name: "default", Listener: listentest.From(h.lis, listentest.Elsewhere)}}
	h.running = run(h.t, h.config)
}

// entries creates the entries of two workloads, with SVIDs of one day and of three.
func (h *clockHistory) entries() {
	id := func(path string) spiffeid.ID { return spiffeid.RequireFromPath(td, path) }
	selectors := []spireapi.Selector{{Type: "unix", Value: "uid:0"}}
	_, err := h.Server("default").ApplyEntries(h.t.Context(), []spireapi.Entry{
		{ID: "web", SPIFFEID: id("/web"), Selectors: selectors},
		{ID: "long", SPIFFEID: id("/long"), Selectors: selectors, X509TTL: 3 * day},
	}, false)
	check(h.t, err)
}

func (h *clockHistory) play() {
	h.restart(0, 0)
	h.entries()
	for range 2 {
		h.nodes = append(h.nodes, &clockNode{reports: true}, &clockNode{})
	}
	if h.chance(2) {
		h.nodes = append(h.nodes, &clockNode{reports: true, lies: true})
	}
	for _, n := range h.nodes {
		n.svids = map[string][]*identity{}
	}
	for range 3 {
		h.live(h.between(time.Hour, 2*day), 6*time.Hour)
		if h.chance(2) {
			h.operate()
		}
		h.live(h.between(time.Hour, day), 6*time.Hour)
		if h.chance(4) {
			h.outage()
		}
		h.wrong()
	}
	h.stop()
}

// live lets agents call for d, at intervals of every at most.
func (h *clockHistory) live(d, every time.Duration) {
	for end := time.Now().Add(d); time.Now().Before(end); {
		for _, n := range h.nodes {
			if h.chance(4) {
				continue
			}
			if err := h.visit(n); err != nil && h.chance(3) {
				n.own = nil // it re-attests
			}
		}
		h.checkInvariants()
		time.Sleep(min(h.between(time.Minute, every), time.Until(end)))
		h.checkInvariants()
	}
}

// operate replaces the active keyset as an operator does.
func (h *clockHistory) operate() {
	ctx := keyset.WithActor(h.t.Context(), "unix:uid:0")
	keysets := h.Server("default").Keysets()
	k, err := keysets.Prepare(ctx)
	check(h.t, err)
	check(h.t, keysets.Activate(ctx, k.ID))
}

// outage stops the server for up to five days. After more than three its clock is in
// doubt although it is right, until the operator confirms it.
func (h *clockHistory) outage() {
	d := h.between(time.Hour, 5*day)
	h.restart(d, 0)
	h.down += d
	h.checkRecovered("an outage of " + d.String())
}

// wrong sets the clock, lets time pass and sets it right again.
func (h *clockHistory) wrong() {
	var far, long time.Duration
	switch h.rand.IntN(3) {
	case 0:
		far, long = h.between(time.Minute, 70*time.Hour), h.between(time.Minute, 20*time.Hour)
	case 1:
		far, long = h.between(73*time.Hour, []time.Duration{10 * day, 100 * day, 5 * 365 * day}[h.rand.IntN(3)]), h.between(time.Minute, 60*time.Hour)
	case 2:
		far, long = -h.between(6*time.Minute, []time.Duration{day, 100 * day, 5 * 365 * day}[h.rand.IntN(3)]), h.between(time.Minute, 60*time.Hour)
	}
	synctest.Wait()
	h.lied = false
	before := h.states()
	if h.chance(2) {
		h.restart(0, far)
	} else {
		h.off.Store(int64(far))
	}
	h.live(long, long/3+2*time.Minute)
	if far.Abs() > 80*time.Hour {
		h.met.doubts++
		if after := h.states(); !h.lied && !maps.Equal(before, after) {
			h.t.Errorf("clock was %v off for %v: keysets were %v and are %v", far, long, before, after)
		}
	}
	if h.lied {
		h.met.lies++
	}
	if h.chance(2) {
		h.restart(0, 0)
	} else {
		h.off.Store(0)
	}
	h.checkRecovered(fmt.Sprintf("a clock that was %v off for %v", far, long))
}

func (h *clockHistory) states() map[string]keyset.State {
	out := map[string]keyset.State{}
	for _, k := range h.Server("default").Keysets().Status().Keysets {
		out[k.ID] = k.State
	}
	return out
}

// checkRecovered checks that the server attests, signs and serves its agents a minute
// after its clock was corrected.
func (h *clockHistory) checkRecovered(after string) {
	h.t.Helper()
	time.Sleep(time.Second)
	if s := h.Clock(); s.Doubt != 0 {
		if h.down < 3*day-time.Hour { // the heartbeat before an outage may be an hour old
			h.t.Fatalf("after %s the clock, which is right, is in doubt: %+v", after, s)
		}
		ok, err := h.ConfirmClock(h.t.Context(), time.Now())
		check(h.t, err)
		if !ok || h.Clock().Doubt != 0 {
			h.t.Fatalf("after %s it is not confirmed", after)
		}
		h.down = 0
	}
	time.Sleep(time.Minute + time.Second) // the scheduler runs once a minute at least
	h.checkInvariants()
	cert, err := h.Server("default").Certificate()
	if err != nil {
		h.t.Fatalf("a minute after %s: %v", after, err)
	}
	trust := x509bundle.FromX509Authorities(td, h.Published().Certificates())
	if _, _, err := x509svid.ParseAndVerify(cert.Certificate, trust); err != nil {
		h.t.Fatalf("a minute after %s the server shows: %v", after, err)
	}
	n := &clockNode{svids: map[string][]*identity{}}
	if err := h.visit(n); err != nil {
		h.t.Fatalf("a minute after %s a new agent gets: %v", after, err)
	}
	if _, _, err := x509svid.Verify(n.svids["web"][0].chain, trust); err != nil {
		h.t.Fatalf("a minute after %s a workload gets: %v", after, err)
	}
	n.jwts, n.svids = nil, nil // the node is gone
	for _, n := range h.nodes {
		if n.own != nil && lives(n.own) {
			h.met.served++
			if err := h.visit(n); err != nil {
				h.t.Fatalf("a minute after %s an agent, with an agent SVID from %v to %v, gets: %v", after, n.own.chain[0].NotBefore, n.own.chain[0].NotAfter, err)
			}
		}
	}
}

// checkInvariants checks what must hold at every moment.
func (h *clockHistory) checkInvariants() {
	h.t.Helper()
	x509, keys := map[string]time.Time{}, map[string]time.Time{} // latest expiry of the SVIDs held
	for _, n := range h.nodes {
		for _, ident := range n.holds() {
			if end := ident.chain[0].NotAfter; end.After(x509[authorityOf(ident)]) {
				x509[authorityOf(ident)] = end
			}
		}
		for _, j := range n.jwts {
			if time.Now().Before(j.exp) && j.exp.After(keys[j.key]) {
				keys[j.key] = j.exp
			}
		}
	}
	f, err := h.Figures(context.Background(), "default")
	check(h.t, err)
	fail := func(k keyset.Keyset, what string, end time.Time) {
		h.t.Helper()
		h.t.Fatalf("%v, clock %v off: keyset %s %s, but is needed until %v: %+v", time.Now(), time.Duration(h.off.Load()), k.ID, what, end, k)
	}
	there := map[string]bool{}
	for _, k := range f.Keysets {
		there[k.ID] = true
		before, known := h.known[k.ID]
		h.known[k.ID] = k.Keyset
		if end, held := x509[k.X509AuthorityID]; held && k.X509Safe {
			fail(k.Keyset, "is reported safe", end)
		}
		if end, held := keys[k.JWTKeyID]; held && k.JWTSafe {
			fail(k.Keyset, "is reported safe for JWT-SVIDs", end)
		}
		if k.X509Safe {
			h.met.safe++
		}
		if known && before.State != keyset.Tainted && k.State == keyset.Tainted && k.SteppedDownBy != rotation.Actor && time.Now().Before(k.ExpiresAt) {
			fail(k.Keyset, "is tainted, though it is the operator's and has not expired", k.ExpiresAt)
		}
	}
	for id, k := range h.known {
		if there[id] {
			continue
		}
		delete(h.known, id)
		h.met.removed++
		if end, held := x509[k.X509AuthorityID]; held {
			fail(k, "was removed", end)
		}
		if end, held := keys[k.JWTKeyID]; held {
			fail(k, "was removed", end)
		}
	}
	if s := h.Clock(); s.AtLeast.After(time.Now().Add(time.Second)) {
		h.t.Fatalf("%v, clock %v off: reported to be at least %v", time.Now(), time.Duration(h.off.Load()), s.AtLeast)
	}
}
