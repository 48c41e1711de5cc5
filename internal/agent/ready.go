package agent

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/renewd/renewd/bundle"
)

// pollFailureLimit is how long polls of the server may fail before the agent is not
// ready. It is longer than a restart of the server and much shorter than the lifetime
// of an SVID.
const pollFailureLimit = 5 * time.Minute

// check is one condition of readiness. err returns why it is not met, one reason a line.
// It does no I/O and is safe for concurrent use.
type check struct {
	name string
	err  func() error
}

// newChecks returns the checks of /ready, in the order of its answer.
func (a *Agent) newChecks() []check {
	checks := []check{
		{"starting", a.checkStarted},
		{"agent_svid", a.client.Identified},
		{"socket", a.checkSocket},
		{"x509_svids", a.checkServing},
		{"entries", func() error { return a.entrySyncs.failing("entry sync") }},
		{"bundle", func() error { return a.bundleRefreshes.failing("bundle refresh") }},
		{"data_dir", a.store.Err},
	}
	if a.svidStore != nil {
		checks = append(checks, check{"runtime_dir", a.svidStore.Err})
	}
	return checks
}

// ready returns nil when all checks pass, and otherwise one reason a line, each with the
// name of its check.
func (a *Agent) ready() error {
	var errs []error
	for _, c := range a.checks {
		err := c.err()
		if err == nil {
			continue
		}
		for line := range strings.Lines(err.Error()) {
			errs = append(errs, fmt.Errorf("%s: %s", c.name, strings.TrimSpace(line)))
		}
	}
	return errors.Join(errs...)
}

func (a *Agent) checkStarted() error {
	if !a.cache.Ready() {
		return errors.New("the trust bundle and the registration entries have not arrived yet")
	}
	return nil
}

// checkSocket fails when workloads that connect now do not reach the agent.
func (a *Agent) checkSocket() error {
	if lis := a.socket.Load(); lis != nil {
		return lis.Err()
	}
	return nil
}

// checkServing fails when no entry has a valid SVID. If only some have none, the cause
// may be in those entries.
func (a *Agent) checkServing() error {
	if entries, valid := a.cache.Serving(); entries > 0 && !valid {
		return fmt.Errorf("none of the %d entries has a valid X.509-SVID", entries)
	}
	return nil
}

func (a *Agent) bundleRefreshed(outcome string, _ *bundle.Bundle) {
	a.metrics.BundleRefreshed(outcome)
	switch outcome {
	case bundle.OutcomeFailed, bundle.OutcomeRejected:
		a.bundleRefreshes.record(fmt.Errorf("the last one %s, see the log", outcome))
	default:
		a.bundleRefreshes.record(nil)
	}
}

// pollHealth records since when a poll of the server fails. It is safe for concurrent
// use.
type pollHealth struct {
	mu   sync.Mutex
	last time.Time // of the last success, with a monotonic reading
	err  error
}

func (u *pollHealth) record(err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.err = err; err == nil {
		u.last = time.Now()
	}
}

// failing returns an error when the poll has not succeeded for pollFailureLimit.
func (u *pollHealth) failing(what string) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	since := time.Since(u.last)
	switch {
	case u.last.IsZero() || since < pollFailureLimit:
		return nil
	case u.err != nil:
		return fmt.Errorf("no %s has succeeded for %v: %w", what, since.Round(time.Second), u.err)
	}
	return fmt.Errorf("no %s has succeeded for %v", what, since.Round(time.Second))
}
