package federation

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	"github.com/renewd/renewd/bundle"
)

const (
	// minInterval and maxInterval are the limits of what a refresh hint can ask
	// for, and defaultInterval is for bundles without (SPIFFE Federation, section
	// 4.1).
	minInterval, maxInterval = time.Minute, 24 * time.Hour
	defaultInterval          = 5 * time.Minute
	// firstRetry is the pause after a first failure. It doubles up to the
	// interval, and to at most defaultInterval.
	firstRetry = 10 * time.Second
	// staleLimit is how long answers older than the one held are taken for those
	// of a replica that lags behind. Bundles that stay older are of a server whose
	// data was restored.
	staleLimit = 10 * time.Minute
)

// peer is a trust domain that is followed.
type peer struct {
	Endpoint
	client  *http.Client
	publish func(*spiffebundle.Bundle)
	held    atomic.Pointer[held] // nil: nothing yet
	kick    chan struct{}        // the X.509 authorities that verify the endpoint have changed

	// Of New, and then of the goroutine that follows.
	file       string // see Record
	pace       *backoff.ExponentialBackOff
	failing    bool
	unkept     bool // the storage failed
	staleSince time.Time
}

// held is a bundle that is held. It is immutable.
type held struct {
	bundle    *spiffebundle.Bundle
	leftOut   []bundle.LeftOut // what of the answer or the file cannot be used
	fetchedAt time.Time        // zero: from the file
	kept      bool             // in the storage
}

func (f *Follower) newPeer(e Endpoint) *peer {
	p := &peer{Endpoint: e, client: f.newClient(e), kick: make(chan struct{}, 1), pace: backoff.NewExponentialBackOff()}
	p.publish = func(b *spiffebundle.Bundle) { f.cfg.Publish(e.TrustDomain, b) }
	p.pace.InitialInterval, p.pace.Multiplier = firstRetry, 2
	p.pace.Reset()
	return p
}

// hold makes a bundle the one that is held and published.
func (p *peer) hold(h *held) {
	p.held.Store(h)
	if len(h.bundle.X509Authorities()) == 0 {
		p.publish(nil)
		return
	}
	p.publish(h.bundle)
}

// follow refreshes until ctx is done. A kick brings a refresh forward once in
// [minInterval]: two endpoints that are verified with each other's bundles would
// else have each other fetched without end.
func (f *Follower) follow(ctx context.Context, p *peer) {
	timer, unlock := time.NewTimer(0), time.NewTimer(0)
	defer timer.Stop()
	defer unlock.Stop()
	var kick <-chan struct{} // nil: a kick waits
	for {
		select {
		case <-ctx.Done():
			return
		case <-unlock.C:
			kick = p.kick
			continue
		case <-timer.C:
		case <-kick:
			kick = nil
			unlock.Reset(minInterval)
		}
		outcome := f.refresh(ctx, p)
		if ctx.Err() != nil {
			return
		}
		f.cfg.Observe(p.TrustDomain, outcome)
		interval := p.interval()
		if outcome == OutcomeApplied || outcome == OutcomeUnchanged {
			p.pace.Reset()
			timer.Reset(time.Duration(float64(interval) * (0.9 + 0.2*rand.Float64()))) // not in step with others
		} else {
			p.pace.MaxInterval = min(interval, defaultInterval)
			timer.Reset(p.pace.NextBackOff())
		}
	}
}

// interval is how often the bundle that is held wants to be refreshed.
func (p *peer) interval() time.Duration {
	if h := p.held.Load(); h != nil {
		if hint, ok := h.bundle.RefreshHint(); ok && hint > 0 {
			return min(max(hint, minInterval), maxInterval)
		}
	}
	return defaultInterval
}

func (f *Follower) refresh(ctx context.Context, p *peer) (outcome string) {
	b, left, err := p.fetch(ctx)
	if ctx.Err() != nil {
		return OutcomeFailed
	}
	before := p.held.Load()
	if err != nil {
		f.failed(p, before, err)
		if errors.Is(err, errAnswer) {
			return OutcomeRejected
		}
		return OutcomeFailed
	}
	now := f.cfg.Now()
	if p.failing {
		p.failing = false
		f.cfg.Log.Info("federated bundle refresh works again", "trust_domain", p.TrustDomain.Name())
	}
	if f.stale(p, before, b, now) {
		return OutcomeRejected
	}
	f.logLeftOut(p, before, left)
	if before != nil && !before.fetchedAt.IsZero() && b.Equal(before.bundle) {
		p.held.Store(&held{bundle: before.bundle, leftOut: left, fetchedAt: now, kept: before.kept})
		f.keepAgain(ctx, p)
		return OutcomeUnchanged
	}
	f.logChange(p, before, b)
	p.hold(&held{bundle: b, leftOut: left, fetchedAt: now})
	f.keepAgain(ctx, p)
	if before == nil || !sameAuthorities(before.bundle, b) {
		f.kickVerifiedWith(p)
	}
	return OutcomeApplied
}

