package prom_test

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/operator/prom"
)

// now is the time of the fake Prometheus, far from this machine's.
const now = 1_800_000_000.0

// series is one sample of a series, without the labels of the target.
type series struct {
	name   string
	labels map[string]string
	value  any
	at     float64 // 0: the target's scrape
}

type fakeTarget struct {
	job, instance, interval, health string
	scrape                          float64
	series                          []series
}

// id returns the SPIFFE ID of an agent.
func id(n int) string { return fmt.Sprintf("spiffe://example.org/spire/agent/%d", n) }

// process returns the process ID of an agent.
func process(n int) string { return fmt.Sprint("P", n) }

// agent returns a target that does not depend on the authority.
func agent(n int) *fakeTarget {
	none := map[string]string{"authority": "old"}
	return &fakeTarget{
		job: "renewd-agent", instance: fmt.Sprintf("node-%d:9090", n), interval: "15s", health: "up", scrape: now - 14,
		series: []series{
			{name: "up", value: 1},
			{name: "spirl_application_info", value: 1, labels: map[string]string{
				"spirl_component": "agent", "spirl_trust_domain": "example.org", "spirl_app_version": "1.2.3"}},
			{name: "renewd_svids_held", value: 0, labels: map[string]string{"authority": "old", "svid_type": "x509", "state": "tainted"}},
			{name: "renewd_taint_renewals_pending", value: 0, labels: none},
			{name: "renewd_taint_streams_waiting", value: 0, labels: none},
			{name: "renewd_taint_settled", value: 1, labels: none},
			{name: "renewd_bundle_sequence_number", value: 7},
			{name: "renewd_agent_info", value: 1, labels: map[string]string{"spiffe_id": id(n), "process_id": process(n), "hostname": fmt.Sprint("host-", n)}},
		},
	}
}

func (f *fakeTarget) of(name string) *series {
	i := slices.IndexFunc(f.series, func(s series) bool { return s.name == name })
	return &f.series[i]
}

func (f *fakeTarget) drop(name string) {
	f.series = slices.DeleteFunc(f.series, func(s series) bool { return s.name == name })
}

// fake is a Prometheus with given answers.
type fake struct {
	targets  []*fakeTarget
	jwt      []any             // result of the JWT query
	tainted  bool              // an agent has seen the JWT key tainted long ago
	moments  int               // steps with scrapes during JWTLife; 0: all
	since    []string          // processes seen during JWTLife, other than those of the targets
	before   []string          // processes seen before; nil: those of the targets
	override map[string]string // answers by topic: targets, time, agents, answered, ids, held, jwt, tainted, moments, since, before
	queries  map[string]string
	slow     chan struct{}
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if f.slow != nil {
		<-f.slow
	}
	query := r.FormValue("query")
	var about string
	var data any
	switch {
	case r.URL.Path == "/api/v1/targets":
		about = "targets"
		active := []any{}
		for _, t := range f.targets {
			active = append(active, map[string]any{
				"labels":           map[string]string{"job": t.job, "instance": t.instance},
				"discoveredLabels": map[string]string{"__scrape_interval__": t.interval},
				"health":           t.health, "lastScrape": time.Unix(now, 0).UTC(),
			})
		}
		data = map[string]any{"activeTargets": active}
	case query == "time()":
		about, data = "time", map[string]any{"resultType": "scalar", "result": []any{now, fmt.Sprint(now)}}
	case strings.HasPrefix(query, "max("):
		about, data = "jwt", vector(f.jwt)
	case strings.HasPrefix(query, "count(last_over_time(renewd_svids_held"):
		about, data = "tainted", vector(nil)
		if f.tainted {
			data = vector(value(1))
		}
	case strings.HasPrefix(query, "count_over_time(count(up"):
		about, data = "moments", vector(value(float64(cmp.Or(f.moments, 301))))
	case strings.HasPrefix(query, "group by (process_id)"):
		about = "since"
		seen := append(f.processes(), f.since...)
		if r.FormValue("time") != fmt.Sprint(int(now)) {
			about, seen = "before", f.before
			if seen == nil {
				seen = f.processes()
			}
		}
		found := []any{}
		for _, p := range seen {
			found = append(found, map[string]any{"metric": map[string]string{"process_id": p}, "value": []any{now, "1"}})
		}
		data = vector(found)
	case strings.HasPrefix(query, "max_over_time(timestamp("):
		about, data = "answered", f.silent(now-3600.5, now-7200)
	case strings.HasPrefix(query, "last_over_time(renewd_agent_info"):
		about, data = "ids", f.ids()
	case strings.HasPrefix(query, "last_over_time("):
		about, data = "held", f.silent(12, 11)
	default:
		matrix := []any{}
		for _, t := range f.targets {
			for _, s := range t.series {
				labels := map[string]string{"__name__": s.name, "job": t.job, "instance": t.instance}
				maps.Copy(labels, s.labels)
				at := s.at
				if at == 0 {
					at = t.scrape
				}
				matrix = append(matrix, map[string]any{"metric": labels, "values": []any{[]any{at, fmt.Sprint(s.value)}}})
			}
		}
		about, data = "agents", map[string]any{"resultType": "matrix", "result": matrix}
	}
	if f.queries == nil {
		f.queries = make(map[string]string)
	}
	f.queries[about] = query
	if at := r.FormValue("time"); about != "targets" && about != "time" {
		f.queries[about] += " at " + at
	}
	if body, ok := f.override[about]; ok {
		if body == "" {
			w.WriteHeader(http.StatusInternalServerError)
		}
		fmt.Fprint(w, body)
		return
	}
	json.NewEncoder(w).Encode(map[string]any{"status": "success", "data": data})
}

