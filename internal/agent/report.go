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
	// reportAgain is how often the server is told what it knows: it may have
	// been restarted meanwhile.
	reportAgain = time.Minute
	// askAgain is how often a server that takes no reports, or no statuses, is
	// asked whether it does by now. SPIRE logs an error each time.
	askAgain = 10 * time.Minute
)

// report tells the server, until ctx is done, which bundle is in force and how
// far this node is with what a taint made necessary. It looks when another
// bundle is in force and at each refresh interval, and calls when something has
// changed, and once a minute.
func (a *Agent) report(ctx context.Context) error {
	var (
		posted, reported time.Time // by the clock that is never set
		postedFor        time.Time // the attestation
		sequence         uint64
		last             upstream.Report
		postWait         = reportAgain
		wait             = reportAgain
	)
	watch := a.cache.Watch()
	defer watch.Close()
	for {
		attested := a.client.Attested()
		if s := a.cache.Bundle(); s != nil {
			n := s.Own.Sequence()
			if time.Since(posted) >= postWait || attested.After(postedFor) || (n != sequence && postWait != askAgain) {
				err := a.client.PostStatus(ctx, n)
				if err == nil {
					posted, postedFor, sequence, postWait = time.Now(), attested, n, reportAgain
				} else if errors.Is(err, upstream.ErrNoReports) {
					posted, postedFor, postWait = time.Now(), attested, askAgain
				} else if ctx.Err() == nil {
					a.log.Debug("status not posted", "error", err)
				}
			}
			if r := a.newReport(); !reported.IsZero() && time.Since(reported) < wait && (wait == askAgain || reflect.DeepEqual(r, last)) {
				// The server knows, or does not want to.
			} else if err := a.client.Report(ctx, r); errors.Is(err, upstream.ErrNoReports) {
				reported, wait = time.Now(), askAgain
			} else if err == nil {
				reported, last, wait = time.Now(), r, reportAgain
			} else if ctx.Err() == nil {
				a.log.Debug("rotation not reported", "error", err)
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

// newReport says where this node is.
func (a *Agent) newReport() upstream.Report {
	// The snapshot is read first: what the state says is then of this bundle or
	// a later one.
	snapshot := a.cache.Bundle()
	r := upstream.Report{Sequence: snapshot.Own.Sequence(), Rate: float64(a.cfg.TaintRate)}
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
