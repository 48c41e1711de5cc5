package agent_test

import (
	"slices"
	"testing"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/metrics"
	"github.com/renewd/renewd/renew"
)

// Package metrics does not import the packages that it counts for. Their reasons and
// outcomes must be series from the start.
func TestMetricsHaveAllReasonsAndOutcomes(t *testing.T) {
	families, err := metrics.New(metrics.Config{}).Registry().Gather()
	if err != nil {
		t.Fatal(err)
	}
	series := map[string]bool{}
	for _, f := range families {
		for _, m := range f.Metric {
			name := f.GetName()
			for _, l := range m.Label {
				name += " " + l.GetValue()
			}
			series[name] = true
		}
	}
	for _, reason := range renew.Reasons {
		for _, outcome := range renew.Outcomes {
			// Labels are in alphabetical order: outcome, reason.
			if name := "renewd_renewals_total " + string(outcome) + " " + string(reason); !series[name] {
				t.Errorf("no series %s", name)
			}
		}
	}
	for _, state := range renew.States {
		if !slices.Contains(metrics.SVIDStates, state.String()) {
			t.Errorf("no series renewd_svids %v", state)
		}
	}
	for _, outcome := range []string{bundle.OutcomeApplied, bundle.OutcomeUnchanged, bundle.OutcomeRejected, bundle.OutcomeFailed} {
		if name := "renewd_bundle_refreshes_total " + outcome; !series[name] {
			t.Errorf("no series %s", name)
		}
	}
}
