package bundle

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Fetcher asks the server for trust bundles. Implementations return within a
// deadline of their own, and soon when ctx ends, and never return a nil Bundle
// without an error. They are safe for concurrent use.
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
	// kickInterval is the least time from a refresh that [Refresher.Refresh] asked
	// for to the next such one. The first explains what there is to explain. If it
	// does not, because a replica lags or somebody unknown signs, asking more often
	// than the polls do only adds load.
	kickInterval = DefaultInterval
	// staleLimit is how long answers that take something back, because they are
	// older than what is held, are taken for those of a lagging replica. What
	// stays older is a restored data store.
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
	// own one. It is called often. Nil means none.
	Federated func() []spiffeid.TrustDomain
	// Initial is the bundle to start from: the one kept over a restart, with
	// its TaintedSince times, or the one trust was bootstrapped from.
	// It is published as soon as Run starts, unless it is nil.
	Initial *Bundle
	// InitialFederated are the federated bundles kept over a restart. They are
	// published with the first own bundle.
	InitialFederated map[spiffeid.TrustDomain]*Bundle
	// Interval is the time between two refreshes of the own bundle and of each
	// federated one, before [Jitter], which is drawn anew each time. Zero means
	// DefaultInterval.
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
//
// Each bundle is asked for on a goroutine that Run waits for, so that no answer
// that is late delays another one. The answers come back to Run, which alone
// decides and publishes.
type Refresher struct {
	cfg  RefresherConfig
	kick chan struct{}

	// Owned by Run.
	snap      *Snapshot
	doubt     doubt
	failing   bool
	federated map[spiffeid.TrustDomain]*following
	answers   chan federatedAnswer
	busy      [2]int // requests for federated bundles under way, by lane
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
		cfg:       cfg,
		kick:      make(chan struct{}, 1),
		federated: make(map[spiffeid.TrustDomain]*following),
		answers:   make(chan federatedAnswer, lanes[prompt].limit+lanes[slow].limit),
	}
}

// Refresh asks Run to refresh the own bundle now instead of at the next interval,
// for when something was seen that only a newer bundle explains, and to ask for
// federated bundles that have come to be wanted. It does not wait. Called again and
// again, it has the own bundle refreshed at once and then every 5 s.
func (r *Refresher) Refresh() {
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

// Run refreshes until ctx is done and then returns nil. Nothing that a server
// answers ends it.
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
	asking, kicked := false, false // kicked: no request has begun since Refresh was called
	due := time.Now()
	var answering time.Time // when the last request began that Refresh had asked for
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

// Jitter draws the pause before the next poll: interval ±10 %, so that a fleet
// does not ask in step.
func Jitter(interval time.Duration) time.Duration {
	return time.Duration(float64(interval) * (0.9 + 0.2*rand.Float64()))
}

// refresh draws the conclusions of one answer to the own bundle.
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
	case r.stale(held, own):
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
func (r *Refresher) stale(held, got *Bundle) bool {
	if !older(held, got) {
		r.doubt = doubt{}
		return false
	}
	return r.withheld(&r.doubt, "server answered with an older bundle",
		"sequence", got.Sequence(), "held", held.Sequence())
}

// older reports whether got says that it is older than held.
func older(held, got *Bundle) bool {
	return held != nil && got.Sequence() != 0 && got.Sequence() < held.Sequence()
}

// doubt is about answers in a row that take something back. Zero means that
// the last answer did not.
type doubt struct {
	last  time.Time
	stood time.Duration // how long they have come for
}

// withheld notes one such answer and reports whether it is not to be followed
// yet, with one line of the log when that begins and one when it ends. Only time
// with answers counts: two of them with an outage in between prove nothing.
func (r *Refresher) withheld(d *doubt, what string, args ...any) bool {
	now := time.Now()
	if d.last.IsZero() {
		r.cfg.Log.Warn(what+", keeping the bundle held", args...)
	} else {
		d.stood += min(now.Sub(d.last), 2*r.cfg.Interval)
	}
	d.last = now
	if d.stood < staleLimit {
		return true
	}
	r.cfg.Log.Warn(what+" for a minute, following it", args...)
	*d = doubt{}
	return false
}

// log says what changed in the own bundle, one line each.
func (r *Refresher) log(held, own *Bundle) {
	changes := Diff(held, own)
	r.cfg.Log.Info("bundle refreshed", "sequence", own.Sequence(),
		"x509_authorities", len(own.X509()), "jwt_authorities", len(own.JWT()), "changes", len(changes))
	for _, c := range changes {
		if held == nil && c.Kind == KindAdded {
			continue // everything is new at the first refresh
		}
		r.cfg.Log.Info(fmt.Sprintf("%s authority %s", c.Type, c.Kind), "authority", c.ID, "sequence", own.Sequence())
	}
	r.logLeftOut(held, own)
}

// logLeftOut says what of a bundle cannot be used, when that has changed.
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
