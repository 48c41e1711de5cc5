package prom_test

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/api"
	v1 "github.com/prometheus/client_golang/api/prometheus/v1"
	"github.com/prometheus/common/model"

	"github.com/renewd/renewd/internal/operator/prom"
	"github.com/renewd/renewd/metrics"
)

// node serves the metrics of an agent over HTTP.
type node struct {
	*httptest.Server
	state   atomic.Pointer[metrics.State]
	process atomic.Pointer[http.Handler]
}

func startNode(t *testing.T, s metrics.State) *node {
	t.Helper()
	n := new(node)
	n.restart(s)
	n.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { (*n.process.Load()).ServeHTTP(w, r) }))
	t.Cleanup(n.Close)
	return n
}

func (n *node) set(s metrics.State) { n.state.Store(&s) }

// restart replaces the agent's process.
func (n *node) restart(s metrics.State) {
	n.set(s)
	h := metrics.New(metrics.Config{
		TrustDomain: "example.org", Version: "1.2.3", Process: rand.Text(),
		Source: func() metrics.State { return *n.state.Load() },
	}).Handler()
	n.process.Store(&h)
}

func (n *node) instance() string { return strings.TrimPrefix(n.URL, "http://") }

// twin returns a second address of the agent.
func (n *node) twin(t *testing.T) *node {
	t.Helper()
	twin := &node{Server: httptest.NewServer(n.Config.Handler)}
	t.Cleanup(twin.Close)
	return twin
}

// info returns the agent's renewd_agent_info series.
func (n *node) info(t *testing.T) string {
	t.Helper()
	rec := httptest.NewRecorder()
	(*n.process.Load()).ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	for line := range strings.Lines(rec.Body.String()) {
		if labels, ok := strings.CutPrefix(line, "renewd_agent_info{"); ok {
			return "renewd_agent_info{" + strings.TrimSuffix(labels, "} 1\n")
		}
	}
	t.Fatal("the agent exports no renewd_agent_info")
	return ""
}

// holding returns the state of agent n. The authority "old" is tainted unless pending is
// negative.
func holding(n, held, pending, streams int) metrics.State {
	at := time.Now().Truncate(time.Hour)
	old := metrics.Authority{Type: metrics.TypeX509, ID: "old", State: metrics.StatePrepared, Held: held}
	if pending >= 0 {
		old.State, old.Pending, old.Streams = metrics.StateSettled, pending, streams
	}
	return metrics.State{
		Authorities: []metrics.Authority{old, {Type: metrics.TypeX509, ID: "new", State: metrics.StateActive, Held: 10}},
		OwnID:       id(n), OwnExpiry: at.Add(2 * time.Hour), BundleApplied: at, BundleSequence: 7,
	}
}

func ids(of ...int) (list []string) {
	for _, n := range of {
		list = append(list, id(n))
	}
	return list
}

// job returns the configuration of a scrape job; more is additional YAML.
func job(name string, more string, nodes ...*node) string {
	var targets []string
	for _, n := range nodes {
		targets = append(targets, n.instance())
	}
	return fmt.Sprintf("\n  - job_name: %s\n    static_configs: [{targets: [\"%s\"]}]\n%s", name, strings.Join(targets, `", "`), more)
}

// prometheus is a process of Debian's package. It scrapes every two seconds.
type prometheus struct {
	url, dir string
	cmd      *exec.Cmd
}

// pastSeries is a series with a sample per minute between two moments.
type pastSeries struct {
	series   string
	from, to time.Duration // ago
}

// startPrometheus starts Prometheus with jobs, global settings and a history.
func startPrometheus(t *testing.T, global string, jobs []string, history ...pastSeries) *prometheus {
	t.Helper()
	for _, name := range []string{"prometheus", "promtool"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Skip("needs Prometheus (apt-get install prometheus)")
		}
	}
	p := &prometheus{dir: t.TempDir()}
	p.writeHistory(t, history)
	p.configure(t, global, jobs)
	port, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := port.Addr().String()
	port.Close()
	p.url = "http://" + address
	p.cmd = exec.Command("prometheus", "--config.file="+p.dir+"/prometheus.yml", "--storage.tsdb.path="+p.dir+"/data", "--web.listen-address="+address)
	var log bytes.Buffer
	p.cmd.Stdout, p.cmd.Stderr = &log, &log
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.stop()
		if t.Failed() {
			t.Logf("prometheus:\n%s", &log)
		}
	})
	eventually(t, "prometheus is ready", func() bool {
		res, err := http.Get(p.url + "/-/ready")
		if err != nil {
			return false
		}
		res.Body.Close()
		return res.StatusCode == http.StatusOK
	})
	return p
}

