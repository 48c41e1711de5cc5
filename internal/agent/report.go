package agent

import (
	"context"
	"errors"
	"reflect"
	"time"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/agent/upstream"
	"github.com/renewd/renewd/metrics"
)

const (
	// reportInterval is how often an unchanged report is repeated: the server may
	// have been restarted.
	reportInterval = time.Minute
	// unsupportedInterval is how often reports or statuses are tried again after the
	// server has refused one. SPIRE logs an error each time.
	unsupportedInterval = 10 * time.Minute
)

// runReports reports to the server, until ctx is done, which bundle is in force and how
// far this node's taint renewals are. It checks at each new bundle and each refresh
// interval, and calls when something has changed and once a minute.
func (a *Agent) runReports(ctx context.Context) error {
	var (
		posted, reported time.Time // with monotonic readings
		postedFor        time.Time // attestation at the last post
		sequence         uint64
		last             upstream.Report
		postWait         = reportInterval
		wait             = reportInterval
	)
	watch := a.cache.Watch()
	defer watch.Close()
	for {
		attested := a.client.Attested()
		if s := a.cache.Bundle(); s != nil {
			n := s.Own.Sequence()
			if time.Since(posted) >= postWait || attested.After(postedFor) || (n != sequence && postWait != unsupportedInterval) {
				err := a.client.PostStatus(ctx, n)
				if err == nil {
					posted, postedFor, sequence, postWait = time.Now(), attested, n, reportInterval
				} else if errors.Is(err, upstream.ErrNoReports) {
					posted, postedFor, postWait = time.Now(), attested, unsupportedInterval
				} else if ctx.Err() == nil {
					a.log.Debug("status not posted", "error", err)
				}
			}
			if r := a.newReport(); !reported.IsZero() && time.Since(reported) < wait && (wait == unsupportedInterval || reflect.DeepEqual(r, last)) {
				// The server has this report, or accepts none.
			} else if err := a.client.Report(ctx, r); errors.Is(err, upstream.ErrNoReports) {
				reported, wait = time.Now(), unsupportedInterval
			} else if err == nil {
				reported, last, wait = time.Now(), r, reportInterval
			} else if ctx.Err() == nil {
				a.log.Debug("report not sent", "error", err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-watch.C():
		case <-time.After(bundle.Jitter(a.cfg.RefreshInterval)):
		}
	}
}

// newReport returns this node's report. There must be a bundle in force.
func (a *Agent) newReport() upstream.Report {
	// Read the snapshot first: then the state is of this bundle or a later one.
	snapshot := a.cache.Bundle()
	r := upstream.Report{Sequence: snapshot.Own.Sequence(), Rate: float64(a.cfg.TaintRate), Hostname: a.cfg.Hostname}
	for _, s := range a.State().Authorities {
		if s.Type != metrics.TypeX509 || (!s.State.Tainted() && s.State != metrics.StateRemoved) {
			continue
		}
		report := upstream.AuthorityReport{
			ID: s.ID, Tainted: s.State.Tainted(), Pending: s.Pending, Streams: s.Streams,
			Settled: s.State == metrics.StateSettled,
		}
		if _, since := snapshot.State(s.ID); !since.IsZero() {
			report.BeginsAt = since.Add(a.TaintDelay(s.ID))
		}
		r.Authorities = append(r.Authorities, report)
	}
	return r
}
