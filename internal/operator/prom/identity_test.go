package prom_test

import (
	"strings"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/operator/prom"
)

// Two agents of one image that were started in one moment differ in their SPIFFE IDs
// and in nothing else.
func TestTwoAgentsOfOneMoment(t *testing.T) {
	t.Parallel()
	a, b := startNode(t, holding(1, 0, 0, 0)), startNode(t, holding(2, 5, 5, 0))
	f := ask(t, startPrometheus(t, "", []string{job("renewd-agent", "", a, b)}), prom.Config{}, 1, 2)
	f.becomes("one renews", b.instance()+" renewing")
	if len(f.Agents) != 2 || f.Agents[0].ID == f.Agents[1].ID {
		t.Errorf("agents %+v", f.Agents)
	}
	b.set(holding(2, 0, 0, 0))
	f.becomes("both are done")
}

// An agent that two targets show counts once, whatever happens to it between the
// scrapes: another bundle, another agent SVID, another SPIFFE ID.
func TestOneAgentIsNotTwo(t *testing.T) {
	t.Parallel()
	a := startNode(t, holding(1, 0, 0, 0))
	f := ask(t, startPrometheus(t, "", []string{job("renewd-agent", "", a, a.twin(t))}), prom.Config{Expected: 2})
	f.becomes("one of two", "1 of 2 agents that Prometheus does not scrape silent")
	for n := range 400 {
		time.Sleep(20 * time.Millisecond)
		s := holding(n%50, 0, 0, 0)
		s.BundleApplied, s.OwnExpiry, s.BundleSequence = time.Now(), time.Now().Add(time.Hour), uint64(n)
		a.set(s)
		if n%10 > 0 {
			continue
		}
		if err := f.again(); err == nil && f.X509Safe {
			t.Fatalf("safe with the agents %+v", f.Agents)
		}
	}
}

// Two processes with one SPIFFE ID are a clone: what the other one of a pair holds, a
// third may hold, too.
func TestClone(t *testing.T) {
	t.Parallel()
	a, clone := startNode(t, holding(1, 0, 0, 0)), startNode(t, holding(1, 0, 0, 0))
	p := startPrometheus(t, "", []string{job("renewd-agent", "", a, clone)})
	f := ask(t, p, prom.Config{}, 1)
	f.becomes("duplicated", a.instance()+" duplicated", clone.instance()+" duplicated")
	f.stays("duplicated")
	clone.restart(holding(2, 0, 0, 0))
	f.becomes("attested with an ID of its own")
}

// An agent that exports no SPIFFE ID is none that is expected, and not known.
func TestUnidentified(t *testing.T) {
	t.Parallel()
	s := holding(1, 0, 0, 0)
	s.OwnID = ""
	a := startNode(t, s)
	f := ask(t, startPrometheus(t, "", []string{job("renewd-agent", "", a)}), prom.Config{})
	f.becomes("not attested", a.instance()+" unidentified")
	f.stays("not attested")
	a.set(holding(1, 0, 0, 0))
	f.becomes("attested")
}

// A process that is started again has lost what the one before was told, and
// counts its series from the start. What that one said is not taken for its word.
func TestStartedAgain(t *testing.T) {
	t.Parallel()
	a := startNode(t, holding(1, 0, 0, 0))
	f := ask(t, startPrometheus(t, "", []string{job("renewd-agent", "", a)}), prom.Config{}, 1)
	f.becomes("settled")
	a.restart(holding(1, 3, -1, 0))
	f.becomes("it does not know of the taint", a.instance()+" behind")
	f.stays("it does not know of the taint")
	a.set(holding(1, 3, 3, 0))
	f.becomes("it renews", a.instance()+" renewing")
	a.set(holding(1, 0, 0, 0))
	f.becomes("settled again")
}

// A series that ends, and a target that goes, count no longer: Prometheus marks them
// stale, and an answer from before is within its lookback still.
func TestStale(t *testing.T) {
	t.Parallel()
	a, b := startNode(t, holding(1, 0, 0, 0)), startNode(t, holding(2, 0, 0, 0))
	p := startPrometheus(t, "", []string{job("renewd-agent", "", a, b)})
	f := ask(t, p, prom.Config{}, 1, 2)
	f.becomes("settled")
	a.set(holding(1, 0, -1, 0)) // renewd_taint_settled ends
	f.becomes("the series ends", a.instance()+" behind")
	f.stays("the series ends")
	a.set(holding(1, 0, 0, 0))
	f.becomes("the series begins again")
	p.reload(t, job("renewd-agent", "", a))
	f.becomes("the target goes", id(2)+" silent")
	f.stays("the target goes")
}

