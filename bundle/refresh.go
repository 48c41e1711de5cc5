package bundle

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Fetcher asks the server for trust bundles. Implementations return within a
// deadline of their own and never return a nil Bundle without an error.
type Fetcher interface {
	// FetchBundle returns the node's own trust bundle.
	FetchBundle(ctx context.Context) (*Bundle, error)
	// FetchFederatedBundle returns another trust domain's bundle, or
	// [ErrNotFound] when the server has none.
	FetchFederatedBundle(ctx context.Context, td spiffeid.TrustDomain) (*Bundle, error)
}

// The outcomes of a refresh that a [RefresherConfig.Observe] is told.
const (
	OutcomeApplied   = "applied"
	OutcomeUnchanged = "unchanged"
	OutcomeFailed    = "failed"
	OutcomeRejected  = "rejected"
)

const (
	// DefaultInterval is how often the server is asked for the bundle.
	DefaultInterval = 5 * time.Second
	// federatedInterval is how often it is asked for each federated one. The
	// server itself follows the other trust domain's refresh hint, which is
	// minutes, so asking more often would only bring the same answer.
	federatedInterval = time.Minute
	// staleLimit is how long answers older than the one held are taken for a
	// lagging replica. An older bundle that stays is a restored data store.
	staleLimit = time.Minute
)

// RefresherConfig is what a [Refresher] needs. Fetcher and Publish are
// required.
type RefresherConfig struct {
	Fetcher Fetcher
	// Publish is called from Run with each new snapshot, never concurrently
	// and never with an equal one twice. The Refresher waits for it.
	Publish func(*Snapshot)
	// Federated tells the trust domains whose bundles are wanted besides the
	// own one. It is asked at each refresh. Nil means none.
	Federated func() []spiffeid.TrustDomain
	// Initial is the bundle to start from: the one kept over a restart, with
	// its TaintedSince times, or the one trust was bootstrapped from.
	// It is published as soon as Run starts, unless it is nil.
	Initial *Bundle
	// InitialFederated are the federated bundles that were kept with Initial.
	InitialFederated map[spiffeid.TrustDomain]*Bundle
	// Interval is the time between two refreshes, before [Jitter], which is
	// drawn anew each time. Zero means DefaultInterval.
	Interval time.Duration
	// Observe, when set, is told the outcome of each refresh of the own
	// bundle and the bundle then in force (nil when there is none yet).
	Observe func(outcome string, b *Bundle)
	Log     *slog.Logger
	// Now is the wall clock; nil means time.Now.
	Now func() time.Time
}

// Refresher keeps the node's trust bundles current. Run does the work and
// owns all of its state; Refresh may be called from any goroutine.
type Refresher struct {
	cfg  RefresherConfig
	kick chan struct{}

	// Owned by Run.
	snap         *Snapshot
	federatedDue map[spiffeid.TrustDomain]time.Time
	staleSince   time.Time
	failing      bool
}

