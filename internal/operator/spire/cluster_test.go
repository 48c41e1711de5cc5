package spire_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/operator/prom"
	"github.com/renewd/renewd/internal/operator/runbook"
	"github.com/renewd/renewd/internal/operator/spire"
	"github.com/renewd/renewd/internal/refusal"
)

// join returns another server of f's cluster, with keys that are a day younger.
func (f *fakeSPIRE) join() *fakeSPIRE {
	g := newFake(f.t)
	g.mu, g.sequence, g.now = f.mu, f.sequence, f.now
	g.x.bundle, g.j.bundle = f.x.bundle, f.j.bundle
	f.mu.Lock()
	defer f.mu.Unlock()
	g.x.active, g.j.active = g.create("X509"), g.create("JWT")
	return g
}

// later moves the clock of all servers.
func later(d time.Duration, servers ...*fakeSPIRE) {
	for _, f := range servers {
		f.now = f.now.Add(d)
	}
}

// cluster is some servers and a backend for them.
type cluster struct {
	servers []*fakeSPIRE
	sockets []string
	notices []string
	b       *spire.Backend
}

func newCluster(t *testing.T, n int, c spire.Config) *cluster {
	t.Helper()
	out := &cluster{servers: []*fakeSPIRE{newFake(t)}}
	for range n - 1 {
		out.servers = append(out.servers, out.servers[0].join())
	}
	later(24*time.Hour, out.servers...)
	for _, f := range out.servers {
		out.sockets = append(out.sockets, f.listen())
	}
	c.Sockets, c.Now = out.sockets, func() time.Time { return out.servers[0].now }
	c.Notice = func(text string) { out.notices = append(out.notices, text) }
	out.b = open(t, c)
	return out
}

