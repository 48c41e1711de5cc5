package admin_test

import (
	"fmt"
	"path"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// TestBehind has agents that report their bundle in different ways. Operators and automatic
// rotation wait for the same ones.
func TestBehind(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := w.only()
		end := time.Now().Add(24 * time.Hour)
		reports := map[string]func(id string, sequence uint64){
			"reports":              func(id string, n uint64) { check(t, d.ledger.Report(t.Context(), id, ledger.Report{Sequence: n})) },
			"posts":                func(id string, n uint64) { d.ledger.Applied(id, n) },
			"posts-without-bundle": func(id string, _ uint64) { d.ledger.Applied(id, 0) },
			"silent":               func(string, uint64) {},
			// It reported before the server was started.
			"reported-version": func(string, uint64) {},
		}
		for name := range reports {
			a := spireapi.Agent{ID: agent(name), ExpiresAt: end}
			if name == "reported-version" || name == "posts-without-bundle" {
				a.Version = "1.0"
			}
			d.attest(t, a)
		}
		reportAll := func(sequence uint64) {
			for name, report := range reports {
				report(agent(name).String(), sequence)
			}
		}
		want := func(when string, behind int) {
			t.Helper()
			list, err := w.ListKeysets(t.Context(), &api.ListKeysetsRequest{})
			check(t, err)
			automatic, err := w.AgentsBehind(t.Context())
			check(t, err)
			if int(list.GetAgentsBehind()) != behind || automatic != behind || list.GetAgents() != 5 {
				t.Errorf("%s: operators see %d of %d, automatic rotation waits for %d, want %d",
					when, list.GetAgentsBehind(), list.GetAgents(), automatic, behind)
			}
		}
		named := func(agents ...string) {
			t.Helper()
			list, err := w.ListKeysets(t.Context(), &api.ListKeysetsRequest{})
			check(t, err)
			var got []string
			for _, h := range list.GetBehind() {
				got = append(got, path.Base(h.GetAgentId())+" "+h.GetReason())
			}
			if !slices.Equal(got, agents) {
				t.Errorf("named are %q, want %q", got, agents)
			}
		}
		want("at first", 5)
		time.Sleep(time.Hour)
		reportAll(d.keysets.Bundle().Sequence)
		want("all reported", 1) // reported-version is unreachable
		named("reported-version silent")
		_, err := d.keysets.Prepare(t.Context())
		check(t, err)
		reportAll(d.keysets.Bundle().Sequence - 1)
		want("a bundle is new", 5)
		named("posts behind", "posts-without-bundle behind", "reported-version silent", "reports behind", "silent silent")
		time.Sleep(3 * time.Minute)
		want("three minutes later", 3)
		reportAll(d.keysets.Bundle().Sequence)
		want("it is applied", 1)
		d.ledger.Applied(agent("reported-version").String(), d.keysets.Bundle().Sequence)
		want("the last is back", 0)
	})
}

// TestManyBehind: of very many agents that are behind, in all deployments, the first by ID
// have a name.
func TestManyBehind(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "east", "west")
		for i := range 180 {
			w.deployments[w.names[i%2]].attest(t, spireapi.Agent{ID: agent(fmt.Sprintf("%03d", i)), ExpiresAt: time.Now().Add(time.Hour), Version: "1"})
		}
		list, err := w.ListKeysets(t.Context(), &api.ListKeysetsRequest{Scope: &api.Scope{Deployment: "west"}})
		check(t, err)
		got := list.GetBehind()
		if list.GetAgentsBehind() != 180 || len(got) != 100 || got[0].GetAgentId() != agent("000").String() || got[99].GetAgentId() != agent("099").String() {
			t.Errorf("%d are behind, %d named: %v", list.GetAgentsBehind(), len(got), got)
		}
	})
}

// TestExpiredAgents: an agent counts until its agent SVID has expired by every machine's
// clock, as SVIDs do in the ledger.
func TestExpiredAgents(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.only().attest(t, spireapi.Agent{ID: agent("one"), Version: "1.0", ExpiresAt: time.Now().Add(time.Hour)})
		for _, step := range []struct {
			later time.Duration
			want  int64
		}{{0, 1}, {time.Hour + clock.Skew - time.Second, 1}, {time.Second, 0}} {
			time.Sleep(step.later)
			list, err := w.ListKeysets(t.Context(), &api.ListKeysetsRequest{})
			check(t, err)
			if list.GetAgents() != step.want || list.GetAgentsBehind() != step.want {
				t.Errorf("%v later: %d agents, %d behind, want %d", step.later, list.GetAgents(), list.GetAgentsBehind(), step.want)
			}
		}
	})
}

// TestDuplicated: if two processes report for one agent, operators see it as duplicated until
// it is evicted.
func TestDuplicated(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "east", "west")
		for _, name := range w.names {
			for _, id := range []string{"cloned-" + name, "good-" + name} {
				w.deployments[name].attest(t, spireapi.Agent{ID: agent(id), ExpiresAt: time.Now().Add(time.Hour)})
			}
			for i, process := range []string{"a", "b", "a"} {
				check(t, w.deployments[name].ledger.Report(t.Context(), agent("cloned-"+name).String(), ledger.Report{Process: process, Number: uint64(i)}))
			}
		}
		want := func(ids ...string) {
			t.Helper()
			var all []string
			for _, name := range w.names {
				scope := &api.Scope{Deployment: name}
				list, err := w.ListKeysets(t.Context(), &api.ListKeysetsRequest{Scope: scope})
				check(t, err)
				if got := list.GetAgentsDuplicated(); fmt.Sprint(got) != fmt.Sprint(ids) {
					t.Errorf("%s: duplicated are %v, want %v", name, got, ids)
				}
				agents, err := w.ListAgents(t.Context(), &api.ListAgentsRequest{Scope: scope})
				check(t, err)
				for _, a := range agents.GetAgents() {
					if a.GetDuplicated() {
						all = append(all, a.GetId())
					}
				}
			}
			if fmt.Sprint(all) != fmt.Sprint(ids) {
				t.Errorf("of the agents %v are duplicated, want %v", all, ids)
			}
		}
		east, west := agent("cloned-east").String(), agent("cloned-west").String()
		want(east, west)
		if f, err := w.Figures(t.Context(), "west"); err != nil || fmt.Sprint(f.Duplicated) != fmt.Sprint([]string{west}) {
			t.Errorf("figures of west: %+v, %v", f, err)
		}
		_, err := w.EvictAgent(t.Context(), &api.EvictAgentRequest{Scope: &api.Scope{Deployment: "east"}, AgentId: east})
		check(t, err)
		want(west)
	})
}
