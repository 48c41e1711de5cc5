package renew

import (
	"context"
	"log/slog"
	"time"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/renew/wave"
)

// DefaultBatchSize is also the limit of a SPIRE server.
const DefaultBatchSize = 500

const (
	// maxSingles bounds the renewals of the wave in flight where their rate is
	// higher: each holds one of Rate places until it is answered.
	maxSingles = 64
	// maxBatches bounds the other calls in flight.
	maxBatches = 8
	// maxSleep bounds every sleep, so that a clock that was stepped or a
	// machine that was suspended is noticed.
	maxSleep = time.Minute
	// gateLimit bounds the pause while the server as a whole is unreachable.
	// It equals the refresh interval: an outage makes no more calls than the
	// quiet before it, and a server that returns is found within seconds.
	gateLimit = 5 * time.Second
	// retryBase and retryLimit bound the pauses of one SVID that fails or
	// comes back still signed by a tainted authority.
	retryBase  = 2 * time.Second
	retryLimit = time.Minute
	// swapMargin is how long before its end by the server's clock an SVID gives
	// way to one that is not valid yet by this node's: more than servers date
	// SVIDs back, by which the lag is underestimated.
	swapMargin = time.Minute
)

// Outcome is how a renewal ended.
type Outcome string

// The outcomes.
const (
	OutcomeRenewed Outcome = "renewed"
	// OutcomeTainted is a renewal that came back signed by an authority that
	// is tainted: the server lags.
	OutcomeTainted Outcome = "still_tainted"
	// OutcomeRejected is an answer that failed verification.
	OutcomeRejected Outcome = "rejected"
	// OutcomeFailed is no answer, or an error in its place.
	OutcomeFailed Outcome = "failed"
	// OutcomeMissing is an error for an entry that the server's answers do not
	// name at present; that it does not mint for it is no fault.
	OutcomeMissing Outcome = "missing"
	// OutcomeDropped is an SVID whose entry changed while it was minted.
	OutcomeDropped Outcome = "dropped"
)

// Outcomes lists every Outcome.
var Outcomes = []Outcome{OutcomeRenewed, OutcomeTainted, OutcomeRejected, OutcomeFailed, OutcomeMissing, OutcomeDropped}

// Observer is told what happens, for metrics. Its methods must be quick.
type Observer interface {
	// Minted is called for each SVID asked for, with the error of the call or
	// of the item (nil for success) and the time from key generation to the
	// verified answer.
	Minted(err error, took time.Duration)
	// Renewed is called for each SVID with what came of it.
	Renewed(Reason, Outcome)
}

// Own is the node's own X.509-SVID, without which nothing can be minted.
type Own interface {
	// Held describes the SVID held: Authority, NotAfter and RenewAt are used.
	// Nil means that there is none, which is not renewal's to mend.
	Held() *cache.SVID
	// Renew replaces it and returns when new calls use the new one.
	Renew(ctx context.Context) error
}

// Config is what a [Renewer] needs. Cache and Minter are required.
type Config struct {
	Cache  *cache.Cache
	Minter Minter
	// Own is the node's own SVID; nil when there is none to care for.
	Own Own
	// Seed makes this node's taint delays; see [wave.Delay].
	Seed [32]byte
	// MaxDelay bounds the delay: it is uniform in [0, MaxDelay). Zero means
	// no delay.
	MaxDelay time.Duration
	// Rate is the most SVIDs that the server is asked for in any one second
	// because of a taint, by the server's clock; see [wave.Pace]. Zero means
	// [wave.DefaultRate].
	Rate int
	// BatchSize is the most SVIDs asked for in one call, where the rate does
	// not matter. Zero means DefaultBatchSize.
	BatchSize int
	// KeyType of the workloads' keys; empty means ECP256.
	KeyType KeyType
	// Unexplained, when set, is called when an SVID was signed by an authority
	// that the bundle does not have, to have the bundle refreshed.
	Unexplained func()
	Observer    Observer
	Log         *slog.Logger
	// Now is the wall clock that deadlines are compared with; nil means
	// time.Now.
	Now func() time.Time
}

func (cfg Config) withDefaults() Config {
	if cfg.Cache == nil || cfg.Minter == nil {
		panic("renew: Config needs Cache and Minter")
	}
	if cfg.Rate <= 0 {
		cfg.Rate = wave.DefaultRate
	}
	if cfg.BatchSize <= 0 {
		cfg.BatchSize = DefaultBatchSize
	}
	if cfg.KeyType == "" {
		cfg.KeyType = ECP256
	}
	if cfg.Unexplained == nil {
		cfg.Unexplained = func() {}
	}
	if cfg.Observer == nil {
		cfg.Observer = discard{}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return cfg
}

type discard struct{}

func (discard) Minted(error, time.Duration) {}
func (discard) Renewed(Reason, Outcome)     {}