// processes returns the process IDs of the trust domain's targets.
func (f *fake) processes() (all []string) {
	for _, t := range f.targets {
		for _, s := range t.series {
			if s.name == "renewd_agent_info" && strings.HasPrefix(s.labels["spiffe_id"], "spiffe://example.org/") {
				all = append(all, s.labels["process_id"])
			}
		}
	}
	return all
}

// ids answers with the SPIFFE ID of each target.
func (f *fake) ids() any {
	found := []any{}
	for _, t := range f.targets {
		var n int
		fmt.Sscanf(t.instance, "node-%d", &n)
		labels := map[string]string{"job": t.job, "instance": t.instance, "spiffe_id": id(n), "hostname": fmt.Sprint("host-", n)}
		found = append(found, map[string]any{"metric": labels, "value": []any{now, "1"}})
	}
	return vector(found)
}

// silent answers with a series per value for each target.
func (f *fake) silent(values ...float64) any {
	found := []any{}
	for _, t := range f.targets {
		for i, v := range values {
			labels := map[string]string{"job": t.job, "instance": t.instance, "state": fmt.Sprint(i)}
			found = append(found, map[string]any{"metric": labels, "value": []any{now, fmt.Sprintf("%.3f", v)}})
		}
	}
	return vector(found)
}

// vector returns an answer with these results.
func vector(result []any) any {
	if result == nil {
		result = []any{}
	}
	return map[string]any{"resultType": "vector", "result": result}
}

// value returns a result with one series without labels.
func value(v float64) []any {
	return []any{map[string]any{"metric": map[string]string{}, "value": []any{now, fmt.Sprintf("%.3f", v)}}}
}

func ends(in float64) []any { return value(now + in) }

