package prom

import (
	"context"
	"errors"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	v1 "github.com/prometheus/client_golang/api/prometheus/v1"
	"github.com/prometheus/common/model"
)

// The series. Package metrics describes them.
const (
	seriesUp       = "up"
	seriesInfo     = "spirl_application_info"
	seriesHeld     = "renewd_svids_held"
	seriesPending  = "renewd_taint_renewals_pending"
	seriesStreams  = "renewd_taint_streams_waiting"
	seriesSettled  = "renewd_taint_settled"
	seriesSequence = "renewd_bundle_sequence_number"
	seriesAgent    = "renewd_agent_info"
	seriesJWT      = "renewd_jwt_svid_latest_expiry_timestamp_seconds"
)

// The labels of seriesAgent.
const (
	labelID       = "spiffe_id"
	labelProcess  = "process_id"
	labelHostname = "hostname"
)

var seriesOfScrape = strings.Join([]string{seriesUp, seriesInfo, seriesHeld, seriesPending, seriesStreams,
	seriesSettled, seriesSequence, seriesAgent}, "|")

// defaultInterval is Prometheus' default, for a target without an interval.
const defaultInterval = time.Minute

// target is a scrape target of the job and its newest scrape.
type target struct {
	labels   model.LabelSet
	interval time.Duration
	healthy  bool

	scrape   time.Time // of the newest sample of up; zero: none in the window
	up       bool
	info     model.Metric // of spirl_application_info; nil: none
	hostname string       // of the newest scrape, or for a silent target of the last day
	// The process IDs of the newest scrape: none if the agent is too old, several if
	// the target is several agents.
	processes []string
	// The values of the newest scrape, by series: for settled the lowest, for counts
	// the sum.
	values map[string]float64
	// The SPIFFE IDs of the newest scrape, or for a silent target all of the last
	// day. The target counts for each of them.
	ids map[string]bool
	// The last answered scrape within a day. For a silent target, what it held then.
	answered time.Time
	held     float64
}

func (t *target) addID(id model.LabelValue) {
	if id != "" {
		if t.ids == nil {
			t.ids = make(map[string]bool)
		}
		t.ids[string(id)] = true
	}
}

// id returns the target's SPIFFE ID. It is empty if there are none or several.
func (t *target) id() string {
	if len(t.ids) == 1 {
		for id := range t.ids {
			return id
		}
	}
	return ""
}

func (t *target) instance() string { return string(t.labels[model.InstanceLabel]) }

func (c *Client) targets(ctx context.Context) ([]*target, error) {
	res, err := c.api.Targets(ctx)
	if err != nil {
		return nil, fmt.Errorf("targets: %w", err)
	}
	var out []*target
	for _, a := range res.Active {
		if string(a.Labels[model.JobLabel]) != c.cfg.Job {
			continue
		}
		t := &target{labels: a.Labels, interval: defaultInterval, healthy: a.Health == v1.HealthGood}
		if d, err := model.ParseDuration(a.DiscoveredLabels["__scrape_interval__"]); err == nil && d > 0 {
			t.interval = time.Duration(d)
		}
		out = append(out, t)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("no target has the job %q: give the scrape job of the agents, and the Prometheus that scrapes them", c.cfg.Job)
	}
	return out, nil
}

// clock returns Prometheus' time, so that this machine's clock does not matter.
func (c *Client) clock(ctx context.Context) (time.Time, error) {
	v, _, _, err := c.api.Query(ctx, "time()", time.Time{})
	if err != nil {
		return time.Time{}, fmt.Errorf("query the time: %w", err)
	}
	s, ok := v.(*model.Scalar)
	if !ok {
		return time.Time{}, errors.New("query the time: the answer is no scalar")
	}
	return s.Timestamp.Time(), nil
}

// scrapes reads the newest scrape of each target. It queries raw samples, because they
// have the times of their scrapes.
func (c *Client) scrapes(ctx context.Context, at time.Time, authority string, targets []*target) error {
	var window time.Duration
	byInstance := make(map[string][]*target, len(targets))
	for _, t := range targets {
		window = max(window, 2*t.interval)
		byInstance[t.instance()] = append(byInstance[t.instance()], t)
	}
	query := fmt.Sprintf(`{__name__=~%s,job=%s,authority=~%s}[%dms]`, strconv.Quote(seriesOfScrape), label(c.cfg.Job),
		strconv.Quote(regexp.QuoteMeta(exported(authority))+"|"), window.Milliseconds())
	v, _, _, err := c.api.Query(ctx, query, at)
	if err != nil {
		return fmt.Errorf("query the agents: %w", err)
	}
	series, ok := v.(model.Matrix)
	if !ok {
		return errors.New("query the agents: the answer is no matrix")
	}
	of := func(s *model.SampleStream) *target {
		for _, t := range byInstance[string(s.Metric[model.InstanceLabel])] {
			if t.matches(s.Metric) {
				return t
			}
		}
		return nil
	}
	for _, s := range series {
		if t := of(s); t != nil && s.Metric[model.MetricNameLabel] == seriesUp && len(s.Values) > 0 {
			switch last := s.Values[len(s.Values)-1]; last.Timestamp.Time().Compare(t.scrape) {
			case 1:
				t.scrape, t.up = last.Timestamp.Time(), last.Value == 1
			case 0: // from another replica
				t.up = t.up && last.Value == 1
			}
		}
	}
	for _, s := range series {
		if t := of(s); t != nil && len(s.Values) > 0 {
			last := s.Values[len(s.Values)-1]
			if s.Metric[model.MetricNameLabel] == seriesInfo && last.Timestamp.Time().After(t.answered) {
				t.answered = last.Timestamp.Time()
			}
			t.addSample(s.Metric, last)
		}
	}
	return nil
}

