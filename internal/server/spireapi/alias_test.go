package spireapi_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/test/memory"
)

func path(p string) spiffeid.ID { return spiffeid.RequireFromPath(td, p) }

// below gives an entry a parent.
func below(parent spiffeid.ID) func(*spireapi.Entry) {
	return func(e *spireapi.Entry) { e.ParentID = parent }
}

// alias makes an entry that gives nodes with these selectors a SPIFFE ID.
func alias(id, p string, selectors ...spireapi.Selector) spireapi.Entry {
	return entry(id, below(serverID), func(e *spireapi.Entry) { e.SPIFFEID, e.Selectors = path(p), selectors })
}

var (
	inCluster = spireapi.Selector{Type: "k8s_psat", Value: "cluster:one"}
	onGPU     = spireapi.Selector{Type: "k8s_psat", Value: "agent_node_label:gpu:yes"}
)

// attested sets what is known about an agent's node, as its next attestation would.
func attested(t *testing.T, storage spireapi.Storage, id spiffeid.ID, selectors ...spireapi.Selector) {
	t.Helper()
	_, err := storage.UpdateAgent(t.Context(), id, func(a *spireapi.Agent) (*spireapi.Agent, error) {
		a.Selectors = selectors
		return a, nil
	})
	check(t, err)
}

// serves fails the test unless the agent has exactly these entries: in both forms of a
// sync, and when it asks for SVIDs.
func (c *client) serves(t *testing.T, s *running, want ...string) {
	t.Helper()
	slices.Sort(want)
	resp, err := c.GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
	check(t, err)
	_, synced, _ := receive(t, openSync(t, c, &entryv1.SyncAuthorizedEntriesRequest{}))
	var got, got2 []string
	for _, e := range resp.GetEntries() {
		got = append(got, e.GetId())
	}
	for _, e := range synced {
		got2 = append(got2, e.GetId())
	}
	if !slices.Equal(got, want) || !slices.Equal(got2, want) {
		t.Errorf("the agent has %v and syncs %v, want %v", got, got2, want)
	}
	_, csr := newKey(t)
	for _, e := range s.Entries() {
		code := codes.NotFound
		if slices.Contains(want, e.ID) {
			code = codes.OK
		}
		x509, err := c.BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{{EntryId: e.ID, Csr: csr}}})
		check(t, err)
		if got := codes.Code(x509.GetResults()[0].GetStatus().GetCode()); got != code {
			t.Errorf("X.509-SVID of %s: %v, want %v", e.ID, got, code)
		}
		if _, err := c.NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: e.ID, Audience: []string{"a"}}); status.Code(err) != code {
			t.Errorf("JWT-SVID of %s: %v, want %v", e.ID, err, code)
		}
	}
}

// TestEntriesOfAliases: an agent serves the entries of an alias all of whose selectors its node
// has, and not the alias itself. New selectors count from the next call on.
func TestEntriesOfAliases(t *testing.T) {
	t.Parallel()
	storage := memory.NewServer()
	bubble(t, spireapi.Config{Storage: storage}, func(t *testing.T, s *running) {
		one, c1 := s.join(t)
		_, c2 := s.join(t)
		s.apply(t, []spireapi.Entry{
			alias("cluster", "/cluster/one", inCluster),
			alias("gpu", "/gpu", inCluster, onGPU),
			alias("gpu-too", "/gpu", onGPU), // another way to the same ID
			entry("everyone"),
			entry("own", below(one.id)),
			entry("of-cluster", below(path("/cluster/one"))),
			entry("of-gpu", below(path("/gpu"))),
			entry("nobody", below(path("/cluster/two"))),
		})
		c1.serves(t, s, "everyone", "own")
		c2.serves(t, s, "everyone")

		attested(t, storage, one.id, inCluster)
		c1.serves(t, s, "everyone", "own", "of-cluster")
		c2.serves(t, s, "everyone")
		attested(t, storage, one.id, onGPU, inCluster)
		c1.serves(t, s, "everyone", "own", "of-cluster", "of-gpu")
		check(t, s.DeleteEntry(t.Context(), "gpu"))
		c1.serves(t, s, "everyone", "own", "of-cluster", "of-gpu")
		check(t, s.DeleteEntry(t.Context(), "gpu-too"))
		c1.serves(t, s, "everyone", "own", "of-cluster")
		_, err := s.UpsertEntry(t.Context(), alias("cluster", "/cluster/two", onGPU))
		check(t, err)
		c1.serves(t, s, "everyone", "own", "nobody")
		attested(t, storage, one.id)
		c1.serves(t, s, "everyone", "own")

		// The parent is the one that the entry has, for everyone's entries the agent.
		attested(t, storage, one.id, onGPU)
		for id, e := range s.fetch(t, one) {
			want := one.id.Path()
			if id == "nobody" {
				want = "/cluster/two"
			}
			if e.GetParentId().GetPath() != want {
				t.Errorf("parent of %s is %v", id, e.GetParentId())
			}
		}
	})
}

