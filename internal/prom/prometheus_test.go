package prom_test

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/prom"
	"github.com/renewd/renewd/metrics"
)

// node is an agent as Prometheus sees it: its real metrics over HTTP.
type node struct {
	*httptest.Server
	state atomic.Pointer[metrics.State]
}

func startNode(t *testing.T, s metrics.State) *node {
	t.Helper()
	n := new(node)
	n.set(s)
	n.Server = httptest.NewServer(metrics.New(metrics.Config{
		TrustDomain: "example.org", Version: "1.2.3",
		Source: metrics.SourceFunc(func() metrics.State { return *n.state.Load() }),
	}).Handler())
	t.Cleanup(n.Close)
	return n
}

func (n *node) set(s metrics.State) { n.state.Store(&s) }

func (n *node) instance() string { return strings.TrimPrefix(n.URL, "http://") }

// startPrometheus runs Debian's Prometheus, which scrapes the targets every
// second, and has done so 25 hours ago.
func startPrometheus(t *testing.T, targets ...string) (url string) {
	t.Helper()
	dir := t.TempDir()
	tool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("install prometheus (apt-get install prometheus) to run this test under a real one")
	}
	var past strings.Builder
	for at := time.Now().Add(-25*time.Hour - 10*time.Minute); at.Before(time.Now().Add(-24 * time.Hour)); at = at.Add(time.Minute) {
		fmt.Fprintf(&past, "up{job=\"renewd-agent\",instance=\"gone\"} 1 %d\n", at.Unix())
	}
	past.WriteString("# EOF\n")
	if err := os.WriteFile(dir+"/past", []byte(past.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(tool, "tsdb", "create-blocks-from", "openmetrics", dir+"/past", dir+"/data").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return newPrometheus(t, dir, targets...)
}

// newPrometheus is one with the data in dir.
func newPrometheus(t *testing.T, dir string, targets ...string) (url string) {
	t.Helper()
	bin, err := exec.LookPath("prometheus")
	if err != nil {
		t.Skip("install prometheus (apt-get install prometheus) to run this test under a real one")
	}
	config := fmt.Sprintf(`
global: {scrape_interval: 1s}
scrape_configs:
  - job_name: renewd-agent
    static_configs: [{targets: ["%s"]}]
`, strings.Join(targets, `", "`))
	if err := os.WriteFile(dir+"/prometheus.yml", []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	port, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := port.Addr().String()
	port.Close()
	cmd := exec.Command(bin, "--config.file="+dir+"/prometheus.yml", "--storage.tsdb.path="+dir+"/data", "--web.listen-address="+address)
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("prometheus:\n%s", &log)
		}
	})
	url = "http://" + address
	eventually(t, "prometheus is ready", func() bool {
		res, err := http.Get(url + "/-/ready")
		if err != nil {
			return false
		}
		res.Body.Close()
		return res.StatusCode == http.StatusOK
	})
	return url
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within two minutes", what)
		}
	}
}

// holding is the state of an agent to which the authority "old" is tainted
// when pending is not negative; n tells agents apart.
func holding(n, held, pending, streams int) metrics.State {
	at := time.Now().Truncate(time.Hour).Add(time.Duration(n) * time.Second)
	old := metrics.Authority{Type: metrics.TypeX509, ID: "old", State: metrics.StatePrepared, Held: held}
	if pending >= 0 {
		old.State, old.Pending, old.Streams, old.Settled = metrics.StateTainted, pending, streams, true
	}
	return metrics.State{
		Authorities: []metrics.Authority{old, {Type: metrics.TypeX509, ID: "new", State: metrics.StateActive, Held: 10}},
		OwnID:       id(n), OwnExpiry: at.Add(2 * time.Hour), BundleApplied: at, BundleSequence: 7,
	}
}

func ids(of []int) (list []string) {
	for _, n := range of {
		list = append(list, id(n))
	}
	return list
}