// TestRules breaks each rule for safe authorities.
func TestRules(t *testing.T) {
	t.Parallel()
	type world struct {
		*fake
		cfg      prom.Config
		expected []string
	}
	for name, tt := range map[string]struct {
		change  func(w *world)
		holders string // "agent: reason" in order
		jwt     bool   // not safe
		err     string
	}{
		"all settled":             {},
		"expected by the config":  {change: func(w *world) { w.cfg.Expected, w.expected = 3, []string{"another"} }},
		"trust domain as URI":     {change: func(w *world) { w.cfg.TrustDomain = "spiffe://example.org" }},
		"nothing expected":        {change: func(w *world) { w.expected = nil }},
		"down":                    {func(w *world) { w.targets[1].health = "down" }, "node-1:9090: silent", true, ""},
		"not scraped yet":         {func(w *world) { w.targets[1].health = "unknown" }, "node-1:9090: silent", true, ""},
		"newest scrape failed":    {func(w *world) { w.targets[1].of("up").value = 0 }, "node-1:9090: silent", true, ""},
		"no scrape":               {func(w *world) { w.targets[1].series = nil }, "node-1:9090: silent", true, ""},
		"two intervals":           {change: func(w *world) { w.targets[1].scrape = now - 30 }},
		"more than two intervals": {func(w *world) { w.targets[1].scrape = now - 31 }, "node-1:9090: silent", true, ""},
		"no interval":             {change: func(w *world) { w.targets[1].interval, w.targets[1].scrape = "", now-119 }},
		"stale without interval":  {func(w *world) { w.targets[1].interval, w.targets[1].scrape = "", now-121 }, "node-1:9090: silent", true, ""},
		"no application info":     {func(w *world) { w.targets[1].drop("spirl_application_info") }, "node-1:9090: silent", true, ""},
		"one is missing":          {func(w *world) { w.targets = w.targets[1:] }, id(0) + ": silent", true, ""},
		"one missing, one unexpected": {func(w *world) {
			w.targets[0] = agent(7)
		}, id(0) + ": silent", true, ""},
		"one unexpected": {change: func(w *world) { w.targets = append(w.targets, agent(7)) }},
		"the ID is of an old scrape": {func(w *world) {
			w.targets[1].of("renewd_agent_info").at = now - 29
		}, "node-1:9090: unidentified, " + id(1) + ": silent", true, ""},
		"an agent that is too old": {func(w *world) {
			w.targets[1].drop("renewd_agent_info")
			w.expected = nil
		}, "node-1:9090: unidentified", true, ""},
		"an agent that is not attested": {func(w *world) {
			w.targets[1].of("renewd_agent_info").labels["spiffe_id"] = ""
			w.expected = nil
		}, "node-1:9090: unidentified", true, ""},
		"one target for two agents": {func(w *world) {
			w.targets[1].series = append(w.targets[1].series, *agent(2).of("renewd_agent_info"))
			w.targets = w.targets[:2]
		}, "node-1:9090: unidentified", true, ""},
		"more than config says":    {func(w *world) { w.cfg.Expected = 5 }, "2 of 5 agents that Prometheus does not scrape: silent", true, ""},
		"taint not seen":           {func(w *world) { w.targets[2].drop("renewd_taint_settled") }, "node-2:9090: behind", false, ""},
		"settled before":           {func(w *world) { w.targets[2].of("renewd_taint_settled").at = now - 29 }, "node-2:9090: behind", false, ""},
		"settled is 0":             {func(w *world) { w.targets[2].of("renewd_taint_settled").value = 0 }, "node-2:9090: settling", false, ""},
		"settled is no number":     {func(w *world) { w.targets[2].of("renewd_taint_settled").value = "NaN" }, "node-2:9090: behind", false, ""},
		"settled but holds":        {func(w *world) { w.targets[2].of("renewd_svids_held").value = 1 }, "node-2:9090: renewing", false, ""},
		"settled but pending":      {func(w *world) { w.targets[2].of("renewd_taint_renewals_pending").value = 1 }, "node-2:9090: renewing", false, ""},
		"settled but streams wait": {func(w *world) { w.targets[2].of("renewd_taint_streams_waiting").value = 1 }, "node-2:9090: streams", false, ""},
		"two replicas, one says 0": {func(w *world) {
			replica := *w.targets[2].of("renewd_taint_settled")
			replica.value, replica.labels = 0, map[string]string{"authority": "old", "replica": "b"}
			w.targets[2].series = append(w.targets[2].series, replica)
		}, "node-2:9090: settling", false, ""},
		"two replicas, one cannot scrape it": {func(w *world) {
			replica := *w.targets[2].of("up")
			replica.value, replica.labels = 0, map[string]string{"replica": "b"}
			w.targets[2].series = append(w.targets[2].series, replica)
		}, "node-2:9090: silent", true, ""},
		"one holds, one is silent": {func(w *world) {
			w.targets[0].health = "down"
			w.targets[2].of("renewd_taint_settled").value = 0
		}, "node-0:9090: silent, node-2:9090: settling", true, ""},
		"scraped twice": {func(w *world) {
			twin := agent(1)
			twin.instance, w.targets[2] = "10.0.0.1:9090", twin
		}, id(2) + ": silent", true, ""},
		"scraped twice, the newer says less": {func(w *world) {
			twin := agent(1)
			twin.instance, twin.scrape, twin.of("renewd_taint_settled").value = "10.0.0.1:9090", now-1, 0
			w.targets = append(w.targets, twin)
		}, "10.0.0.1:9090: settling", false, ""},
		"scraped twice, the older says less": {func(w *world) {
			twin := agent(1)
			twin.instance, twin.scrape = "10.0.0.1:9090", now-1
			w.targets[1].drop("renewd_taint_settled")
			w.targets = append(w.targets, twin)
		}, "10.0.0.1:9090: behind", false, ""},
		"one target for two clones": {func(w *world) {
			clone := *agent(1).of("renewd_agent_info")
			clone.labels["process_id"] = "another"
			w.targets[1].series = append(w.targets[1].series, clone)
		}, "node-1:9090: unidentified", true, ""},
		"scraped twice is one of two": {func(w *world) {
			twin := agent(1)
			twin.instance = "10.0.0.1:9090"
			w.targets, w.cfg.Expected = []*fakeTarget{w.targets[1], twin}, 2
		}, "1 of 2 agents that Prometheus does not scrape: silent", true, ""},
		"scraped twice, attested in between": {func(w *world) {
			twin := agent(1)
			twin.instance, twin.of("renewd_agent_info").labels["spiffe_id"] = "10.0.0.1:9090", id(2)
			w.targets, w.cfg.Expected = []*fakeTarget{w.targets[1], twin}, 2
		}, "1 of 2 agents that Prometheus does not scrape: silent", true, ""},
		// Agents that were started together differ only in their IDs.
		"one of two equal agents": {func(w *world) {
			w.targets[1].scrape, w.targets[2].scrape = now-3, now-3
			w.targets[2].of("renewd_taint_settled").value = 0
		}, "node-2:9090: settling", false, ""},
		"a clone": {func(w *world) {
			clone := agent(1)
			clone.instance, clone.of("renewd_agent_info").labels["process_id"] = "10.0.0.1:9090", "another"
			w.targets = append(w.targets, clone)
		}, "10.0.0.1:9090: duplicated, node-1:9090: duplicated", true, ""}, "a server in the job": {change: func(w *world) {
			s := agent(9)
			s.of("spirl_application_info").labels["spirl_component"] = "server"
			s.drop("renewd_taint_settled")
			s.drop("renewd_agent_info")
			w.targets = append(w.targets, s)
		}},
		"a server does not count": {func(w *world) {
			w.targets[0] = agent(9)
			w.targets[0].of("spirl_application_info").labels["spirl_component"] = "server"
		}, id(0) + ": silent", true, ""},
		"a server that is down": {func(w *world) {
			w.targets[0].of("spirl_application_info").labels["spirl_component"] = "server"
			w.targets[0].health = "down"
		}, "node-0:9090: silent", true, ""},
		"another trust domain": {change: func(w *world) {
			s := agent(9)
			s.of("spirl_application_info").labels["spirl_trust_domain"] = "other.org"
			s.of("renewd_agent_info").labels["spiffe_id"] = "spiffe://other.org/spire/agent/9"
			s.drop("renewd_taint_settled")
			w.targets = append(w.targets, s)
		}},
		"trust domain not given": {func(w *world) {
			w.cfg.TrustDomain = ""
			w.targets[2].of("spirl_application_info").labels["spirl_trust_domain"] = "other.org"
			w.targets[2].drop("renewd_taint_settled")
		}, "node-2:9090: behind", false, ""},
		"another job": {func(w *world) { w.targets[0].job = "other" }, id(0) + ": silent", true, ""},
		"own job name": {change: func(w *world) {
			w.cfg.Job = "mine"
			for _, t := range w.targets {
				t.job = "mine"
			}
		}},
		"two targets of one name": {func(w *world) {
			w.targets[2].instance = w.targets[1].instance
			w.targets[2].scrape = now - 1
			w.targets[2].of("renewd_taint_settled").value = 0
		}, "node-1:9090: settling, node-1:9090: silent", true, ""},
		"JWT-SVIDs have ended": {change: func(w *world) { w.jwt = ends(-1) }},
		"a JWT-SVID lives":     {change: func(w *world) { w.jwt = ends(0.5) }, jwt: true},
		// A restarted agent has forgotten its JWT-SVIDs. So has one that ended, or that
		// ran while Prometheus was down.
		"an agent was started again":             {change: func(w *world) { w.since = []string{"P1 before"} }, jwt: true},
		"an agent was not there at the begin":    {change: func(w *world) { w.before = []string{process(0), process(2)} }, jwt: true},
		"an agent was gone before it":            {change: func(w *world) { w.before = append(w.processes(), "gone") }},
		"Prometheus is young":                    {change: func(w *world) { w.before = []string{} }, jwt: true},
		"Prometheus was down":                    {change: func(w *world) { w.moments = 299 }, jwt: true},
		"Prometheus was never down":              {change: func(w *world) { w.moments = 300 }},
		"tainted for the life of a JWT-SVID":     {change: func(w *world) { w.tainted, w.moments, w.before = true, 1, []string{} }},
		"tainted for so long, and one is silent": {func(w *world) { w.tainted, w.targets[1].health = true, "down" }, "node-1:9090: silent", false, ""},
		"no target":                              {change: func(w *world) { w.targets = nil }, err: `no target has the job "renewd-agent"`},
		"no agent":                               {change: func(w *world) { w.cfg.TrustDomain = "third.org" }, err: "is an agent of third.org"},
		"targets fail":                           {change: func(w *world) { w.override["targets"] = "" }, err: "targets: server_error"},
		"targets are half":                       {change: func(w *world) { w.override["targets"] = incomplete(`{"activeTargets":[]}`) }, err: "may be incomplete: store-2 is down"},
		"time fails":                             {change: func(w *world) { w.override["time"] = "" }, err: "query the time: server_error"},
		"time is a vector":                       {change: func(w *world) { w.override["time"] = noVector }, err: "no scalar"},
		"agents fail":                            {change: func(w *world) { w.override["agents"] = "" }, err: "query the agents: server_error"},
		"agents are half":                        {change: func(w *world) { w.override["agents"] = incomplete(`{"resultType":"matrix","result":[]}`) }, err: "store-2 is down"},
		"agents are a vector":                    {change: func(w *world) { w.override["agents"] = noVector }, err: "no matrix"},
		"JWT fails":                              {change: func(w *world) { w.override["jwt"] = "" }, err: "query the JWT-SVIDs: server_error"},
		"silence fails":                          {change: func(w *world) { w.targets[0].health, w.override["held"] = "down", "" }, err: "query the silent agents: server_error"},
		"identities fail":                        {change: func(w *world) { w.targets[0].health, w.override["ids"] = "down", "" }, err: "query the silent agents: server_error"},
		"silence is something else": {change: func(w *world) {
			w.targets[0].health, w.override["answered"] = "down", `{"status":"success","data":{"resultType":"matrix","result":[]}}`
		}, err: "no vector"},
		"JWT is half":               {change: func(w *world) { w.override["jwt"] = incomplete(`{"resultType":"vector","result":[]}`) }, err: "store-2 is down"},
		"JWT is something else":     {change: func(w *world) { w.override["jwt"] = matrix }, err: "no vector"},
		"taint fails":               {change: func(w *world) { w.override["tainted"] = "" }, err: "query the JWT-SVIDs: server_error"},
		"taint is half":             {change: func(w *world) { w.override["tainted"] = incomplete(`{"resultType":"vector","result":[]}`) }, err: "store-2 is down"},
		"moments fail":              {change: func(w *world) { w.override["moments"] = "" }, err: "query the JWT-SVIDs: server_error"},
		"no moment":                 {change: func(w *world) { w.override["moments"] = noVector }, jwt: true},
		"processes since fail":      {change: func(w *world) { w.override["since"] = "" }, err: "query the JWT-SVIDs: server_error"},
		"processes before fail":     {change: func(w *world) { w.override["before"] = "" }, err: "query the JWT-SVIDs: server_error"},
		"processes before are half": {change: func(w *world) { w.override["before"] = incomplete(`{"resultType":"vector","result":[]}`) }, err: "store-2 is down"},
		"no Prometheus":             {change: func(w *world) { w.override["targets"] = "<html>" }, err: "targets: bad_response"},
		"Prometheus is too slow":    {change: func(w *world) { w.slow, w.cfg.Timeout = make(chan struct{}), 20*time.Millisecond }, err: "deadline exceeded"},
		"no label at all matches":   {func(w *world) { w.targets[0].of("up").labels = map[string]string{"job": "relabeled"} }, "node-0:9090: silent", true, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := &world{fake: &fake{targets: []*fakeTarget{agent(0), agent(1), agent(2)}, override: map[string]string{}},
				cfg: prom.Config{TrustDomain: "example.org"}, expected: []string{id(2), id(0), id(1)}}
			if tt.change != nil {
				tt.change(w)
			}
			s := httptest.NewServer(w.fake)
			defer s.Close()
			if w.slow != nil {
				defer close(w.slow)
			}
			w.cfg.URL = s.URL
			c, err := prom.New(w.cfg)
			if err != nil {
				t.Fatal(err)
			}
			f, err := c.Figures(t.Context(), "old", "key", w.expected)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) || f.X509Safe || f.JWTSafe {
					t.Errorf("error %v, want %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var holders []string
			for _, h := range f.Holders {
				holders = append(holders, h.Agent+": "+h.Reason)
			}
			if got := strings.Join(holders, ", "); got != tt.holders {
				t.Errorf("holders are %q, want %q", got, tt.holders)
			}
			if f.X509Safe != (tt.holders == "") || f.JWTSafe == tt.jwt {
				t.Errorf("X.509 safe %v, JWT safe %v", f.X509Safe, f.JWTSafe)
			}
			for _, a := range f.Agents {
				if !a.Up && name != "no application info" && (a.SVIDs != 12 || a.LastScrape.IsZero()) {
					t.Errorf("silent agent %+v", a)
				}
			}
			if !f.At.Equal(time.Unix(now, 0)) {
				t.Errorf("figures of %v", f.At)
			}
		})
	}
}