// calls returns the mutations of all servers since the last call.
func (c *cluster) calls() string {
	var all []string
	for i, f := range c.servers {
		for call := range strings.FieldsSeq(f.takeCalls()) {
			all = append(all, fmt.Sprintf("%s@%d", call, i+1))
		}
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}

// steps are the steps of a rotation from OLD to NEW, and the calls at each server.
var clusterSteps = []struct {
	name  string
	calls []string // in order
	done  string   // the states afterwards
}{
	{"prepare", []string{"PrepareX509", "PrepareJWT"}, "Active/Active Prepared/Prepared"},
	{"activate", []string{"ActivateX509", "ActivateJWT"}, "Prepared/Prepared Active/Active"},
	{"taint", []string{"TaintX509", "TaintJWT"}, "Tainted/Tainted Active/Active"},
	{"remove", []string{"RevokeJWT", "RevokeX509"}, "Active/Active"},
}

func (c *cluster) step(t *testing.T, name, older, newer string) error {
	switch name {
	case "prepare":
		_, err := c.b.Prepare(t.Context())
		return err
	case "activate":
		return c.b.Activate(t.Context(), newer)
	case "taint":
		return c.b.Taint(t.Context(), older)
	}
	return c.b.Remove(t.Context(), older, true)
}

// ids returns the IDs of the older and the newer keyset, by any key of theirs.
func (c *cluster) ids(t *testing.T) (older, newer string) {
	t.Helper()
	_, s := rows(t, c.b)
	older = s.Keysets[0].ID
	if len(s.Keysets) > 1 {
		newer = s.Keysets[1].ID
	}
	return older, newer
}

// TestClusterStepsInterrupted lets each call of a step fail at each server, before or after
// it is executed. Then the next step is refused, names the server and changes nothing,
// and the same step again makes the missing calls only.
func TestClusterStepsInterrupted(t *testing.T) {
	t.Parallel()
	const n = 2
	for at, st := range clusterSteps {
		for server := range n {
			for _, call := range st.calls {
				for _, lost := range []bool{false, true} {
					t.Run(fmt.Sprintf("%s@%d lost %v", call, server+1, lost), func(t *testing.T) {
						t.Parallel()
						c := newCluster(t, n, spire.Config{})
						older, newer := c.ids(t)
						for _, before := range clusterSteps[:at] {
							must(t, c.step(t, before.name, older, newer))
							if before.name == "prepare" {
								_, newer = c.ids(t)
							}
						}
						c.calls()
						fail := func(name string) error {
							if name == call {
								return status.Error(codes.Unavailable, "connection lost")
							}
							return nil
						}
						if lost {
							c.servers[server].hook(nil, fail)
						} else {
							c.servers[server].hook(fail, nil)
						}
						c.notices = nil
						err := c.step(t, st.name, older, newer)
						if err == nil || !strings.Contains(err.Error(), c.sockets[server]) || !errors.Is(err, runbook.ErrOutcomeUnknown) {
							t.Fatalf("error %v", err)
						}
						c.servers[server].hook(nil, nil)
						made := strings.Fields(c.calls())
						if newer == "" {
							if _, s := rows(t, c.b); len(s.Keysets) > 1 {
								newer = s.Keysets[1].ID
							}
						}
						// Any other step is refused, unless nothing or everything was done.
						states, _ := rows(t, c.b)
						last := n - 1
						if st.name == "remove" {
							last = 0
						}
						complete := lost && call == st.calls[1] && server == last
						begun := lost || len(made) > 1
						for i, other := range clusterSteps {
							if i != at && begun && !complete {
								err := c.step(t, other.name, older, newer)
								if err == nil || errors.Is(err, runbook.ErrOutcomeUnknown) || c.calls() != "" {
									t.Errorf("%s after a part of %s (%s): %v", other.name, st.name, states, err)
								}
								if i == at+1 && !strings.Contains(err.Error(), "again") {
									t.Errorf("%s after a part of %s gives no remedy: %v", other.name, st.name, err)
								}
							}
						}
						olderNow, _ := c.ids(t)
						if !complete && olderNow != older {
							t.Errorf("the ID changed from %s to %s", older, olderNow)
						}
						if !complete {
							must(t, c.step(t, st.name, older, newer))
						}
						made = append(made, strings.Fields(c.calls())...)
						if !lost { // it was called twice
							i := slices.Index(made, fmt.Sprintf("%s@%d", call, server+1))
							made = slices.Delete(made, i, i+1)
						}
						slices.Sort(made)
						var want []string
						for i := range n {
							for _, name := range st.calls {
								want = append(want, fmt.Sprintf("%s@%d", name, i+1))
							}
						}
						slices.Sort(want)
						if !slices.Equal(made, want) {
							t.Errorf("calls %v, want %v", made, want)
						}
						wantRows(t, c.b, st.done)
					})
				}
			}
		}
	}
}

func TestClusterRotation(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2, spire.Config{Figures: safeFigures})
	older, _ := c.ids(t)
	r, err := runbook.Rotate(t.Context(), c.b, runbook.RotateOptions{Wait: runbook.WaitOptions{Now: func() time.Time { return c.servers[0].now }}})
	must(t, err)
	if !r.Complete || len(r.Steps) != 4 {
		t.Errorf("rotation %+v", r)
	}
	s := wantRows(t, c.b, "Active/Active")
	if k := s.Keysets[0]; k.ID == older || len(k.Members) != 2 || k.Members[1].X509AuthorityID != c.servers[1].x.active || k.Members[1].Server != c.sockets[1] || len(s.Unowned) != 0 {
		t.Errorf("left is %+v", k)
	}
	want := []string{
		"Server 1 of 2 (%[1]s): prepared.", "Server 2 of 2 (%[2]s): prepared.", "Server 1 of 2 (%[1]s): activated.", "Server 2 of 2 (%[2]s): activated.",
		"Server 1 of 2 (%[1]s): tainted.", "Server 2 of 2 (%[2]s): tainted.", "Server 1 of 2 (%[2]s): removed.", "Server 2 of 2 (%[1]s): removed.",
	}
	for i := range want {
		want[i] = fmt.Sprintf(want[i]+"%.0[3]s", c.sockets[0], c.sockets[1], "")
	}
	if !slices.Equal(c.notices, want) {
		t.Errorf("notices\n%s\nwant\n%s", strings.Join(c.notices, "\n"), strings.Join(want, "\n"))
	}
}

