package prom_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/operator/prom"
	"github.com/renewd/renewd/metrics"
)

// TestHistory: an agent that restarted or ended no longer exports the expiry of its
// JWT-SVIDs. They are safe only if the history shows that none was forgotten. Each case is
// a job of one Prometheus; all jobs scrape the same agent. JWT-SVIDs live for an hour.
func TestHistory(t *testing.T) {
	t.Parallel()
	const life = time.Hour
	s := holding(1, 0, 0, 0)
	s.Authorities = append(s.Authorities, metrics.Authority{Type: metrics.TypeJWT, ID: "key", State: metrics.StateTainted})
	a := startNode(t, s)
	running := strings.Split(a.info(t), `"`)[3] // its process ID
	const (
		up      = `up{`
		tainted = `renewd_svids_held{svid_type="jwt",authority="key",state="tainted",`
		gave    = `renewd_jwt_svid_latest_expiry_timestamp_seconds{key_id="key",`
	)
	process := func(id, spiffeID string) string {
		return fmt.Sprintf("renewd_agent_info{hostname=\"\",process_id=%q,spiffe_id=%q,", id, spiffeID)
	}
	it, before := process(running, id(1)), process("before", id(1))
	tests := []struct {
		name string
		past []pastSeries // without the labels of the target
		safe bool
	}{
		{"the agent was there all the time", []pastSeries{{up, 2 * life, 0}, {it, 2 * life, 0}}, true},
		{"Prometheus is new", nil, false},
		{"Prometheus is young", []pastSeries{{up, life / 2, 0}, {it, life / 2, 0}}, false},
		{"the agent was started again", []pastSeries{{up, 2 * life, 0}, {before, 2 * life, life / 2}, {it, life / 2, 0}}, false},
		{"the agent was started again, long ago", []pastSeries{{up, 2 * life, 0}, {before, 2 * life, 3 * life / 2}, {it, 3 * life / 2, 0}}, true},
		{"the agent is new", []pastSeries{{up, 2 * life, 0}, {it, life / 2, 0}}, false},
		{"another agent is gone", []pastSeries{{up, 2 * life, 0}, {it, 2 * life, 0},
			{process("gone", id(2)), 2 * life, life / 2}}, false},
		{"another agent of another trust domain is gone", []pastSeries{{up, 2 * life, 0}, {it, 2 * life, 0},
			{process("gone", "spiffe://other.org/spire/agent/2"), 2 * life, life / 2}}, true},
		{"a gap in which the agent was started again", []pastSeries{{up, 2 * life, life * 3 / 4}, {up, life / 4, 0},
			{before, 2 * life, life * 3 / 4}, {it, life / 4, 0}}, false},
		// Another agent may have run during the gap.
		{"a gap", []pastSeries{{up, 2 * life, life * 3 / 4}, {up, life / 4, 0}, {it, 2 * life, life * 3 / 4}, {it, life / 4, 0}}, false},
		{"a gap, long ago", []pastSeries{{up, 2 * life, life * 3 / 2}, {up, life * 5 / 4, 0},
			{it, 2 * life, life * 3 / 2}, {it, life * 5 / 4, 0}}, true},
		// The process runs before and after the gap.
		{"a gap before the beginning", []pastSeries{{up, 2 * life, life + 10*time.Minute}, {up, life, 0},
			{it, 2 * life, life + 10*time.Minute}, {it, life, 0}}, true},
		{"a token was handed out, by a process that is gone", []pastSeries{{up, 2 * life, 0}, {it, 2 * life, 0},
			{gave, life / 2, life / 3}}, true}, // value 1: it ended in 1970
		// A tainted key does not sign, so all JWT-SVIDs expire within one life.
		{"tainted for so long", []pastSeries{{tainted, life + 10*time.Minute, 0}, {before, 2 * life, life / 2}}, true},
		{"tainted for less", []pastSeries{{tainted, life - 5*time.Minute, 0}, {before, 2 * life, life / 2}, {it, life / 2, 0}}, false},
	}
	var jobs []string
	var history []pastSeries
	for i, tt := range tests {
		name := fmt.Sprint("job-", i)
		jobs = append(jobs, job(name, "    scrape_interval: 5s\n", a))
		for _, h := range tt.past {
			history = append(history, pastSeries{h.series + fmt.Sprintf(`job=%q,instance="old"}`, name), h.from, h.to})
		}
	}
	p := startPrometheus(t, "", jobs, history...)
	for i, tt := range tests {
		f := query(t, p, prom.Config{Job: fmt.Sprint("job-", i), TrustDomain: "example.org", JWTLife: life}, 1)
		f.waitHolders(tt.name)
		if f.JWTSafe != tt.safe {
			t.Errorf("%s: JWT safe is %v: %+v", tt.name, f.JWTSafe, f.Figures)
		}
	}
}
