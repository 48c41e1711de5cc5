package bundle

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Fetcher requests trust bundles from the server. Implementations return within a
// deadline of their own, and soon after ctx ends. They never return a nil Bundle without
// an error, and are safe for concurrent use.
type Fetcher interface {
	// FetchBundle returns the node's own trust bundle.
	FetchBundle(ctx context.Context) (*Bundle, error)
	// FetchFederatedBundle returns another trust domain's bundle, or [ErrNotFound] if
	// the server has none.
	FetchFederatedBundle(ctx context.Context, td spiffeid.TrustDomain) (*Bundle, error)
}

// The outcomes of a refresh that [RefresherConfig.Observe] receives.
const (
	OutcomeApplied   = "applied"
	OutcomeUnchanged = "unchanged"
	OutcomeFailed    = "failed"
	OutcomeRejected  = "rejected"
)

const (
	// DefaultInterval is the default polling interval.
	DefaultInterval = 5 * time.Second
	// kickInterval is the minimum time between two refreshes by [Refresher.Refresh].
	// If a new bundle does not have the authority that was missing, because a replica
	// lags or the authority is not the server's, more requests than the polls only add
	// load.
	kickInterval = DefaultInterval
	// lagLimit is how long older answers are attributed to a lagging replica. After
	// that they are attributed to a restored data store.
	lagLimit = time.Minute
)

// RefresherConfig is what a [Refresher] needs. Fetcher and Publish are
// required.
type RefresherConfig struct {
	Fetcher Fetcher
	// Publish receives each new snapshot from Run, never concurrently and never an
	// equal one twice. Run waits for it.
	Publish func(*Snapshot)
	// Federated returns the trust domains whose bundles are wanted besides the own
	// one. It is called often. Nil means none.
	Federated func() []spiffeid.TrustDomain
	// Initial is the bundle to start with: the one kept over a restart, with its
	// TaintedSince times, or the bootstrap bundle. Run publishes it first, unless it
	// is nil.
	Initial *Bundle
	// InitialFederated are the federated bundles kept over a restart. They are
	// published with the first own bundle.
	InitialFederated map[spiffeid.TrustDomain]*Bundle
	// Interval is the time between two refreshes of the own bundle and of each
	// federated one, before [Jitter]. Zero means DefaultInterval.
	Interval time.Duration
	// Observe, if set, receives the outcome of each refresh of the own bundle and the
	// current bundle, nil if there is none yet.
	Observe func(outcome string, b *Bundle)
	Log     *slog.Logger
	// Now is the wall clock; nil means time.Now.
	Now func() time.Time
}

// Refresher keeps the node's trust bundles current. Run does the work and owns all of its
// state; Refresh is safe for concurrent use.
//
// Each request has a goroutine that Run waits for, so that no late answer delays another
// one. The answers go to Run, which alone decides and publishes.
type Refresher struct {
	cfg  RefresherConfig
	kick chan struct{}

	// Owned by Run.
	snap      *Snapshot
	doubt     Doubt
	failing   bool
	federated map[spiffeid.TrustDomain]*following
	answers   chan federatedAnswer
	busy      [2]int // requests for federated bundles in flight, by lane
}

// NewRefresher returns a Refresher that does nothing until Run is called. It panics if a
// required field is missing, which is a bug in the program.
func NewRefresher(cfg RefresherConfig) *Refresher {
	if cfg.Fetcher == nil || cfg.Publish == nil {
		panic("bundle: RefresherConfig needs Fetcher and Publish")
	}
	cfg.Interval = cmp.Or(cfg.Interval, DefaultInterval)
	if cfg.Federated == nil {
		cfg.Federated = func() []spiffeid.TrustDomain { return nil }
	}
	if cfg.Observe == nil {
		cfg.Observe = func(string, *Bundle) {}
	}
	cfg.Log = cmp.Or(cfg.Log, slog.New(slog.DiscardHandler))
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Refresher{
		cfg:       cfg,
		kick:      make(chan struct{}, 1),
		federated: make(map[spiffeid.TrustDomain]*following),
		answers:   make(chan federatedAnswer, lanes[prompt].limit+lanes[slow].limit),
	}
}

