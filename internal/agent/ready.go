package agent

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/renewd/renewd/bundle"
)

// upkeepLimit is how long polls of the server may fail before the agent is not
// ready. It is longer than a restart of the server, and short beside the life of
// an SVID: there is time to look.
const upkeepLimit = 5 * time.Minute

// check is one thing that has to be so for the agent to be ready. err says in
// one line or more why it is not. It is called at any time, returns soon and
// does no I/O.
type check struct {
	name string
	err  func() error
}

// newChecks lists what /ready is about, in the order in which it is told.
func (a *Agent) newChecks() []check {
	checks := []check{
		{"starting", a.checkStarted},
		{"agent_svid", a.client.Identified},
		{"socket", a.checkSocket},
		{"x509_svids", a.checkServing},
		{"entries", func() error { return a.syncs.failing("entry sync") }},
		{"bundle", func() error { return a.refreshes.failing("bundle refresh") }},
		{"data_dir", a.store.Err},
	}
	if a.keeper != nil {
		checks = append(checks, check{"runtime_dir", a.keeper.Err})
	}
	return checks
}

// ready is nil when the agent does all of its work, and otherwise says what is
// wrong: one reason a line, each with the name of its check.
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

// checkSocket finds out that workloads that connect now do not reach the agent.
func (a *Agent) checkSocket() error {
	if lis := a.socket.Load(); lis != nil {
		return lis.Err()
	}
	return nil
}

// checkServing finds out that no workload can be served. That some entries have
// no SVID may be theirs.
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
		a.refreshes.note(fmt.Errorf("the last one %s, see the log", outcome))
	default:
		a.refreshes.note(nil)
	}
}

// upkeep remembers since when something that is done all the time fails. It is
// safe for concurrent use.
type upkeep struct {
	mu   sync.Mutex
	last time.Time // when it succeeded, by the clock that is never set
	err  error
}

func (u *upkeep) note(err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.err = err; err == nil {
		u.last = time.Now()
	}
}

// failing is an error when it has not succeeded for upkeepLimit.
func (u *upkeep) failing(what string) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	since := time.Since(u.last)
	switch {
	case u.last.IsZero() || since < upkeepLimit:
		return nil
	case u.err != nil:
		return fmt.Errorf("no %s has succeeded for %v: %w", what, since.Round(time.Second), u.err)
	}
	return fmt.Errorf("no %s has succeeded for %v", what, since.Round(time.Second))
}
