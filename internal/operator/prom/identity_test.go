package prom_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/operator/prom"
)

// Two agents that were started together differ only in SPIFFE ID and process ID.
func TestTwoAgentsStartedTogether(t *testing.T) {
	t.Parallel()
	a, b := startNode(t, holding(1, 0, 0, 0)), startNode(t, holding(2, 5, 5, 0))
	f := query(t, startPrometheus(t, "", []string{job("renewd-agent", "", a, b)}), prom.Config{}, 1, 2)
	f.waitHolders("one renews", b.instance()+" renewing")
	if len(f.Agents) != 2 || f.Agents[0].ID == f.Agents[1].ID {
		t.Errorf("agents %+v", f.Agents)
	}
	b.set(holding(2, 0, 0, 0))
	f.waitHolders("both are done")
}

// An agent with two targets counts once, also if its bundle, agent SVID or SPIFFE ID
// changes between the scrapes.
func TestOneAgentTwoTargets(t *testing.T) {
	t.Parallel()
	a := startNode(t, holding(1, 0, 0, 0))
	f := query(t, startPrometheus(t, "", []string{job("renewd-agent", "", a, a.twin(t))}), prom.Config{Expected: 2})
	f.waitHolders("one of two", "1 of 2 agents that Prometheus does not scrape silent")
	for n := range 400 {
		time.Sleep(20 * time.Millisecond)
		s := holding(n%50, 0, 0, 0)
		s.BundleApplied, s.OwnExpiry, s.BundleSequence = time.Now(), time.Now().Add(time.Hour), uint64(n)
		a.set(s)
		if n%10 > 0 {
			continue
		}
		if err := f.update(); err == nil && f.X509Safe {
			t.Fatalf("safe with the agents %+v", f.Agents)
		}
	}
}

// Two processes with one SPIFFE ID are duplicated agents and never safe: a third may exist.
func TestDuplicated(t *testing.T) {
	t.Parallel()
	a, clone := startNode(t, holding(1, 0, 0, 0)), startNode(t, holding(1, 0, 0, 0))
	p := startPrometheus(t, "", []string{job("renewd-agent", "", a, clone)})
	f := query(t, p, prom.Config{}, 1)
	f.waitHolders("duplicated", a.instance()+" duplicated", clone.instance()+" duplicated")
	f.staysUnsafe("duplicated")
	clone.restart(holding(2, 0, 0, 0))
	f.waitHolders("attested with its own ID")
}

// An agent without SPIFFE ID is unidentified.
func TestUnidentified(t *testing.T) {
	t.Parallel()
	s := holding(1, 0, 0, 0)
	s.OwnID = ""
	a := startNode(t, s)
	f := query(t, startPrometheus(t, "", []string{job("renewd-agent", "", a)}), prom.Config{})
	f.waitHolders("not attested", a.instance()+" unidentified")
	f.staysUnsafe("not attested")
	a.set(holding(1, 0, 0, 0))
	f.waitHolders("attested")
}

// After a restart only the series of the new process count.
func TestRestart(t *testing.T) {
	t.Parallel()
	a := startNode(t, holding(1, 0, 0, 0))
	f := query(t, startPrometheus(t, "", []string{job("renewd-agent", "", a)}), prom.Config{}, 1)
	f.waitHolders("settled")
	a.restart(holding(1, 3, -1, 0))
	f.waitHolders("it does not know of the taint", a.instance()+" behind")
	f.staysUnsafe("it does not know of the taint")
	a.set(holding(1, 3, 3, 0))
	f.waitHolders("it renews", a.instance()+" renewing")
	a.set(holding(1, 0, 0, 0))
	f.waitHolders("settled again")
}

// A series or a target that disappears does not count, although its last sample is
// within Prometheus' lookback.
func TestStale(t *testing.T) {
	t.Parallel()
	a, b := startNode(t, holding(1, 0, 0, 0)), startNode(t, holding(2, 0, 0, 0))
	p := startPrometheus(t, "", []string{job("renewd-agent", "", a, b)})
	f := query(t, p, prom.Config{}, 1, 2)
	f.waitHolders("settled")
	a.set(holding(1, 0, -1, 0)) // renewd_taint_settled ends
	f.waitHolders("the series ends", a.instance()+" behind")
	f.staysUnsafe("the series ends")
	a.set(holding(1, 0, 0, 0))
	f.waitHolders("the series begins again")
	// With the first scrape that lacks the series, its last sample is still recent.
	p.reload(t, job("renewd-agent", "    scrape_interval: 10s\n", a, b))
	seen := func() bool { return f.update() == nil && f.Agents[0].ID != "" && f.Agents[1].ID != "" }
	of := func(agent string) prom.Agent {
		return f.Agents[slices.IndexFunc(f.Agents, func(a prom.Agent) bool { return a.ID == agent })]
	}
	first := time.Now()
	eventually(t, "a scrape at the longer interval", func() bool { return seen() && of(id(1)).LastScrape.After(first) && f.X509Safe })
	a.set(holding(1, 0, -1, 0))
	ended := time.Now()
	eventually(t, "a scrape without the series", func() bool { return seen() && of(id(1)).LastScrape.After(ended) })
	if f.X509Safe || of(id(1)).Seen {
		t.Errorf("safe by a sample of an older scrape: %+v", f.Figures)
	}
	a.set(holding(1, 0, 0, 0))
	f.waitHolders("the series begins once more")
	p.reload(t, job("renewd-agent", "", a))
	f.waitHolders("the target goes", id(2)+" silent")
	f.staysUnsafe("the target goes")
}