// TestAnyID: a keyset goes by the ID of any of its keys, also while it is half removed.
func TestAnyID(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2, spire.Config{Figures: safeFigures})
	first := c.servers[1].x.active
	_, err := c.b.Prepare(t.Context())
	must(t, err)
	must(t, c.b.Activate(t.Context(), c.servers[1].j.next))
	must(t, c.b.Taint(t.Context(), first))
	w, err := runbook.Wait(t.Context(), c.b, "ks_"+first[:10], runbook.WaitOptions{})
	if err != nil || !w.Safe {
		t.Errorf("wait: %+v, %v", w, err)
	}
	c.servers[0].hook(func(string) error { return status.Error(codes.PermissionDenied, "no") }, nil)
	if err := c.b.Remove(t.Context(), first, true); err == nil {
		t.Fatal("removed")
	}
	c.servers[0].hook(nil, nil)
	s := wantRows(t, c.b, "Tainted/Tainted Active/Active")
	if m := s.Keysets[0].Members; len(m) != 2 || m[1].State != runbook.Removed || m[1].ID != "ks_"+first[:10] || m[0].State != runbook.Tainted {
		t.Errorf("members %+v", m)
	}
	must(t, c.b.Remove(t.Context(), "ks_"+first[:10], true))
	wantRows(t, c.b, "Active/Active")
}

func TestServerDown(t *testing.T) {
	t.Parallel()
	for at := range clusterSteps {
		c := newCluster(t, 2, spire.Config{})
		older, newer := c.ids(t)
		for _, st := range clusterSteps[:at] {
			must(t, c.step(t, st.name, older, newer))
			if st.name == "prepare" {
				_, newer = c.ids(t)
			}
		}
		c.calls()
		c.servers[1].stop()
		err := c.step(t, clusterSteps[at].name, older, newer)
		if _, down := errors.AsType[*runbook.UnreachableError](err); !down || !strings.Contains(err.Error(), "nothing was changed: not all of the 2 servers answer: SPIRE server at "+c.sockets[1]) ||
			errors.Is(err, runbook.ErrOutcomeUnknown) {
			t.Errorf("%s: %v", clusterSteps[at].name, err)
		}
		if calls := c.calls(); calls != "" {
			t.Errorf("%s: calls %s", clusterSteps[at].name, calls)
		}
		// The other server is shown, and what is missing is no base for a wait.
		s, err := c.b.Status(t.Context())
		if _, down := errors.AsType[*runbook.UnreachableError](err); !down || len(s.Keysets) == 0 || s.Keysets[0].Members[0].Server != c.sockets[0] {
			t.Errorf("status %+v, %v", s, err)
		}
		if _, err := runbook.Wait(t.Context(), c.b, older, runbook.WaitOptions{Timeout: time.Millisecond}); err == nil {
			t.Error("a wait ended although a server is down")
		}
	}
}

// TestReplacedServer replaces a server by one with other keys between each two steps. The
// rotation completes, and what the former server leaves in the bundle is shown.
func TestReplacedServer(t *testing.T) {
	t.Parallel()
	for at, left := range []int{2, 4, 4, 4, 2} { // authorities of the dead server
		for server := range 2 {
			t.Run(fmt.Sprintf("server %d before step %d", server+1, at+1), func(t *testing.T) {
				t.Parallel()
				c := newCluster(t, 2, spire.Config{Figures: safeFigures})
				older, newer := c.ids(t)
				for _, st := range clusterSteps[:at] {
					must(t, c.step(t, st.name, older, newer))
					if st.name == "prepare" {
						_, newer = c.ids(t)
					}
				}
				later(time.Hour, c.servers...)
				f := c.servers[server]
				f.mu.Lock()
				f.x = kind{bundle: f.x.bundle}
				f.j = kind{bundle: f.j.bundle}
				f.x.active, f.j.active = f.create("X509"), f.create("JWT")
				fresh := f.x.active
				f.mu.Unlock()
				_, before := rows(t, c.b)
				if len(before.Unowned) != left {
					t.Errorf("of no server: %+v", before.Unowned)
				}
				_, err := runbook.Rotate(t.Context(), c.b, runbook.RotateOptions{Wait: runbook.WaitOptions{Now: func() time.Time { return c.servers[0].now }}})
				must(t, err)
				s := wantRows(t, c.b, "Active/Active")
				if len(s.Unowned) != left {
					t.Errorf("of no server at the end: %+v", s.Unowned)
				}
				signs := f.x.active == fresh
				if want := at > 0 && at < 4; signs != want { // else the rotation began after it
					t.Errorf("the key of the new server signs: %v, want %v", signs, want)
				}
				if other := c.servers[1-server]; other.x.active == older {
					t.Error("the other server was left behind")
				}
			})
		}
	}
}

