package federation

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/loglimit"
)

const (
	// minHint is the least refresh hint that is followed, and asksPerHint how often the
	// endpoint is asked in the time of a hint, so that a failed fetch is not yet a late
	// one. defaultInterval is for bundles without a hint or with a hint of 0 (SPIFFE
	// Federation, section 4.1). A SPIRE server asks at these times, too; after a hint of 0 a
	// fortieth of the life of an X.509 authority later, which is longer.
	minHint, asksPerHint = time.Minute, 4
	defaultInterval      = 5 * time.Minute
	maxInterval          = 24 * time.Hour
	// firstRetry is the pause after a first failure. It doubles up to the interval, but
	// not beyond defaultInterval.
	firstRetry = 10 * time.Second
	// lagLimit is how long older answers are attributed to a lagging replica. If the
	// bundle is older for longer, the data of the server was restored.
	lagLimit = 10 * time.Minute
)

// peer is a trust domain whose endpoint is polled.
type peer struct {
	Endpoint
	client  *http.Client
	publish func(*spiffebundle.Bundle)
	current atomic.Pointer[current] // nil: none yet
	refetch chan struct{}           // the X.509 authorities that verify the endpoint have changed

	file    string           // see Record; constant once it is followed
	initial *bundle.Document // of BundleFile, until [Follower.begin]

	// Owned by the goroutine of follow.
	retry *backoff.ExponentialBackOff
	lines *loglimit.Log // of failures
	doubt bundle.Doubt
}

// current is a bundle that is in use. It is immutable.
type current struct {
	bundle    *spiffebundle.Bundle
	leftOut   []bundle.LeftOut // authorities of the answer or the file that cannot be used
	fetchedAt time.Time        // zero: from the file
	stored    bool
}

func (f *Follower) newPeer(e Endpoint) *peer {
	p := &peer{Endpoint: e, client: f.newClient(e), refetch: make(chan struct{}, 1), retry: backoff.NewExponentialBackOff(),
		lines: loglimit.New(f.cfg.Log, time.Hour, 4)}
	p.publish = func(b *spiffebundle.Bundle) { f.cfg.Publish(e.TrustDomain, b) }
	p.retry.InitialInterval, p.retry.Multiplier = firstRetry, 2
	p.retry.Reset()
	return p
}

// set makes a bundle the current one and publishes it.
func (p *peer) set(c *current) {
	p.current.Store(c)
	if len(c.bundle.X509Authorities()) == 0 {
		p.publish(nil)
		return
	}
	p.publish(c.bundle)
}

// follow refreshes until ctx is done. A signal on refetch causes an early refresh at most
// once in [minHint]: otherwise two endpoints that are verified with each other's
// bundles could trigger each other without end.
func (f *Follower) follow(ctx context.Context, p *peer) {
	timer, unlock := time.NewTimer(0), time.NewTimer(0)
	defer timer.Stop()
	defer unlock.Stop()
	var refetch <-chan struct{} // nil until unlock fires
	for {
		select {
		case <-ctx.Done():
			return
		case <-unlock.C:
			refetch = p.refetch
			continue
		case <-timer.C:
		case <-refetch:
			refetch = nil
			unlock.Reset(minHint)
		}
		outcome := f.refresh(ctx, p)
		if ctx.Err() != nil {
			return
		}
		f.cfg.Observe(p.TrustDomain, outcome)
		interval := p.interval()
		if outcome == bundle.OutcomeApplied || outcome == bundle.OutcomeUnchanged {
			p.retry.Reset()
			timer.Reset(bundle.Jitter(interval))
		} else {
			p.retry.MaxInterval = min(interval, defaultInterval)
			timer.Reset(p.retry.NextBackOff())
		}
	}
}

// interval returns the refresh interval of the current bundle.
func (p *peer) interval() time.Duration {
	if c := p.current.Load(); c != nil {
		if hint, ok := c.bundle.RefreshHint(); ok && hint > 0 {
			return min(max(hint, minHint)/asksPerHint, maxInterval)
		}
	}
	return defaultInterval
}

func (f *Follower) refresh(ctx context.Context, p *peer) (outcome string) {
	b, left, err := p.fetch(ctx)
	if ctx.Err() != nil {
		return bundle.OutcomeFailed
	}
	before := p.current.Load()
	if err != nil {
		f.logFailure(p, before, err)
		if errors.Is(err, errAnswer) {
			return bundle.OutcomeRejected
		}
		return bundle.OutcomeFailed
	}
	now := f.cfg.Now()
	p.lines.Over("refresh", "federated bundle refresh recovered", "trust_domain", p.TrustDomain.Name())
	if f.lags(p, before, b) {
		return bundle.OutcomeRejected
	}
	f.logLeftOut(p, before, left)
	if before != nil && !before.fetchedAt.IsZero() && b.Equal(before.bundle) {
		p.current.Store(&current{bundle: before.bundle, leftOut: left, fetchedAt: now, stored: before.stored})
		f.saveIfNeeded(ctx, p)
		return bundle.OutcomeUnchanged
	}
	f.logChange(p, before, b)
	p.set(&current{bundle: b, leftOut: left, fetchedAt: now})
	f.saveIfNeeded(ctx, p)
	if before == nil || !sameAuthorities(before.bundle, b) {
		f.refetchVerifiedWith(p)
	}
	return bundle.OutcomeApplied
}