// TestEntriesOfAttestedNode: a node's attestation decides which aliases it has, and the next one
// decides again.
func TestEntriesOfAttestedNode(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{NodeVerifiers: []spireapi.NodeVerifier{fakeVerifier(askName)}}, func(t *testing.T, s *running) {
		s.apply(t, []spireapi.Entry{
			alias("red", "/red", spireapi.Selector{Type: "fake", Value: "red"}),
			alias("blue", "/blue", spireapi.Selector{Type: "fake", Value: "blue"}),
			entry("of-red", below(path("/red"))), entry("of-blue", below(path("/blue"))),
		})
		for payload, want := range map[string][]string{"red": {"of-red"}, "blue green": {"of-blue"}, "red blue": {"of-red", "of-blue"}} {
			time.Sleep(2 * time.Second) // for the limit of attestations
			_, node, err := s.dial(t, nil).attestNode(t, payload, "n1")
			check(t, err)
			s.dial(t, node).serves(t, s, want...)
		}
	})
}

// TestNestedEntries: the parent of an entry may be another entry, as under a SPIRE server. Who
// serves the one serves the other. Circles do no harm.
func TestNestedEntries(t *testing.T) {
	t.Parallel()
	storage := memory.NewServer()
	bubble(t, spireapi.Config{Storage: storage}, func(t *testing.T, s *running) {
		one, c1 := s.join(t)
		two, c2 := s.join(t)
		attested(t, storage, two.id, inCluster)
		s.apply(t, []spireapi.Entry{
			alias("cluster", "/cluster/one", inCluster),
			entry("a", below(one.id)),
			entry("b", below(path("/workload/a"))),
			entry("c", below(path("/workload/b"))),
			entry("a2", below(path("/cluster/one")), func(e *spireapi.Entry) { e.SPIFFEID = path("/workload/b") }),
			entry("self", below(path("/workload/self"))),
			entry("x", below(path("/workload/y"))),
			entry("y", below(path("/workload/x"))),
		})
		c1.serves(t, s, "a", "b", "c")
		c2.serves(t, s, "a2", "c")
		_, err := s.UpsertEntry(t.Context(), entry("c", below(path("/workload/x"))))
		check(t, err)
		c1.serves(t, s, "a", "b")
		_, err = s.UpsertEntry(t.Context(), entry("y", below(one.id)))
		check(t, err)
		c1.serves(t, s, "a", "b", "x", "y", "c")
	})
}

// TestOperatorsEntries: an entry of an operator's ID that several agents could serve, by an
// alias, by another entry or without a parent, is refused unless that is said.
func TestOperatorsEntries(t *testing.T) {
	t.Parallel()
	boss := path("/ops/boss")
	bubble(t, spireapi.Config{IsOperator: func(id spiffeid.ID) bool { return id == boss }}, func(t *testing.T, s *running) {
		operator := func(change ...func(*spireapi.Entry)) spireapi.Entry {
			return entry("boss", append(change, func(e *spireapi.Entry) { e.SPIFFEID = boss })...)
		}
		for _, parent := range []spiffeid.ID{{}, path("/cluster/one"), path("/workload/a")} {
			if _, err := s.UpsertEntry(t.Context(), operator(below(parent))); err == nil {
				t.Errorf("parent %q: no error", parent)
			}
			_, err := s.UpsertEntry(t.Context(), operator(below(parent), func(e *spireapi.Entry) { e.Operator = true }))
			check(t, err)
		}
		_, err := s.UpsertEntry(t.Context(), operator(below(path("/spire/agent/x509pop/1"))))
		check(t, err)
	})
}

// TestExpiredEntriesAreDeleted: with the lower bound of the time, not with the clock.
func TestExpiredEntriesAreDeleted(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{AtLeast: func() time.Time { return time.Now().Add(-time.Hour) }}, func(t *testing.T, s *running) {
		until := func(at time.Time) func(*spireapi.Entry) {
			return func(e *spireapi.Entry) { e.ExpiresAt = at }
		}
		now := time.Now()
		s.apply(t, []spireapi.Entry{entry("stays"), entry("later", until(now.Add(2*time.Hour))), entry("soon", until(now.Add(time.Minute)))})
		for _, step := range []struct {
			after time.Duration
			left  int
		}{{30 * time.Minute, 3}, {30*time.Minute + time.Minute, 3}, {time.Second, 2}, {2 * time.Hour, 1}} {
			time.Sleep(step.after)
			check(t, s.PruneEntries(t.Context()))
			if n := len(s.Entries()); n != step.left {
				t.Errorf("after %v: %d entries, want %d", time.Since(now), n, step.left)
			}
		}
	})
}

