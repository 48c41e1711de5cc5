package agent_test

import (
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
	for _, outcome := range []string{bundle.OutcomeApplied, bundle.OutcomeUnchanged, bundle.OutcomeRejected, bundle.OutcomeFailed} {
		if name := "renewd_bundle_refreshes_total " + outcome; !series[name] {
			t.Errorf("no series %s", name)
		}
	}
}

// Every state of an X.509-SVID is a series, at 0 too.
func TestMetricsHaveAllStates(t *testing.T) {
	inWorld(t, 1, nil, func(w *world) {
		w.waitHeld(1)
		for _, state := range renew.States {
			if _, ok := w.agent.State().SVIDs[state.String()]; !ok {
				w.t.Errorf("no series renewd_svids %v", state)
			}
		}
	})
}