func (p *prometheus) stop() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

func (p *prometheus) configure(t *testing.T, global string, jobs []string) {
	t.Helper()
	config := "global:\n  scrape_interval: 2s\n" + global + "\nscrape_configs:" + strings.Join(jobs, "")
	if err := os.WriteFile(p.dir+"/prometheus.yml", []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
}

// reload replaces the jobs.
func (p *prometheus) reload(t *testing.T, jobs ...string) {
	t.Helper()
	p.configure(t, "", jobs)
	if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
}

func (p *prometheus) writeHistory(t *testing.T, history []pastSeries) {
	t.Helper()
	if len(history) == 0 {
		return
	}
	names := make(map[string]string)
	for _, h := range history {
		var lines strings.Builder
		for at := time.Now().Add(-h.from); !at.After(time.Now().Add(-h.to)); at = at.Add(time.Minute) {
			fmt.Fprintf(&lines, "%s 1 %d\n", h.series, at.Unix())
		}
		name, _, _ := strings.Cut(h.series, "{")
		names[name] += lines.String()
	}
	text := ""
	for name, lines := range names {
		text += "# TYPE " + name + " gauge\n" + lines
	}
	if err := os.WriteFile(p.dir+"/past", []byte(text+"# EOF\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("promtool", "tsdb", "create-blocks-from", "openmetrics", p.dir+"/past", p.dir+"/data").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// count returns the number of series of a metric.
func (p *prometheus) count(t *testing.T, metric string) int {
	t.Helper()
	client, err := api.NewClient(api.Config{Address: p.url})
	if err != nil {
		t.Fatal(err)
	}
	v, _, _, err := v1.NewAPI(client).Query(t.Context(), metric, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	series, _ := v.(model.Vector)
	return len(series)
}

// fleetQuery gets figures of the X.509 authority "old" and the JWT key "key".
type fleetQuery struct {
	t        *testing.T
	client   *prom.Client
	expected []string
	prom.Figures
}

func query(t *testing.T, p *prometheus, c prom.Config, expected ...int) *fleetQuery {
	t.Helper()
	c.URL, c.Timeout = p.url, time.Minute
	client, err := prom.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return &fleetQuery{t: t, client: client, expected: ids(expected...)}
}

func (a *fleetQuery) update() (err error) {
	a.Figures, err = a.client.Figures(a.t.Context(), "old", "key", a.expected)
	return err
}

// waitHolders waits until these are the holders, each as "agent reason".
func (a *fleetQuery) waitHolders(what string, want ...string) {
	a.t.Helper()
	var last error
	deadline := time.Now().Add(2 * time.Minute)
	for ; ; time.Sleep(pollInterval) {
		last = a.update()
		var got []string
		for _, h := range a.Holders {
			got = append(got, h.Agent+" "+h.Reason)
		}
		slices.Sort(got)
		slices.Sort(want)
		if last == nil && slices.Equal(got, want) {
			break
		}
		if time.Now().After(deadline) {
			a.t.Fatalf("%s: holders are %q of %d agents, want %q; %v", what, got, len(a.Agents), want, last)
		}
	}
	if a.X509Safe != (len(want) == 0) {
		a.t.Errorf("%s: safe is %v with holders %v", what, a.X509Safe, a.Holders)
	}
}

// staysUnsafe fails the test if the figures are safe within the next scrapes.
func (a *fleetQuery) staysUnsafe(what string) {
	a.t.Helper()
	for end := time.Now().Add(6 * time.Second); time.Now().Before(end); time.Sleep(pollInterval) {
		if err := a.update(); err == nil && (a.X509Safe || a.JWTSafe) {
			a.t.Fatalf("%s: safe: %+v", what, a.Figures)
		}
	}
}

// pollInterval is the time between two queries.
const pollInterval = 200 * time.Millisecond

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(pollInterval) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within two minutes", what)
		}
	}
}