// refetchVerifiedWith triggers a fetch from the endpoints that p's bundle verifies.
func (f *Follower) refetchVerifiedWith(p *peer) {
	for _, other := range *f.peers.Load() {
		if other != p && other.ID.TrustDomain() == p.TrustDomain {
			select {
			case other.refetch <- struct{}{}:
			default:
			}
		}
	}
}

// sameAuthorities reports whether two bundles verify the same X.509-SVIDs.
func sameAuthorities(a, b *spiffebundle.Bundle) bool {
	return a.X509Bundle().Equal(b.X509Bundle())
}

func (f *Follower) logFailure(p *peer, before *current, err error) {
	msg := "federated bundle refresh failed, keeping the current bundle"
	if before == nil {
		msg = "federated bundle refresh failed, there is none yet: workloads cannot verify peers of this trust domain"
	}
	p.lines.Note(slog.LevelWarn, msg, "refresh", "trust_domain", p.TrustDomain.Name(), "error", err)
}

// lags reports whether an answer is older than the current bundle and must not replace
// it yet. A bundle from the file is older than any answer.
func (f *Follower) lags(p *peer, before *current, b *spiffebundle.Bundle) bool {
	older := false
	var sequence, held uint64
	if before != nil && !before.fetchedAt.IsZero() {
		var hadNumber, hasNumber bool
		held, hadNumber = before.bundle.SequenceNumber()
		sequence, hasNumber = b.SequenceNumber()
		older = hadNumber && hasNumber && sequence < held
	}
	if !older {
		p.doubt.Clear()
		return false
	}
	args := []any{"trust_domain", p.TrustDomain.Name(), "sequence", sequence, "held", held}
	first, counts := p.doubt.Again(defaultInterval, lagLimit)
	switch {
	case first:
		f.cfg.Log.Warn("older federated bundle rejected, keeping the newer one", args...)
	case counts:
		f.cfg.Log.Warn("older federated bundle accepted, the endpoint keeps returning it", args...)
	}
	return !counts
}

// attrs returns the attributes of a log line about a bundle.
func (p *peer) attrs(b *spiffebundle.Bundle) []any {
	sequence, _ := b.SequenceNumber()
	return []any{"trust_domain", p.TrustDomain.Name(), "sequence", sequence, "x509_authorities", len(b.X509Authorities()), "jwt_authorities", len(b.JWTAuthorities())}
}

func (f *Follower) logChange(p *peer, before *current, b *spiffebundle.Bundle) {
	var old []string
	if before != nil {
		old = names(before.bundle)
	}
	args := append(p.attrs(b), "added", without(names(b), old), "removed", without(old, names(b)))
	if len(b.X509Authorities()) == 0 {
		f.cfg.Log.Warn("federated bundle has no X.509 authority left: workloads do not get it and do not trust its trust domain", args...)
		return
	}
	f.cfg.Log.Info("federated bundle changed", args...)
}

// logLeftOut logs the authorities of a bundle that cannot be used, if they have changed.
func (f *Follower) logLeftOut(p *peer, before *current, left []bundle.LeftOut) {
	var was []bundle.LeftOut
	if before != nil {
		was = before.leftOut
	}
	bundle.LogLeftOut(f.cfg.Log, p.TrustDomain, was, left)
}

// saveIfNeeded stores the current bundle if it is not stored. If the storage fails,
// workloads still get the bundle.
func (f *Follower) saveIfNeeded(ctx context.Context, p *peer) {
	if p.current.Load().stored {
		return
	}
	if err := f.save(ctx, p); err == nil {
		p.lines.Over("storage", "federated bundle storage recovered", "trust_domain", p.TrustDomain.Name())
	} else if ctx.Err() == nil {
		p.lines.Note(slog.LevelWarn, "federated bundle not stored, a restart would restore the previous one", "storage",
			"trust_domain", p.TrustDomain.Name(), "error", err)
	}
}

// save stores the current bundle.
func (f *Follower) save(ctx context.Context, p *peer) error {
	c := p.current.Load()
	data, err := marshal(c.bundle)
	if err != nil {
		return err
	}
	if err := f.cfg.Storage.SaveFederated(ctx, Record{TrustDomain: p.TrustDomain, Bundle: data, FetchedAt: c.fetchedAt, File: p.file}); err != nil {
		return err
	}
	p.current.Store(&current{bundle: c.bundle, leftOut: c.leftOut, fetchedAt: c.fetchedAt, stored: true})
	return nil
}
