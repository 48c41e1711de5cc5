package renew

import (
	"cmp"
	"context"
	"log/slog"
	"time"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/renew/wave"
)

// DefaultBatchSize is also the limit of a SPIRE server.
const DefaultBatchSize = 500

const (
	// maxSingles bounds the wave's calls in flight if Rate, which bounds them too,
	// is higher.
	maxSingles = 64
	// maxBatches bounds the other calls in flight.
	maxBatches = 8
	// maxSleep bounds every sleep, so that the loop notices a clock step and a
	// suspended machine.
	maxSleep = time.Minute
	// gateLimit bounds the pause between probes while the server is unreachable.
	// It equals the refresh interval: an outage causes no more calls than normal
	// polling, and a recovered server is found within seconds.
	gateLimit = 5 * time.Second
	// retryBase and retryLimit bound the pauses of one SVID whose renewal fails or
	// is signed by a tainted authority again.
	retryBase  = 2 * time.Second
	retryLimit = time.Minute
	// swapMargin is how long before its expiry by the server's clock an SVID is
	// replaced by one that is not yet valid by this node's clock. Servers backdate
	// SVIDs by seconds and the measured lag is too small by that much.
	swapMargin = time.Minute
)

// Outcome is how a renewal ended.
type Outcome string

// The outcomes.
const (
	OutcomeRenewed Outcome = "renewed"
	// OutcomeTainted is an answer signed by a tainted authority: the server lags.
	OutcomeTainted Outcome = "still_tainted"
	// OutcomeRejected is an answer that failed verification.
	OutcomeRejected Outcome = "rejected"
	// OutcomeFailed is an error, or no answer.
	OutcomeFailed Outcome = "failed"
	// OutcomeMissing is an error for an entry that the server does not list at
	// present. It is expected, and not counted as a failed mint.
	OutcomeMissing Outcome = "missing"
	// OutcomeDropped is an SVID whose entry changed during the mint.
	OutcomeDropped Outcome = "dropped"
)

// Outcomes lists every Outcome.
var Outcomes = []Outcome{OutcomeRenewed, OutcomeTainted, OutcomeRejected, OutcomeFailed, OutcomeMissing, OutcomeDropped}

// Observer counts mints and renewals. Run calls its methods, which must not block.
type Observer interface {
	// Minted counts one requested SVID, with the error of the call or of the item
	// (nil for success) and the time from key generation to the verified answer.
	Minted(err error, took time.Duration)
	// Renewed counts one renewal by its reason and outcome.
	Renewed(Reason, Outcome)
}

// AgentSVID is the agent SVID, which authenticates every mint.
type AgentSVID interface {
	// Held returns the current one, of which Authority, NotAfter and RenewAt are
	// used. Nil means that the agent has to attest first.
	Held() *cache.SVID
	// Renew replaces it and returns when new calls use the new one.
	Renew(ctx context.Context) error
}

// Config is what a [Renewer] needs. Cache and Minter are required.
type Config struct {
	Cache  *cache.Cache
	Minter Minter
	// AgentSVID is renewed with the workloads' SVIDs; nil means that it is not.
	AgentSVID AgentSVID
	// Seed determines this node's taint delays; see [wave.Delay].
	Seed [32]byte
	// MaxDelay bounds the delay, which is uniform in [0, MaxDelay). Zero means no
	// delay.
	MaxDelay time.Duration
	// Rate is the maximum number of SVIDs requested because of a taint in any
	// second of the server's clock; see [wave.Pace]. Zero means
	// [wave.DefaultRate].
	Rate int
	// BatchSize is the maximum number of SVIDs in one call that the rate does not
	// apply to. Zero means DefaultBatchSize.
	BatchSize int
	// KeyType is the type of the workloads' keys; empty means ECP256.
	KeyType KeyType
	// UnknownAuthority, if set, is called when the authority that signed an SVID is
	// not in the trust bundle. It should refresh the bundle.
	UnknownAuthority func()
	Observer         Observer
	Log              *slog.Logger
	// Now is the wall clock for all deadlines; nil means time.Now.
	Now func() time.Time
}

func (cfg Config) withDefaults() Config {
	if cfg.Cache == nil || cfg.Minter == nil {
		panic("renew: Config needs Cache and Minter")
	}
	cfg.Rate = cmp.Or(cfg.Rate, wave.DefaultRate)
	cfg.BatchSize = cmp.Or(cfg.BatchSize, DefaultBatchSize)
	cfg.KeyType = cmp.Or(cfg.KeyType, ECP256)
	if cfg.UnknownAuthority == nil {
		cfg.UnknownAuthority = func() {}
	}
	cfg.Observer = cmp.Or[Observer](cfg.Observer, noopObserver{})
	cfg.Log = cmp.Or(cfg.Log, slog.New(slog.DiscardHandler))
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return cfg
}

type noopObserver struct{}

func (noopObserver) Minted(error, time.Duration) {}
func (noopObserver) Renewed(Reason, Outcome)     {}