// kickVerifiedWith has the endpoints fetched that are verified with p's bundle.
func (f *Follower) kickVerifiedWith(p *peer) {
	for _, other := range f.peers {
		if other != p && other.ID.TrustDomain() == p.TrustDomain {
			select {
			case other.kick <- struct{}{}:
			default:
			}
		}
	}
}

// sameAuthorities reports whether two bundles verify the same X.509-SVIDs.
func sameAuthorities(a, b *spiffebundle.Bundle) bool {
	return a.X509Bundle().Equal(b.X509Bundle())
}

// failed logs the first of a row of failures as a warning and the rest as debug
// lines.
func (f *Follower) failed(p *peer, before *held, err error) {
	level := slog.LevelDebug
	if !p.failing {
		p.failing, level = true, slog.LevelWarn
	}
	what := "federated bundle refresh failed, keeping the bundle held"
	if before == nil {
		what = "federated bundle refresh failed, and none is held yet: workloads cannot verify who comes from there"
	}
	f.cfg.Log.Log(context.Background(), level, what, "trust_domain", p.TrustDomain.Name(), "error", err)
}

// stale reports whether an answer is older than what is held and not to be
// followed yet. A bundle from the file is older than any answer.
func (f *Follower) stale(p *peer, before *held, b *spiffebundle.Bundle, now time.Time) bool {
	older := false
	var was, is uint64
	if before != nil && !before.fetchedAt.IsZero() {
		var had, has bool
		was, had = before.bundle.SequenceNumber()
		is, has = b.SequenceNumber()
		older = had && has && is < was
	}
	if !older {
		p.staleSince = time.Time{}
		return false
	}
	args := []any{"trust_domain", p.TrustDomain.Name(), "sequence", is, "held", was}
	if p.staleSince.IsZero() {
		p.staleSince = now
		f.cfg.Log.Warn("bundle endpoint answered with an older bundle, keeping the newer one", args...)
	}
	if now.Sub(p.staleSince) < staleLimit {
		return true
	}
	f.cfg.Log.Warn("bundle endpoint keeps answering with an older bundle, following it", args...)
	p.staleSince = time.Time{}
	return false
}

// about says in a log line which bundle it is about.
func (p *peer) about(b *spiffebundle.Bundle) []any {
	sequence, _ := b.SequenceNumber()
	return []any{"trust_domain", p.TrustDomain.Name(), "sequence", sequence, "x509_authorities", len(b.X509Authorities()), "jwt_authorities", len(b.JWTAuthorities())}
}

func (f *Follower) logChange(p *peer, before *held, b *spiffebundle.Bundle) {
	var old []string
	if before != nil {
		old = names(before.bundle)
	}
	args := append(p.about(b), "added", without(names(b), old), "removed", without(old, names(b)))
	if len(b.X509Authorities()) == 0 {
		f.cfg.Log.Warn("federated bundle has no X.509 authority any more: workloads do not get it, and trust nobody from there", args...)
		return
	}
	f.cfg.Log.Info("federated bundle changed", args...)
}

// logLeftOut says what of a bundle cannot be used, when that has changed.
func (f *Follower) logLeftOut(p *peer, before *held, left []bundle.LeftOut) {
	var was []bundle.LeftOut
	if before != nil {
		was = before.leftOut
	}
	bundle.LogLeftOut(f.cfg.Log, p.TrustDomain, was, left)
}

// keepAgain keeps what is held unless it is kept already. A storage that fails
// does not keep workloads from what is newest.
func (f *Follower) keepAgain(ctx context.Context, p *peer) {
	if p.held.Load().kept {
		return
	}
	err := f.keep(ctx, p)
	switch {
	case err != nil && !p.unkept && ctx.Err() == nil:
		f.cfg.Log.Warn("federated bundle could not be stored: until it is, a restart brings back the one before", "trust_domain", p.TrustDomain.Name(), "error", err)
	case err == nil && p.unkept:
		f.cfg.Log.Info("federated bundle is stored again", "trust_domain", p.TrustDomain.Name())
	}
	p.unkept = err != nil
}

// keep stores what is held.
func (f *Follower) keep(ctx context.Context, p *peer) error {
	h := p.held.Load()
	if f.cfg.Storage != nil {
		data, err := marshal(h.bundle)
		if err != nil {
			return err
		}
		if err := f.cfg.Storage.SaveFederated(ctx, Record{TrustDomain: p.TrustDomain, Bundle: data, FetchedAt: h.fetchedAt, File: p.file}); err != nil {
			return err
		}
	}
	p.held.Store(&held{bundle: h.bundle, leftOut: h.leftOut, fetchedAt: h.fetchedAt, kept: true})
	return nil
}