// NewRefresher returns a Refresher that does nothing until Run is called. It
// panics when a required field is missing: that is a mistake in the program.
func NewRefresher(cfg RefresherConfig) *Refresher {
	if cfg.Fetcher == nil || cfg.Publish == nil {
		panic("bundle: RefresherConfig needs Fetcher and Publish")
	}
	if cfg.Interval <= 0 {
		cfg.Interval = DefaultInterval
	}
	if cfg.Federated == nil {
		cfg.Federated = func() []spiffeid.TrustDomain { return nil }
	}
	if cfg.Observe == nil {
		cfg.Observe = func(string, *Bundle) {}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Refresher{
		cfg:          cfg,
		kick:         make(chan struct{}, 1),
		federatedDue: make(map[spiffeid.TrustDomain]time.Time),
	}
}

// Refresh asks Run to refresh now instead of at the next interval, for when
// something was seen that only a newer bundle explains. It does not wait.
func (r *Refresher) Refresh() {
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

// Run refreshes until ctx is done and then returns nil. Nothing that a server
// answers ends it.
func (r *Refresher) Run(ctx context.Context) error {
	if r.cfg.Initial != nil {
		r.publish(&Snapshot{Own: r.cfg.Initial.since(r.cfg.Initial, r.cfg.Now()), Federated: r.cfg.InitialFederated})
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-r.kick:
		}
		r.refresh(ctx)
		timer.Reset(Jitter(r.cfg.Interval))
	}
}

// Jitter draws the pause before the next poll: interval ±10 %, so that a fleet
// does not ask in step.
func Jitter(interval time.Duration) time.Duration {
	return time.Duration(float64(interval) * (0.9 + 0.2*rand.Float64()))
}

func (r *Refresher) refresh(ctx context.Context) {
	own, err := r.cfg.Fetcher.FetchBundle(ctx)
	if ctx.Err() != nil {
		return
	}
	now := r.cfg.Now()
	var last Snapshot
	if r.snap != nil {
		last = *r.snap
	}
	held := last.Own
	outcome := OutcomeUnchanged
	switch {
	case err != nil:
		outcome = OutcomeFailed
		r.failed(err)
		own = held
	case r.stale(held, own, now):
		outcome = OutcomeRejected
		own = held
	case !own.Equal(held):
		outcome = OutcomeApplied
		own = own.since(held, now)
	default:
		own = held
	}
	if err == nil && r.failing {
		r.failing = false
		r.cfg.Log.Info("bundle refresh works again")
	}
	if own == nil {
		r.cfg.Observe(outcome, nil)
		return
	}
	// Not with the federated ones, which may take their time.
	if outcome == OutcomeApplied {
		r.log(held, own)
		r.publish(&Snapshot{Own: own, Federated: last.Federated, Absent: last.Absent})
	}
	if err == nil {
		r.federated(ctx)
	}
	r.cfg.Observe(outcome, own)
}

// failed logs the first of a row of failures as a warning and the rest as
// debug lines: one line for each thing a person cares about.
func (r *Refresher) failed(err error) {
	level := slog.LevelDebug
	if !r.failing {
		r.failing, level = true, slog.LevelWarn
	}
	r.cfg.Log.Log(context.Background(), level, "bundle refresh failed, keeping the bundle held", "error", err)
}

// stale reports whether got is an older bundle than held. A replica that reads
// from a lagging database answers with one, and to follow it would take back a
// taint or, worse, make everything signed by the newest authority look
// removed. After staleLimit without a newer answer the older one is real.
func (r *Refresher) stale(held, got *Bundle, now time.Time) bool {
	if held == nil || got.Sequence() == 0 || got.Sequence() >= held.Sequence() {
		r.staleSince = time.Time{}
		return false
	}
	if r.staleSince.IsZero() {
		r.staleSince = now
		r.cfg.Log.Warn("server answered with an older bundle, keeping the newer one",
			"sequence", got.Sequence(), "held", held.Sequence())
	}
	if now.Sub(r.staleSince) < staleLimit {
		return true
	}
	r.cfg.Log.Warn("server keeps answering with an older bundle, following it",
		"sequence", got.Sequence(), "held", held.Sequence())
	r.staleSince = time.Time{}
	return false
}

// federated brings the federated bundles up to date: those newly wanted at
// once, the others each federatedInterval.
func (r *Refresher) federated(ctx context.Context) {
	old := r.snap.Federated
	wanted := slices.Clone(r.cfg.Federated())
	// In no order, as those that come last may have to wait for the next time.
	rand.Shuffle(len(wanted), func(i, j int) { wanted[i], wanted[j] = wanted[j], wanted[i] })
	next := make(map[spiffeid.TrustDomain]*Bundle, len(wanted))
	absent := make(map[spiffeid.TrustDomain]bool)
	began := time.Now()
	for _, td := range wanted {
		if b := old[td]; b != nil {
			next[td] = b
		} else if r.snap.Absent[td] {
			absent[td] = true
		}
		now := r.cfg.Now()
		if due, known := r.federatedDue[td]; known && now.Before(due) {
			continue
		}
		if time.Since(began) > r.cfg.Interval {
			continue // the own bundle is to be asked for
		}
		asked := time.Now()
		b, err := r.cfg.Fetcher.FetchFederatedBundle(ctx, td)
		pause := federatedInterval
		switch {
		case errors.Is(err, ErrNotFound):
			delete(next, td)
			absent[td] = true
		case err != nil:
			r.cfg.Log.Debug("federated bundle refresh failed, keeping the bundle held", "trust_domain", td.Name(), "error", err)
			if next[td] == nil && !absent[td] {
				pause = max(r.cfg.Interval, time.Since(asked))
			}
		case !b.Equal(old[td]):
			next[td] = b.since(old[td], now)
			delete(absent, td)
		}
		r.federatedDue[td] = r.cfg.Now().Add(pause)
	}
	if ctx.Err() != nil {
		return
	}
	maps.DeleteFunc(r.federatedDue, func(td spiffeid.TrustDomain, _ time.Time) bool {
		return !slices.Contains(wanted, td)
	})
	changed := !maps.Equal(absent, r.snap.Absent)
	for td, b := range next {
		if old[td] != b {
			changed = true
			r.cfg.Log.Info("federated bundle refreshed", "trust_domain", td.Name(), "sequence", b.Sequence())
		}
	}
	for td := range old {
		if next[td] == nil {
			changed = true
			r.cfg.Log.Info("federated bundle dropped", "trust_domain", td.Name())
		}
	}
	if changed {
		r.publish(&Snapshot{Own: r.snap.Own, Federated: next, Absent: absent})
	}
}

// log says what changed in the own bundle, one line each.
func (r *Refresher) log(held, own *Bundle) {
	if own == held {
		return
	}
	changes := Diff(held, own)
	r.cfg.Log.Info("bundle refreshed", "sequence", own.Sequence(),
		"x509_authorities", len(own.X509()), "jwt_authorities", len(own.JWT()), "changes", len(changes))
	for _, c := range changes {
		if held == nil && c.Kind == KindAdded {
			continue // everything is new at the first refresh
		}
		r.cfg.Log.Info(fmt.Sprintf("%s authority %s", c.Type, c.Kind), "authority", c.ID, "sequence", own.Sequence())
	}
}

func (r *Refresher) publish(s *Snapshot) {
	r.snap = s
	r.cfg.Publish(s)
}