// matches reports whether a series with these labels comes from the target.
func (t *target) matches(m model.Metric) bool {
	for name, value := range t.labels {
		if m[name] != value {
			return false
		}
	}
	return true
}

// addSample adds a sample to the values if it is of the newest scrape.
func (t *target) addSample(m model.Metric, s model.SamplePair) {
	if !s.Timestamp.Time().Equal(t.scrape) {
		return
	}
	name, v := string(m[model.MetricNameLabel]), float64(s.Value)
	if math.IsNaN(v) {
		return
	}
	if t.values == nil {
		t.values = make(map[string]float64)
	}
	old, again := t.values[name]
	switch {
	case name == seriesInfo:
		t.info = m
	case name == seriesAgent:
		t.addID(m[labelID])
		t.hostname = string(m[labelHostname])
		if p := string(m[labelProcess]); p != "" && !slices.Contains(t.processes, p) {
			t.processes = append(t.processes, p)
		}
	case again && name == seriesSettled:
		t.values[name] = min(old, v)
	default:
		t.values[name] = old + v
	}
}

// recent reports whether the newest scrape was answered and is recent.
func (t *target) recent(at time.Time) bool {
	return t.healthy && t.up && !t.scrape.Before(at.Add(-2*t.interval))
}

// lastAnswers reads the last answer of silent targets, to the minute, and their SPIFFE
// IDs and SVIDs at that time. Except for missing agents they are only displayed.
func (c *Client) lastAnswers(ctx context.Context, at time.Time, authority string, targets []*target) error {
	byInstance := make(map[string][]*target)
	var names []string
	for _, t := range targets {
		if !t.recent(at) {
			byInstance[t.instance()] = append(byInstance[t.instance()], t)
			names = append(names, regexp.QuoteMeta(t.instance()))
		}
	}
	if len(names) == 0 {
		return nil
	}
	silent := fmt.Sprintf(`job=%s,instance=~%s`, label(c.cfg.Job), strconv.Quote(strings.Join(names, "|")))
	read := func(query string, take func(*target, model.Metric, float64)) error {
		v, _, _, err := c.api.Query(ctx, query, at)
		if err != nil {
			return fmt.Errorf("query the silent agents: %w", err)
		}
		vector, ok := v.(model.Vector)
		if !ok {
			return errors.New("query the silent agents: the answer is no vector")
		}
		for _, s := range vector {
			for _, t := range byInstance[string(s.Metric[model.InstanceLabel])] {
				if t.matches(s.Metric) && !math.IsNaN(float64(s.Value)) {
					take(t, s.Metric, float64(s.Value))
				}
			}
		}
		return nil
	}
	err := read(fmt.Sprintf(`max_over_time(timestamp(%s{%s})[1d:1m])`, seriesInfo, silent), func(t *target, _ model.Metric, v float64) {
		if last := model.TimeFromUnixNano(int64(v * 1e9)).Time(); last.After(t.answered) {
			t.answered = last
		}
	})
	if err != nil {
		return err
	}
	err = read(fmt.Sprintf(`last_over_time(%s{%s}[1d])`, seriesAgent, silent), func(t *target, m model.Metric, _ float64) {
		t.addID(m[labelID])
		t.hostname = string(m[labelHostname])
	})
	if err != nil {
		return err
	}
	// There may be a series for each state of the authority, with the same SVIDs.
	return read(fmt.Sprintf(`last_over_time(%s{%s,authority=%s}[1d])`, seriesHeld, silent, label(exported(authority))), func(t *target, _ model.Metric, v float64) {
		t.held = max(t.held, v)
	})
}

// exported returns the label value that agents export for an ID.
func exported(id string) string { return strings.ToValidUTF8(id, "\uFFFD") }

// label quotes a label value for PromQL, which has Go's escapes.
func label(value string) string { return strconv.Quote(value) }
