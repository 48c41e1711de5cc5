package prom_test

import (
	"testing"
	"time"

	"github.com/renewd/renewd/internal/operator/prom"
)

func TestUnderPrometheus(t *testing.T) {
	t.Parallel()
	nodes := []*node{startNode(t, holding(1, 0, 0, 0)), startNode(t, holding(2, 0, 0, 0)), startNode(t, holding(3, 4, -1, 0))}
	// The twin is the same agent under a second address.
	twin := nodes[0].twin(t)
	history := []pastSeries{{`up{job="renewd-agent",instance="old"}`, 2 * time.Hour, 0}}
	for _, n := range nodes {
		history = append(history, pastSeries{n.info(t) + `,job="renewd-agent",instance="old"}`, 2 * time.Hour, 0})
	}
	p := startPrometheus(t, "", []string{job("renewd-agent", "", nodes[0], twin, nodes[1], nodes[2])}, history...)
	f := query(t, p, prom.Config{TrustDomain: "example.org", JWTLife: time.Hour}, 3, 1, 2)

	f.waitHolders("not seen yet", nodes[2].instance()+" behind")
	if len(f.Agents) != 3 || f.X509SVIDs != 4 || f.Expected != 3 || f.Missing != 0 || f.Holders[0].SVIDs != 4 || f.Holders[0].Version != "1.2.3" {
		t.Errorf("figures %+v", f.Figures)
	}
	if time.Since(f.Holders[0].LastReport) > time.Minute || time.Since(f.At) > time.Minute {
		t.Errorf("last report at %v, figures of %v", f.Holders[0].LastReport, f.At)
	}
	if f.Behind(7) != 0 || f.Behind(8) != 3 {
		t.Errorf("%d agents behind 7, %d behind 8", f.Behind(7), f.Behind(8))
	}
	nodes[2].set(holding(3, 4, 4, 2))
	f.waitHolders("seen", nodes[2].instance()+" renewing")
	nodes[2].set(holding(3, 0, 0, 2))
	f.waitHolders("renewed", nodes[2].instance()+" streams")
	if f.Holders[0].Streams != 2 {
		t.Errorf("holder %+v", f.Holders[0])
	}
	nodes[2].set(holding(3, 0, 0, 0))
	f.waitHolders("settled")
	if !f.JWTSafe || !f.JWTExpiry.IsZero() || f.X509SVIDs != 0 {
		t.Errorf("figures without a JWT-SVID: %+v", f.Figures)
	}
	f.expected = ids(1, 2, 3, 4)
	f.waitHolders("one more expected", id(4)+" silent")
	if f.Missing != 1 || f.Expected != 4 || f.JWTSafe {
		t.Errorf("figures with one missing: %+v", f.Figures)
	}
	f.expected = ids(1, 2, 3)

	// After the agent restarts, the expiry of its JWT-SVID is still known.
	expiry := time.Now().Add(time.Hour)
	s := holding(2, 0, 0, 0)
	s.JWTExpiry = map[string]time.Time{"key": expiry, "other": expiry.Add(time.Hour)}
	nodes[1].set(s)
	eventually(t, "JWT expiry", func() bool { return f.update() == nil && !f.JWTExpiry.IsZero() })
	nodes[1].restart(holding(2, 9, 9, 0))
	f.waitHolders("the agent started again", nodes[1].instance()+" renewing")
	if d := f.JWTExpiry.Sub(expiry); f.JWTSafe || d < 0 || d > time.Second {
		t.Errorf("JWT safe %v, expiry %v off %v", f.JWTSafe, f.JWTExpiry, d)
	}
	nodes[1].set(holding(2, 0, 0, 0))
	f.waitHolders("settled again")
	if f.JWTSafe {
		t.Error("safe while a token lives")
	}

	// The last samples of a dead agent must not count during Prometheus' lookback.
	nodes[1].CloseClientConnections()
	nodes[1].Listener.Close()
	f.waitHolders("down", nodes[1].instance()+" silent")
	if h := f.Holders[0]; h.LastReport.IsZero() || time.Since(h.LastReport) > time.Minute {
		t.Errorf("silent holder %+v", h)
	}
	if f.Behind(7) != 1 {
		t.Errorf("figures with one down: %+v", f.Figures)
	}
	f.staysUnsafe("down")
}
