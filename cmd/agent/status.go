package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/metrics"
	"github.com/renewd/renewd/renew"
)

// agentStatus is what "status" prints, and the whole of its JSON form. It is
// read from the metrics, so it says what a dashboard says.
type agentStatus struct {
	Version     string        `json:"version"`
	TrustDomain string        `json:"trust_domain"`
	Deployment  string        `json:"deployment,omitempty"`
	Ready       bool          `json:"ready"`
	NotReady    []string      `json:"not_ready_because,omitempty"`
	OwnID       string        `json:"agent_id,omitempty"`
	OwnExpiry   *time.Time    `json:"agent_svid_expires_at,omitempty"`
	Bundle      *bundleStatus `json:"bundle,omitempty"`
	// SVIDs counts the workloads' X.509-SVIDs by their state (renew.State).
	SVIDs       map[string]int    `json:"svids"`
	Authorities []authorityStatus `json:"authorities"`
}

type bundleStatus struct {
	Sequence  uint64    `json:"sequence"`
	AppliedAt time.Time `json:"applied_at"`
}

type authorityStatus struct {
	Type    string `json:"type"`
	ID      string `json:"id"`
	State   string `json:"state"`
	Held    int    `json:"held"`
	Pending *int   `json:"renewals_pending,omitempty"` // tainted or removed X.509 authorities only
	Streams *int   `json:"streams_waiting,omitempty"`  // likewise
	// Safe is set for tainted X.509 authorities only.
	Safe *bool `json:"safe_to_remove,omitempty"`
	// LastJWT is when the last JWT-SVID handed out under the key ends.
	LastJWT *time.Time `json:"last_jwt_expires_at,omitempty"`
}

// statusCommand is "status".
func statusCommand(ctx context.Context, call *cli.Call) error {
	var p endpoint
	p.flags(call)
	call.Output()
	if _, err := call.Parse(); err != nil {
		return err
	}
	notReady, err := p.ready(ctx)
	if err != nil {
		return err
	}
	code, body, err := p.get(ctx, "/metrics")
	if err != nil {
		return err
	}
	if code != http.StatusOK {
		return statusError(p.url+"/metrics", code)
	}
	s, err := readStatus(body)
	if err != nil {
		return fmt.Errorf("%s/metrics: %w", p.url, err)
	}
	s.Ready, s.NotReady = len(notReady) == 0, notReady
	if call.JSON() {
		return cli.PrintJSON(call.Stdout, s)
	}
	return s.print(call.Stdout, time.Now())
}

// readStatus finds the state of an agent in what it answers to a scrape.
func readStatus(scrape []byte) (*agentStatus, error) {
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(scrape))
	if err != nil {
		return nil, fmt.Errorf("read metrics: %w", err)
	}
	s := &agentStatus{SVIDs: map[string]int{}, Authorities: []authorityStatus{}}
	found := false
	each(families, "spirl_application_info", func(label map[string]string, _ float64) {
		found = found || label["spirl_component"] == "agent"
		s.Version, s.TrustDomain, s.Deployment = label["spirl_app_version"], label["spirl_trust_domain"], label["spirl_trust_domain_deployment"]
	})
	if !found {
		return nil, fmt.Errorf("not the metrics of a renewd agent: spirl_application_info is missing")
	}
	each(families, "renewd_agent_svid_expiry_timestamp_seconds", func(label map[string]string, v float64) {
		s.OwnID, s.OwnExpiry = label["spiffe_id"], unixTime(v)
	})
	each(families, "renewd_bundle_applied_timestamp_seconds", func(_ map[string]string, v float64) {
		s.Bundle = &bundleStatus{AppliedAt: *unixTime(v)}
	})
	each(families, "renewd_bundle_sequence_number", func(_ map[string]string, v float64) {
		if s.Bundle != nil {
			s.Bundle.Sequence = uint64(v)
		}
	})
	each(families, "renewd_svids", func(label map[string]string, v float64) {
		s.SVIDs[label["state"]] = int(v)
	})
	s.authorities(families)
	return s, nil
}