// Relabeling gives an agent another instance. It is the same one, with the same
// past: only the process counts.
func TestRelabeled(t *testing.T) {
	t.Parallel()
	a := startNode(t, holding(1, 0, 0, 0))
	p := startPrometheus(t, "", []string{job("renewd-agent", "", a)},
		past{`up{job="renewd-agent",instance="old"}`, 2 * time.Hour, 0}, past{a.info(t) + `,job="renewd-agent",instance="old"}`, 2 * time.Hour, 0})
	f := ask(t, p, prom.Config{Expected: 1, JWTLife: time.Hour})
	f.becomes("as it was")
	if !f.JWTSafe {
		t.Errorf("figures %+v", f.Figures)
	}
	renamed := `    relabel_configs: [{target_label: instance, replacement: node-1}]` + "\n"
	p.reload(t, job("renewd-agent", renamed, a))
	eventually(t, "another name", func() bool {
		return f.again() == nil && len(f.Agents) == 1 && f.Agents[0].Instance == "node-1" && f.X509Safe && f.JWTSafe
	})
	a.set(holding(1, 2, 2, 0))
	f.becomes("it renews", "node-1 renewing")
	// With both names at once it is one agent of two.
	f = ask(t, p, prom.Config{Expected: 2, JWTLife: time.Hour})
	a.set(holding(1, 0, 0, 0))
	both := `    relabel_configs: [{source_labels: [__address__], regex: "` + a.instance() + `", target_label: instance, replacement: node-1}]` + "\n"
	p.reload(t, job("renewd-agent", both, a, a.twin(t)))
	f.becomes("both names", "1 of 2 agents that Prometheus does not scrape silent")
	// The series alone get another name: then nobody knows whose they are.
	f = ask(t, p, prom.Config{Expected: 1})
	p.reload(t, job("renewd-agent", `    metric_relabel_configs: [{target_label: instance, replacement: all}]`+"\n", a))
	f.becomes("series without a target", a.instance()+" silent")
	f.stays("series without a target")
}

// What another job says of an agent does not count: the operator names one.
func TestTwoJobs(t *testing.T) {
	t.Parallel()
	a, b := startNode(t, holding(1, 0, 0, 0)), startNode(t, holding(2, 7, 7, 0))
	p := startPrometheus(t, "", []string{job("renewd-agent", "", a, b), job("node", "", a, b)})
	f := ask(t, p, prom.Config{}, 1, 2)
	f.becomes("both jobs", b.instance()+" renewing")
	if f.X509SVIDs != 7 || len(f.Agents) != 2 {
		t.Errorf("figures %+v", f.Figures)
	}
	p.reload(t, job("renewd-agent", "", a), job("node", "", a, b))
	f.becomes("in the other job only", id(2)+" silent")
	b.set(holding(2, 0, 0, 0))
	f.stays("in the other job only")
	p.reload(t, job("node", "", a, b))
	eventually(t, "no target", func() bool {
		err := f.again()
		return err != nil && strings.Contains(err.Error(), `no target has the job "renewd-agent"`)
	})
}

// Two replicas scrape the same agents. Their answers, merged, have each series twice,
// once with the other replica's external label.
func TestReplicas(t *testing.T) {
	t.Parallel()
	a, b := startNode(t, holding(1, 0, 0, 0)), startNode(t, holding(2, 7, 7, 0))
	jobs := []string{job("renewd-agent", "", a, b)}
	other := startPrometheus(t, "  external_labels: {replica: b}", jobs)
	merged := startPrometheus(t, "remote_read: [{url: "+other.url+"/api/v1/read, read_recent: true}]", jobs)
	f, g := ask(t, merged, prom.Config{}, 1, 2), ask(t, other, prom.Config{}, 1, 2)
	eventually(t, "series of both", func() bool { return merged.count(t, "up") == 4 })
	f.becomes("merged: one renews", b.instance()+" renewing")
	g.becomes("alone: one renews", b.instance()+" renewing")
	if f.X509SVIDs != 7 || len(f.Agents) != 2 || len(g.Agents) != 2 {
		t.Errorf("merged %+v\nalone %+v", f.Figures, g.Figures)
	}
	b.set(holding(2, 0, 0, 0))
	f.becomes("merged: both are done")
	g.becomes("alone: both are done")
	f = ask(t, merged, prom.Config{Expected: 3})
	f.becomes("merged: two of three", "1 of 3 agents that Prometheus does not scrape silent")
	// Half an answer is none.
	f = ask(t, merged, prom.Config{}, 1, 2)
	f.becomes("merged: nobody else")
	other.stop()
	if err := f.again(); err == nil || f.X509Safe {
		t.Errorf("with a replica that is gone: safe %v, %v", f.X509Safe, err)
	}
}
