package upstream

import (
	"context"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/renewd/renewd/internal/loglimit"
)

// newPace returns the pauses between attempts to attest or to bootstrap.
// RandomizationFactor 1 makes each pause uniform between zero and twice the
// interval: full jitter, so that a fleet that lost its server does not return in
// step. MaxInterval is the mean of the longest pauses, which are at most 5 s. Longer
// pauses would not relieve the server, which admits one attestation a second for
// each address.
func newPace() *backoff.ExponentialBackOff {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval = 500 * time.Millisecond
	b.RandomizationFactor = 1
	b.Multiplier = 1.5
	b.MaxInterval = 2500 * time.Millisecond
	b.Reset()
	return b
}

// newEvictionPace returns the pauses of an agent whose SVID another agent revokes with
// each attestation: 10 s at first and 5 minutes at last, each with half of it as jitter.
func newEvictionPace() *backoff.ExponentialBackOff {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval = 10 * time.Second
	b.RandomizationFactor = 0.5
	b.Multiplier = 2
	b.MaxInterval = 5 * time.Minute
	b.Reset()
	return b
}

// sleep waits for d, or returns the error of ctx when that ends first.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// failures returns the log of one series of attempts.
func (c *Client) failures() *loglimit.Log { return loglimit.New(c.cfg.Log, loglimit.Interval, 16) }