// authorities reads one row for each signing authority, X.509 first.
func (s *agentStatus) authorities(families map[string]*dto.MetricFamily) {
	type key struct{ typ, id string }
	rows := map[key]*authorityStatus{}
	each(families, "renewd_svids_held", func(label map[string]string, v float64) {
		rows[key{label["svid_type"], label["authority"]}] = &authorityStatus{
			Type: label["svid_type"], ID: label["authority"], State: label["state"], Held: int(v),
		}
	})
	fill := func(name, typ, labelName string, set func(*authorityStatus, float64)) {
		each(families, name, func(label map[string]string, v float64) {
			if row := rows[key{typ, label[labelName]}]; row != nil {
				set(row, v)
			}
		})
	}
	fill("renewd_taint_renewals_pending", metrics.TypeX509, "authority", func(r *authorityStatus, v float64) { n := int(v); r.Pending = &n })
	fill("renewd_taint_streams_waiting", metrics.TypeX509, "authority", func(r *authorityStatus, v float64) { n := int(v); r.Streams = &n })
	fill("renewd_taint_settled", metrics.TypeX509, "authority", func(r *authorityStatus, v float64) { safe := v == 1; r.Safe = &safe })
	fill("renewd_jwt_svid_latest_expiry_timestamp_seconds", metrics.TypeJWT, "key_id", func(r *authorityStatus, v float64) { r.LastJWT = unixTime(v) })
	for _, row := range rows {
		s.Authorities = append(s.Authorities, *row)
	}
	slices.SortFunc(s.Authorities, func(a, b authorityStatus) int {
		return cmp.Or(-cmp.Compare(a.Type, b.Type), cmp.Compare(a.ID, b.ID))
	})
}

// each calls f with the labels and the value of every series of a gauge.
func each(families map[string]*dto.MetricFamily, name string, f func(label map[string]string, v float64)) {
	for _, m := range families[name].GetMetric() {
		labels := map[string]string{}
		for _, l := range m.GetLabel() {
			labels[l.GetName()] = l.GetValue()
		}
		f(labels, m.GetGauge().GetValue())
	}
}

func unixTime(seconds float64) *time.Time {
	t := time.UnixMilli(int64(seconds * 1000)).UTC()
	return &t
}

func (s *agentStatus) print(w io.Writer, now time.Time) error {
	head := cli.NewTable(w)
	row := func(name, value string) { _, _ = fmt.Fprintf(head, "%s\t%s\n", name, value) }
	row("Version:", s.Version)
	row("Trust domain:", s.TrustDomain)
	if s.Deployment != "" {
		row("Deployment:", s.Deployment)
	}
	if s.Ready {
		row("Ready:", "yes")
	} else {
		row("Ready:", "no, "+s.NotReady[0])
		for _, reason := range s.NotReady[1:] {
			row("", reason)
		}
	}
	if s.OwnExpiry != nil {
		row("Agent:", s.OwnID)
		row("Agent SVID:", "expires "+cli.When(*s.OwnExpiry, now))
	}
	if s.Bundle != nil {
		row("Trust bundle:", fmt.Sprintf("sequence %d, applied %s", s.Bundle.Sequence, cli.When(s.Bundle.AppliedAt, now)))
	}
	row("X.509-SVIDs:", s.states())
	if err := cli.Flush(head); err != nil {
		return err
	}
	if len(s.Authorities) == 0 {
		return cli.Printf(w, "\nNo signing authority is known yet.\n")
	}
	table := cli.NewTable(w)
	_, _ = fmt.Fprint(table, "\nTYPE\tAUTHORITY\tSTATE\tHELD\tPENDING\tSTREAMS\tSAFE TO REMOVE\tLAST JWT ENDS\n")
	for _, a := range s.Authorities {
		safe, last := "-", "-"
		if a.Safe != nil {
			safe = map[bool]string{true: "yes, here", false: "no"}[*a.Safe]
		}
		if a.LastJWT != nil {
			last = cli.When(*a.LastJWT, now)
		}
		_, _ = fmt.Fprintf(table, "%s\t%s\t%s\t%d\t%s\t%s\t%s\t%s\n",
			a.Type, a.ID, a.State, a.Held, count(a.Pending), count(a.Streams), safe, last)
	}
	return cli.Flush(table)
}

// states lists the states that X.509-SVIDs are in.
func (s *agentStatus) states() string {
	var out []string
	for _, state := range renew.States {
		if n := s.SVIDs[state.String()]; n > 0 {
			out = append(out, fmt.Sprintf("%d %s", n, strings.ReplaceAll(state.String(), "_", " ")))
		}
	}
	return cmp.Or(strings.Join(out, ", "), "none")
}

func count(n *int) string {
	if n == nil {
		return "-"
	}
	return strconv.Itoa(*n)
}