func TestNotOneCluster(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	a, again := f.listen(), f.listen()
	b := open(t, spire.Config{Sockets: []string{a, again}})
	if _, err := b.Status(t.Context()); err == nil || err.Error() != a+" and "+again+" are the same server: give each server once" {
		t.Errorf("one server twice: %v", err)
	}
	foreign := newFake(t).listen()
	b = open(t, spire.Config{Sockets: []string{a, foreign}})
	_, err := b.Prepare(t.Context())
	if err == nil || !strings.Contains(err.Error(), "do not share a trust bundle") || !strings.Contains(err.Error(), a) || !strings.Contains(err.Error(), foreign) {
		t.Errorf("servers of two databases: %v", err)
	}
	if calls := f.takeCalls(); calls != "" {
		t.Error("calls:", calls)
	}
}

// TestLateBundle: a server may answer for a second with a bundle that lacks the keys of one
// that has just started.
func TestLateBundle(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	g := newFake(t)
	g.mu, g.sequence = f.mu, f.sequence
	b := open(t, spire.Config{Sockets: []string{f.listen(), g.listen()}})
	done := make(chan error)
	go func() {
		_, err := b.Status(t.Context())
		done <- err
	}()
	time.AfterFunc(500*time.Millisecond, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		for id, a := range g.x.bundle {
			f.x.bundle[id] = a
		}
		for id, a := range g.j.bundle {
			f.j.bundle[id] = a
		}
		g.x.bundle, g.j.bundle = f.x.bundle, f.j.bundle
	})
	must(t, <-done)
}

func TestClusterUnderUpstreamAuthority(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2, spire.Config{})
	for _, f := range c.servers {
		f.upstream = "abcdef"
	}
	rows(t, c.b)
	if _, err := c.b.Prepare(t.Context()); err == nil || !strings.Contains(err.Error(), "rotate the upstream authority instead") || c.calls() != "" {
		t.Errorf("prepare: %v", err)
	}
}

// TestHalfOfTwoRotations has a server that another tool has left with an old X.509 and a
// prepared JWT authority.
func TestHalfOfTwoRotations(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2, spire.Config{})
	older, newer := c.ids(t)
	for _, st := range clusterSteps[:2] {
		must(t, c.step(t, st.name, older, newer))
		_, newer = c.ids(t)
	}
	if _, err := c.servers[1].prepare("PrepareJWT"); err != nil {
		t.Fatal(err)
	}
	c.calls()
	for _, st := range clusterSteps {
		if err := c.step(t, st.name, older, newer); err == nil || !strings.Contains(err.Error(), c.sockets[1]+" has an old authority of one kind") || c.calls() != "" {
			t.Errorf("%s: %v", st.name, err)
		}
	}
}

// TestBusyServer: the refusal of a cluster names the server, because others may be done.
func TestBusyServer(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2, spire.Config{})
	c.servers[1].hook(func(string) error { return invalid("unexpected authority ID") }, nil)
	_, err := c.b.Prepare(t.Context())
	if err == nil || errors.Is(err, refusal.ErrBusy) || !strings.Contains(err.Error(), "run keysetctl prepare again: "+c.sockets[1]) {
		t.Errorf("prepare: %v", err)
	}
}