// An agent with a new instance label is the same agent, with the same history.
func TestRelabeled(t *testing.T) {
	t.Parallel()
	a := startNode(t, holding(1, 0, 0, 0))
	p := startPrometheus(t, "", []string{job("renewd-agent", "", a)},
		pastSeries{`up{job="renewd-agent",instance="old"}`, 2 * time.Hour, 0}, pastSeries{a.info(t) + `,job="renewd-agent",instance="old"}`, 2 * time.Hour, 0})
	f := query(t, p, prom.Config{Expected: 1, JWTLife: time.Hour})
	f.waitHolders("as it was")
	if !f.JWTSafe {
		t.Errorf("figures %+v", f.Figures)
	}
	renamed := `    relabel_configs: [{target_label: instance, replacement: node-1}]` + "\n"
	p.reload(t, job("renewd-agent", renamed, a))
	eventually(t, "another name", func() bool {
		return f.update() == nil && len(f.Agents) == 1 && f.Agents[0].Instance == "node-1" && f.X509Safe && f.JWTSafe
	})
	a.set(holding(1, 2, 2, 0))
	f.waitHolders("it renews", "node-1 renewing")
	// Two targets of one process are one agent.
	f = query(t, p, prom.Config{Expected: 2, JWTLife: time.Hour})
	a.set(holding(1, 0, 0, 0))
	both := `    relabel_configs: [{source_labels: [__address__], regex: "` + a.instance() + `", target_label: instance, replacement: node-1}]` + "\n"
	p.reload(t, job("renewd-agent", both, a, a.twin(t)))
	f.waitHolders("both names", "1 of 2 agents that Prometheus does not scrape silent")
	// If only the series are relabeled, they belong to no target.
	f = query(t, p, prom.Config{Expected: 1})
	p.reload(t, job("renewd-agent", `    metric_relabel_configs: [{target_label: instance, replacement: all}]`+"\n", a))
	f.waitHolders("series without a target", a.instance()+" silent")
	f.staysUnsafe("series without a target")
}

// Targets that have one instance label in common are distinguished by their other labels.
func TestOneInstanceLabel(t *testing.T) {
	t.Parallel()
	a, b := startNode(t, holding(1, 0, 0, 0)), startNode(t, holding(2, 4, 4, 0))
	relabel := `    relabel_configs: [{source_labels: [__address__], target_label: node}, {target_label: instance, replacement: all}]` + "\n"
	f := query(t, startPrometheus(t, "", []string{job("renewd-agent", relabel, a, b)}), prom.Config{}, 1, 2)
	f.waitHolders("one renews", "all renewing")
	if len(f.Agents) != 2 || f.X509SVIDs != 4 {
		t.Errorf("agents %+v", f.Agents)
	}
	a.set(holding(1, 2, 2, 0))
	f.waitHolders("both renew", "all renewing", "all renewing")
	a.set(holding(1, 0, 0, 0))
	b.set(holding(2, 0, 0, 0))
	f.waitHolders("both are done")
}

// Only series of the configured job count.
func TestTwoJobs(t *testing.T) {
	t.Parallel()
	a, b := startNode(t, holding(1, 0, 0, 0)), startNode(t, holding(2, 7, 7, 0))
	p := startPrometheus(t, "", []string{job("renewd-agent", "", a, b), job("node", "", a, b)})
	f := query(t, p, prom.Config{}, 1, 2)
	f.waitHolders("both jobs", b.instance()+" renewing")
	if f.X509SVIDs != 7 || len(f.Agents) != 2 {
		t.Errorf("figures %+v", f.Figures)
	}
	p.reload(t, job("renewd-agent", "", a), job("node", "", a, b))
	f.waitHolders("in the other job only", id(2)+" silent")
	b.set(holding(2, 0, 0, 0))
	f.staysUnsafe("in the other job only")
	p.reload(t, job("node", "", a, b))
	eventually(t, "no target", func() bool {
		err := f.update()
		return err != nil && strings.Contains(err.Error(), `no target has the job "renewd-agent"`)
	})
}

// Merged answers of two replicas have each series twice, once with the other replica's
// external label.
func TestReplicas(t *testing.T) {
	t.Parallel()
	a, b := startNode(t, holding(1, 0, 0, 0)), startNode(t, holding(2, 7, 7, 0))
	jobs := []string{job("renewd-agent", "", a, b)}
	other := startPrometheus(t, "  external_labels: {replica: b}", jobs)
	merged := startPrometheus(t, "remote_read: [{url: "+other.url+"/api/v1/read, read_recent: true}]", jobs)
	f, g := query(t, merged, prom.Config{}, 1, 2), query(t, other, prom.Config{}, 1, 2)
	eventually(t, "series of both", func() bool { return merged.count(t, "up") == 4 })
	f.waitHolders("merged: one renews", b.instance()+" renewing")
	g.waitHolders("alone: one renews", b.instance()+" renewing")
	if f.X509SVIDs != 7 || len(f.Agents) != 2 || len(g.Agents) != 2 {
		t.Errorf("merged %+v\nalone %+v", f.Figures, g.Figures)
	}
	b.set(holding(2, 0, 0, 0))
	f.waitHolders("merged: both are done")
	g.waitHolders("alone: both are done")
	f = query(t, merged, prom.Config{Expected: 3})
	f.waitHolders("merged: two of three", "1 of 3 agents that Prometheus does not scrape silent")
	// An incomplete answer is an error.
	f = query(t, merged, prom.Config{}, 1, 2)
	f.waitHolders("merged: complete")
	other.stop()
	if err := f.update(); err == nil || f.X509Safe {
		t.Errorf("one replica stopped: safe %v, %v", f.X509Safe, err)
	}
}