func TestUnderPrometheus(t *testing.T) {
	t.Parallel()
	nodes := []*node{startNode(t, holding(1, 0, 0, 0)), startNode(t, holding(2, 0, 0, 0)), startNode(t, holding(3, 4, -1, 0))}
	// The same agent under a second address is no second agent.
	twin := &node{Server: httptest.NewServer(nodes[0].Config.Handler)}
	t.Cleanup(twin.Close)
	url := startPrometheus(t, nodes[0].instance(), twin.instance(), nodes[1].instance(), nodes[2].instance())
	c, err := prom.New(prom.Config{URL: url, TrustDomain: "example.org"})
	if err != nil {
		t.Fatal(err)
	}
	var f prom.Figures
	ask := func(expected ...int) bool {
		var err error
		if f, err = c.Figures(t.Context(), "old", `kid"\ü`, ids(expected)); err != nil {
			f = prom.Figures{}
		}
		return err == nil
	}
	// becomes waits for the holders, given as "index of the node: reason".
	expected := []int{3, 1, 2}
	becomes := func(what string, want ...string) {
		t.Helper()
		var got []string
		deadline := time.Now().Add(2 * time.Minute)
		for {
			got = nil
			if ask(expected...) {
				for _, h := range f.Holders {
					i := slices.IndexFunc(nodes, func(n *node) bool { return n.instance() == h.Agent })
					if h.Agent == twin.instance() {
						i = 0
					}
					got = append(got, fmt.Sprintf("%d: %s", i, h.Reason))
				}
				slices.Sort(got)
				if slices.Equal(got, want) {
					break
				}
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: holders are %q of %d agents, want %q", what, got, len(f.Agents), want)
			}
			time.Sleep(20 * time.Millisecond)
		}
		if f.X509Safe != (len(want) == 0) {
			t.Errorf("%s: safe is %v with holders %v", what, f.X509Safe, f.Holders)
		}
	}

	becomes("not seen yet", "2: behind")
	if len(f.Agents) != 3 || f.X509SVIDs != 4 || f.Expected != 3 || f.Missing != 0 || f.Holders[0].SVIDs != 4 || f.Holders[0].Version != "1.2.3" {
		t.Errorf("figures %+v", f)
	}
	if time.Since(f.Holders[0].LastReport) > time.Minute || time.Since(f.At) > time.Minute {
		t.Errorf("last report at %v, figures of %v", f.Holders[0].LastReport, f.At)
	}
	if f.Behind(7) != 0 || f.Behind(8) != 3 {
		t.Errorf("%d agents behind 7, %d behind 8", f.Behind(7), f.Behind(8))
	}
	nodes[2].set(holding(3, 4, 4, 2))
	becomes("seen", "2: renewing")
	nodes[2].set(holding(3, 0, 0, 2))
	becomes("renewed", "2: streams")
	if f.Holders[0].Streams != 2 {
		t.Errorf("holder %+v", f.Holders[0])
	}
	nodes[2].set(holding(3, 0, 0, 0))
	becomes("settled")
	if !f.JWTSafe || !f.JWTExpiry.IsZero() || f.X509SVIDs != 0 {
		t.Errorf("figures without a JWT-SVID: %+v", f)
	}
	expected = append(expected, 4)
	becomes("one more expected", "-1: silent")
	if f.Missing != 1 || f.Expected != 4 || f.JWTSafe || f.Holders[0].Agent != id(4) {
		t.Errorf("figures with one missing: %+v", f)
	}

	expected = expected[:3]

	// A token that an agent hands out stays known when the agent starts again.
	expiry := time.Now().Add(time.Hour)
	s := holding(1, 0, 0, 0)
	s.JWTExpiry = map[string]time.Time{`kid"\ü`: expiry, "other": expiry.Add(time.Hour)}
	nodes[0].set(s)
	eventually(t, "JWT expiry", func() bool { return ask(expected...) && !f.JWTExpiry.IsZero() })
	nodes[0].set(holding(1, 9, 9, 0))
	becomes("the agent started again", "0: renewing")
	if d := f.JWTExpiry.Sub(expiry); f.JWTSafe || d < 0 || d > time.Second {
		t.Errorf("JWT safe %v, expiry %v off %v", f.JWTSafe, f.JWTExpiry, d)
	}
	nodes[0].set(holding(1, 0, 0, 0))
	becomes("settled again")
	if f.JWTSafe {
		t.Error("safe while a token lives")
	}

	// Dead: what it last said stays within Prometheus' lookback and must not count.
	nodes[1].CloseClientConnections()
	nodes[1].Listener.Close()
	becomes("down", "1: silent")
	if h := f.Holders[0]; h.LastReport.IsZero() || time.Since(h.LastReport) > time.Minute {
		t.Errorf("silent holder %+v", h)
	}
	for range 20 {
		if !ask(expected...) || f.X509Safe || f.JWTSafe || f.Behind(7) != 1 {
			t.Fatalf("figures with one down: %+v", f)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// TestYoungPrometheus: one that has lost its data does not know of the JWT-SVIDs
// of an agent that was started again.
func TestYoungPrometheus(t *testing.T) {
	t.Parallel()
	url := newPrometheus(t, t.TempDir(), startNode(t, holding(1, 0, 0, 0)).instance())
	figures := func(life time.Duration) (f prom.Figures, err error) {
		c, err := prom.New(prom.Config{URL: url, JWTLife: life})
		if err != nil {
			t.Fatal(err)
		}
		return c.Figures(t.Context(), "old", "key", ids([]int{1}))
	}
	eventually(t, "JWT-SVIDs that live for a second have ended", func() bool {
		f, err := figures(time.Second)
		return err == nil && f.X509Safe && f.JWTSafe
	})
	if f, err := figures(0); err != nil || !f.X509Safe || f.JWTSafe || !f.JWTExpiry.IsZero() {
		t.Errorf("%+v, %v", f, err)
	}
}