// Refresh makes Run refresh the own bundle now instead of at the next interval, and
// request federated bundles that are newly wanted. Call it when an authority is missing
// from the bundle. It does not wait. However often it is called, the own bundle is
// refreshed at once and then at most every 5 s.
func (r *Refresher) Refresh() {
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

// Run refreshes until ctx is done and then returns nil. No answer of a server ends it.
func (r *Refresher) Run(ctx context.Context) error {
	var work sync.WaitGroup
	defer work.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if r.cfg.Initial != nil {
		r.publish(&Snapshot{Own: r.cfg.Initial.since(r.cfg.Initial, r.cfg.Now()), Federated: r.cfg.InitialFederated})
	}
	type answer struct {
		bundle *Bundle
		err    error
	}
	own := make(chan answer, 1)
	asking, kicked := false, false // kicked: Refresh was called, and no request has begun since
	due := time.Now()
	var answering time.Time // when the last request by Refresh began
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		ask := due
		if kick := answering.Add(kickInterval); kicked && kick.Before(due) {
			ask = kick
		}
		if now := time.Now(); !asking && !now.Before(ask) {
			if kicked {
				kicked, answering = false, now
			}
			asking = true
			work.Go(func() {
				b, err := r.cfg.Fetcher.FetchBundle(ctx)
				own <- answer{b, err}
			})
		}
		next := r.askFederated(ctx, &work)
		if !asking && (next.IsZero() || ask.Before(next)) {
			next = ask
		}
		if next.IsZero() {
			timer.Stop()
		} else {
			timer.Reset(time.Until(next))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-r.kick:
			kicked = true
		case a := <-own:
			if ctx.Err() != nil {
				return nil
			}
			r.refresh(a.bundle, a.err)
			asking = false
			due = time.Now().Add(Jitter(r.cfg.Interval))
		case a := <-r.answers:
			r.refreshFederated(a)
		}
	}
}

// Jitter returns the pause before the next poll: interval ±10 %, so that the nodes of a
// fleet do not poll at the same time.
func Jitter(interval time.Duration) time.Duration {
	return time.Duration(float64(interval) * (0.9 + 0.2*rand.Float64()))
}

// refresh applies one answer for the own bundle.
func (r *Refresher) refresh(own *Bundle, err error) {
	now := r.cfg.Now()
	last := Snapshot{Federated: r.cfg.InitialFederated}
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
	case r.lags(held, own):
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
		r.cfg.Log.Info("bundle refresh recovered")
	}
	if outcome == OutcomeApplied {
		r.log(held, own)
		r.publish(&Snapshot{Own: own, Federated: last.Federated, NotFound: last.NotFound})
	}
	r.cfg.Observe(outcome, own)
}

// failed logs the first of consecutive failures as a warning and the others at debug
// level.
func (r *Refresher) failed(err error) {
	level := slog.LevelDebug
	if !r.failing {
		r.failing, level = true, slog.LevelWarn
	}
	r.cfg.Log.Log(context.Background(), level, "bundle refresh failed, current one kept", "error", err)
}

// lags reports whether got is older than held and is not to be applied. It may be the
// answer of a replica that reads from a lagging database. Applying it would withdraw a
// taint mark or, worse, remove the newest authority. After lagLimit without a newer
// answer the older one is applied.
func (r *Refresher) lags(held, got *Bundle) bool {
	if !older(held, got) {
		r.doubt.Clear()
		return false
	}
	return r.withheld(&r.doubt, "older bundle received",
		"sequence", got.Sequence(), "current", held.Sequence())
}

// older reports whether got has a lower sequence number than held.
func older(held, got *Bundle) bool {
	return held != nil && got.Sequence() != 0 && got.Sequence() < held.Sequence()
}

// withheld counts such an answer and reports whether it is not to be applied yet. It logs
// the first one, and the one that is applied.
func (r *Refresher) withheld(d *Doubt, what string, args ...any) bool {
	first, counts := d.Again(2*r.cfg.Interval, lagLimit)
	switch {
	case first:
		r.cfg.Log.Warn(what+", current one kept", args...)
	case counts:
		r.cfg.Log.Warn(what+" for a minute, applied", args...)
	}
	return !counts
}

// log logs each change of the own bundle.
func (r *Refresher) log(held, own *Bundle) {
	changes := Diff(held, own)
	r.cfg.Log.Info("bundle refreshed", "sequence", own.Sequence(),
		"x509_authorities", len(own.X509()), "jwt_authorities", len(own.JWT()), "changes", len(changes))
	for _, c := range changes {
		if held == nil && c.Kind == KindAdded {
			continue // everything is new at the first refresh
		}
		r.cfg.Log.Info(fmt.Sprintf("%s authority %s", c.Type, c.Kind), "authority_id", c.ID, "sequence", own.Sequence())
	}
	r.logLeftOut(held, own)
}

// logLeftOut logs the unusable authorities of a bundle if they have changed.
func (r *Refresher) logLeftOut(held, got *Bundle) {
	var before []LeftOut
	if held != nil {
		before = held.LeftOut()
	}
	LogLeftOut(r.cfg.Log, got.TrustDomain(), before, got.LeftOut())
}

func (r *Refresher) publish(s *Snapshot) {
	r.snap = s
	r.cfg.Publish(s)
}