// TestClusterFigures: a keyset is safe only if all of its keys are, and an agent that holds
// SVIDs of two keys is one holder.
func TestClusterFigures(t *testing.T) {
	t.Parallel()
	unsafe := map[string]bool{}
	behind := "" // the key of the second server
	end := time.Now().Add(time.Hour).Truncate(time.Second)
	figures := figuresFunc(func(x509ID, jwtID string, expected []string) (prom.Figures, error) {
		f := prom.Figures{X509Safe: !unsafe[x509ID], JWTSafe: !unsafe[jwtID], Expected: len(expected)}
		if unsafe[jwtID] {
			f.JWTExpiry = end
		}
		if unsafe[x509ID] {
			f.X509SVIDs, f.Holding = 3, 1
			f.Holders = []runbook.Holder{{Agent: "a", SVIDs: 3, Reason: "renewing"}}
			if x509ID == behind {
				f.Holders[0].Reason = "behind"
			}
		}
		return f, nil
	})
	c := newCluster(t, 2, spire.Config{Figures: figures})
	c.servers[0].agents = []*types.Agent{{X509SvidExpiresAt: c.servers[0].now.Add(time.Hour).Unix()}}
	older, newer := c.ids(t)
	for _, st := range clusterSteps[:3] {
		must(t, c.step(t, st.name, older, newer))
		_, newer = c.ids(t)
	}
	behind = c.servers[1].x.next
	for _, bad := range [][]int{{0}, {1}, {0, 1}} {
		clear(unsafe)
		for _, i := range bad {
			unsafe[c.servers[i].x.next], unsafe[c.servers[i].j.next] = true, true
		}
		k := wantRows(t, c.b, "Tainted/Tainted Active/Active").Keysets[0]
		if k.X509Safe || k.JWTSafe || k.X509SVIDs != 3*len(bad) || !k.JWTExpiry.Equal(end) {
			t.Errorf("unsafe at %v: %+v", bad, k)
		}
		h, err := c.b.Holders(t.Context(), older)
		if err != nil || len(h) != 1 || h[0].SVIDs != 3*len(bad) || (h[0].Reason == "behind") != slices.Contains(bad, 1) {
			t.Errorf("holders at %v: %+v, %v", bad, h, err)
		}
		err = c.b.Remove(t.Context(), older, false)
		if _, ok := errors.AsType[*runbook.NotSafeError](err); !ok {
			t.Errorf("remove while unsafe at %v: %v", bad, err)
		}
	}
	clear(unsafe)
	c.calls()
	must(t, c.b.Remove(t.Context(), older, false))
}

// TestClusterList has a row for each key of each server.
func TestClusterList(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2, spire.Config{})
	_, err := c.b.Prepare(t.Context())
	must(t, err)
	s, err := c.b.Status(t.Context())
	must(t, err)
	var out strings.Builder
	must(t, runbook.List(&out, s, c.servers[0].now))
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 11 || !strings.HasSuffix(lines[2], "Server") {
		t.Fatalf("list:\n%s", out.String())
	}
	for i, want := range []struct {
		socket string
		a      *authority
	}{
		{c.sockets[0], c.servers[0].x.bundle[c.servers[0].x.active]}, {c.sockets[0], c.servers[0].j.bundle[c.servers[0].j.active]},
		{c.sockets[1], c.servers[1].x.bundle[c.servers[1].x.active]}, {c.sockets[1], c.servers[1].j.bundle[c.servers[1].j.active]},
		{c.sockets[0], c.servers[0].x.bundle[c.servers[0].x.next]}, {c.sockets[0], c.servers[0].j.bundle[c.servers[0].j.next]},
		{c.sockets[1], c.servers[1].x.bundle[c.servers[1].x.next]}, {c.sockets[1], c.servers[1].j.bundle[c.servers[1].j.next]},
	} {
		line := lines[3+i]
		if !strings.HasSuffix(line, want.socket) || !strings.Contains(line, want.a.expires.UTC().String()) {
			t.Errorf("line %q, want the end %v and the server %s", line, want.a.expires, want.socket)
		}
	}
}

// TestFollowers: a SPIRE server that knows other trust domains is followed by them, as far
// as one can know.
func TestFollowers(t *testing.T) {
	t.Parallel()
	for name, set := range map[string]func(*fakeSPIRE){
		"none":         func(*fakeSPIRE) {},
		"relationship": func(f *fakeSPIRE) { f.relations = []*types.FederationRelationship{{}} },
		"bundle":       func(f *fakeSPIRE) { f.federated = []*types.Bundle{{}} },
	} {
		f := newFake(t)
		set(f)
		b := f.serve(spire.Config{})
		s, err := b.Status(context.Background())
		must(t, err)
		want := 7 * time.Minute
		if name == "none" {
			want = 0
		}
		if s.FollowersWait != want {
			t.Errorf("%s: %v, want %v", name, s.FollowersWait, want)
		}
	}
}