// servedBy returns the IDs of the entries that an agent serves: the definition, without an
// index.
func servedBy(all []spireapi.StoredEntry, a *spireapi.Agent) []string {
	parents := map[spiffeid.ID]bool{{}: true, a.ID: true}
	for _, e := range all {
		if e.ParentID == serverID && !slices.ContainsFunc(e.Selectors, func(s spireapi.Selector) bool { return !slices.Contains(a.Selectors, s) }) {
			parents[e.SPIFFEID] = true
		}
	}
	served := map[string]bool{}
	for again := true; again; {
		again = false
		for _, e := range all {
			if e.ParentID != serverID && parents[e.ParentID] && !served[e.ID] {
				served[e.ID], parents[e.SPIFFEID], again = true, true, true
			}
		}
	}
	var ids []string
	for _, e := range all { // ordered by ID
		if served[e.ID] {
			ids = append(ids, e.ID)
		}
	}
	return ids
}

// TestEntrySetHistories changes random entries, few or many at a time, and compares each set
// with the definitions. RENEWD_SEED replays one history.
func TestEntrySetHistories(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	if s, err := strconv.ParseUint(os.Getenv("RENEWD_SEED"), 10, 64); err == nil {
		seed = s
	}
	t.Logf("RENEWD_SEED=%d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	agents := make([]*spireapi.Agent, 3)
	parents := []spiffeid.ID{{}, serverID}
	for i := range agents {
		agents[i] = &spireapi.Agent{ID: path(fmt.Sprintf("/spire/agent/x509pop/%d", i))}
		parents = append(parents, agents[i].ID)
	}
	for i := range 6 {
		parents = append(parents, path(fmt.Sprintf("/w/%d", i)))
	}
	selectors := []spireapi.Selector{inCluster, onGPU, {Type: "k8s_psat", Value: "agent_ns:a"}}
	some := func() (out []spireapi.Selector) {
		for _, s := range selectors {
			if rng.IntN(2) == 0 {
				out = append(out, s)
			}
		}
		return out
	}
	s := newServer(t, spireapi.Config{})
	random := func() spireapi.Entry {
		return entry(fmt.Sprintf("e%02d", rng.IntN(30)), below(parents[rng.IntN(len(parents))]), func(e *spireapi.Entry) {
			e.SPIFFEID, e.Selectors = path(fmt.Sprintf("/w/%d", rng.IntN(10))), append(some(), selectors[rng.IntN(len(selectors))])
		})
	}
	for step := range 400 {
		before, was := s.EntrySet(), s.Entries()
		_, err := s.EditEntries(t.Context(), func(c *spireapi.EntryEdit) error {
			for range 1 + rng.IntN(3)*rng.IntN(10) {
				e := random()
				if rng.IntN(3) == 0 {
					c.Delete(e.ID)
				} else if _, err := c.Put(e); err != nil {
					return err
				}
				if similar := c.Similar(e); c.Entry(e.ID) != nil && (similar == nil || similar.SPIFFEID != e.SPIFFEID || similar.ParentID != e.ParentID) {
					t.Errorf("step %d: similar to %v: %v", step, e, similar)
				}
			}
			return nil
		})
		check(t, err)
		all := s.Entries()
		for _, a := range agents {
			a.Selectors = some()
			var got []string
			for _, e := range s.EntrySet().Authorized(a) {
				got = append(got, e.ID)
			}
			if want := servedBy(all, a); !slices.Equal(got, want) {
				t.Fatalf("step %d: agent with %v has %v, want %v; all are %v", step, a.Selectors, got, want, all)
			}
		}
		for _, id := range parents {
			for name, list := range map[string]struct {
				got []*spireapi.StoredEntry
				of  func(spireapi.StoredEntry) spiffeid.ID
			}{
				"parent":    {s.EntrySet().OfParent(id), func(e spireapi.StoredEntry) spiffeid.ID { return e.ParentID }},
				"SPIFFE ID": {s.EntrySet().OfSPIFFEID(id), func(e spireapi.StoredEntry) spiffeid.ID { return e.SPIFFEID }},
			} {
				var got, want []string
				for _, e := range list.got {
					got = append(got, e.ID)
				}
				for _, e := range all {
					if list.of(e) == id {
						want = append(want, e.ID)
					}
				}
				if !slices.Equal(got, want) {
					t.Fatalf("step %d: of %s %q: %v, want %v", step, name, id, got, want)
				}
			}
		}
		// The set before is as it was.
		for i, e := range before.All() {
			if len(before.All()) != len(was) || e.ID != was[i].ID || e.Revision != was[i].Revision || before.Entry(e.ID) != e {
				t.Fatalf("step %d: an earlier set has changed", step)
			}
		}
	}
}