const noVector = `{"status":"success","data":{"resultType":"vector","result":[]}}`

const matrix = `{"status":"success","data":{"resultType":"matrix","result":[]}}`

func incomplete(data string) string {
	return `{"status":"success","warnings":["store-2 is down"],"data":` + data + `}`
}

func TestAgentsAndQueries(t *testing.T) {
	t.Parallel()
	w := &fake{targets: []*fakeTarget{agent(1), agent(0)}, jwt: ends(59.5)}
	w.targets[0].of("renewd_svids_held").value = 3
	w.targets[0].series = append(w.targets[0].series, series{name: "renewd_svids_held", value: 2,
		labels: map[string]string{"authority": "old", "svid_type": "x509", "state": "removed"}})
	w.targets[0].of("renewd_taint_renewals_pending").value = 5
	w.targets[0].of("renewd_taint_streams_waiting").value = 4
	w.targets[0].of("renewd_taint_settled").value = 0
	w.targets[1].health, w.targets[1].series = "down", nil
	s := httptest.NewServer(w)
	defer s.Close()
	c, err := prom.New(prom.Config{URL: s.URL, Job: `a"b\`, JWTLife: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	for _, target := range w.targets {
		target.job = `a"b\`
	}
	f, err := c.Figures(t.Context(), "o.d|\xff", `k"\`, []string{id(0), id(1), id(2), id(3)})
	if err != nil {
		t.Fatal(err)
	}
	want := []prom.Agent{
		{Instance: "node-0:9090", ID: id(0), Hostname: "host-0", LastScrape: time.UnixMilli(now*1000 - 3_600_500), SVIDs: 12},
		{Instance: "node-1:9090", ID: id(1), Process: process(1), LastScrape: time.Unix(now-14, 0), Up: true, Version: "1.2.3", Hostname: "host-1", Sequence: 7,
			SVIDs: 5, Pending: 5, Streams: 4, Seen: true},
	}
	if !slices.Equal(f.Agents, want) {
		t.Errorf("agents\n%+v, want\n%+v", f.Agents, want)
	}
	for i, h := range f.Holders[:len(want)] {
		if h.Hostname != want[i].Hostname {
			t.Errorf("holder %+v has not the hostname of %+v", h, want[i])
		}
	}
	if f.X509SVIDs != 17 || f.Expected != 4 || f.Missing != 2 || f.Holding != 4 || !f.JWTExpiry.Equal(time.Unix(now+60, 0)) {
		t.Errorf("figures %+v", f)
	}
	if f.Behind(7) != 3 || f.Behind(8) != 4 {
		t.Errorf("%d behind 7, %d behind 8", f.Behind(7), f.Behind(8))
	}
	for about, want := range map[string]string{
		"agents":   `,job="a\"b\\",authority=~"o\\.d\\|�|"}[30000ms] at 1800000000`,
		"answered": `max_over_time(timestamp(spirl_application_info{job="a\"b\\",instance=~"node-0:9090"})[1d:1m]) at 1800000000`,
		"held":     `last_over_time(renewd_svids_held{job="a\"b\\",instance=~"node-0:9090",authority="o.d|�"}[1d]) at 1800000000`,
		"ids":      `last_over_time(renewd_agent_info{job="a\"b\\",instance=~"node-0:9090"}[1d]) at 1800000000`,
		"jwt":      `max(max_over_time(renewd_jwt_svid_latest_expiry_timestamp_seconds{job="a\"b\\",key_id="k\"\\"}[3600000ms])) at 1800000000`,
		"tainted":  `count(last_over_time(renewd_svids_held{job="a\"b\\",svid_type="jwt",authority="k\"\\",state="tainted"}[3600000ms])) at 1799996400`,
	} {
		if !strings.HasSuffix(w.queries[about], want) {
			t.Errorf("query of %s is\n%s, want\n%s", about, w.queries[about], want)
		}
	}
	if f, err := c.Figures(t.Context(), "old", "", nil); err != nil || !f.JWTExpiry.IsZero() || f.JWTSafe {
		t.Errorf("without a JWT key: expiry %v, safe %v, %v", f.JWTExpiry, f.JWTSafe, err)
	}
}

// TestScrapedTwice: for an agent with two targets, only what both say is known.
func TestScrapedTwice(t *testing.T) {
	t.Parallel()
	older, newer := agent(1), agent(1)
	newer.instance, newer.scrape = "10.0.0.1:9090", now-1
	for name, value := range map[string]float64{
		"renewd_svids_held": 3, "renewd_taint_renewals_pending": 4, "renewd_taint_streams_waiting": 5,
		"renewd_taint_settled": 0, "renewd_bundle_sequence_number": 6,
	} {
		older.of(name).value = value
	}
	for _, targets := range [][]*fakeTarget{{older, newer}, {newer, older}} {
		s := httptest.NewServer(&fake{targets: targets})
		defer s.Close()
		c, err := prom.New(prom.Config{URL: s.URL})
		if err != nil {
			t.Fatal(err)
		}
		f, err := c.Figures(t.Context(), "old", "key", []string{id(1)})
		want := []prom.Agent{{Instance: "10.0.0.1:9090", ID: id(1), Process: process(1), LastScrape: time.Unix(now-1, 0), Up: true, Version: "1.2.3", Hostname: "host-1",
			Sequence: 6, SVIDs: 3, Pending: 4, Streams: 5, Seen: true}}
		if err != nil || !slices.Equal(f.Agents, want) || f.X509Safe {
			t.Errorf("%v, agents\n%+v, want\n%+v", err, f.Agents, want)
		}
	}
}

func TestQueriesOfTheHistory(t *testing.T) {
	t.Parallel()
	w := &fake{targets: []*fakeTarget{agent(0)}}
	s := httptest.NewServer(w)
	defer s.Close()
	c, err := prom.New(prom.Config{URL: s.URL, TrustDomain: "example.org", JWTLife: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	if f, err := c.Figures(t.Context(), "old", "key", nil); err != nil || !f.JWTSafe {
		t.Fatalf("safe %v, %v", f.JWTSafe, err)
	}
	processes := `group by (process_id) (last_over_time(renewd_agent_info{job="renewd-agent",spiffe_id=~"spiffe://example\\.org/.*"}[3600000ms])) at `
	for about, want := range map[string]string{
		"moments": `count_over_time(count(up{job="renewd-agent"})[3600000ms:300000ms]) at 1800000000`,
		"since":   processes + "1800000000",
		"before":  processes + "1799996400",
	} {
		if w.queries[about] != want {
			t.Errorf("query of %s is\n%s, want\n%s", about, w.queries[about], want)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	for _, c := range []prom.Config{
		{}, {URL: "localhost:9090"}, {URL: "http://user:secret@host:port"}, {URL: "ftp://user:secret@host"},
		{URL: "http://host", Expected: -1}, {URL: "http://host", JWTLife: -1}, {URL: "http://host", Timeout: -1},
	} {
		if _, err := prom.New(c); err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

func TestBasicAuth(t *testing.T) {
	t.Parallel()
	w := &fake{targets: []*fakeTarget{agent(0)}, jwt: []any{}}
	s := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != "me" || password != "secret" {
			rw.WriteHeader(http.StatusUnauthorized)
			return
		}
		w.ServeHTTP(rw, r)
	}))
	c, err := prom.New(prom.Config{URL: strings.Replace(s.URL, "://", "://me:secret@", 1)})
	if err != nil {
		t.Fatal(err)
	}
	if f, err := c.Figures(t.Context(), "old", "key", []string{id(0)}); err != nil || !f.X509Safe {
		t.Errorf("safe %v, %v", f.X509Safe, err)
	}
	s.Close()
	if _, err := c.Figures(t.Context(), "old", "key", []string{id(0)}); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("Prometheus is gone: %v", err)
	}
}
