package renew

import (
	"time"

	"github.com/cenkalti/backoff/v5"
)

// gate holds calls back while the server as a whole does not answer: one call
// at a time tries, and the first that succeeds opens it for all.
type gate struct {
	closed  bool
	until   time.Time // monotonic: when the next try may be made
	since   time.Time // when it was last closed
	backoff *backoff.ExponentialBackOff
}

// blocked reports whether the gate lets no call through now.
func (r *Renewer) blocked() bool {
	return r.gate.closed && (r.singles+r.batches > 0 || r.own.inFlight || time.Now().Before(r.gate.until))
}

// closeGate is for a call that failed as a whole. Calls that were under way
// when it was closed say nothing new.
func (r *Renewer) closeGate(c *call) {
	if r.gate.closed && c.started.Before(r.gate.since) {
		return
	}
	if !r.gate.closed {
		r.gate.backoff.Reset()
		r.cfg.Log.Warn("server does not answer, renewals wait", "error", c.err, "waiting", r.wave.Len()+r.urgent.Len()+len(c.attempts))
	}
	r.gate.closed = true
	r.gate.since = time.Now()
	r.gate.until = r.gate.since.Add(max(r.gate.backoff.NextBackOff(), 100*time.Millisecond))
}

func (r *Renewer) openGate() {
	if !r.gate.closed {
		return
	}
	r.gate.closed = false
	r.cfg.Log.Info("server answers again, renewals go on", "waiting", r.wave.Len()+r.urgent.Len(),
		"after", time.Since(r.gate.since).Round(time.Millisecond).String())
}

// clock notices when the wall clock does not go along with the monotonic one.
type clock struct {
	wall time.Time
	mono time.Time
}

// maxDrift is how far they may part between two looks, which are at most
// maxSleep apart: more than any slewing, less than what would matter.
const maxDrift = 5 * time.Second

// stepped reports whether the wall clock was set since the last call.
func (c *clock) stepped(now time.Time) bool {
	mono := time.Now()
	drift := now.Round(0).Sub(c.wall) - mono.Sub(c.mono)
	first := c.mono.IsZero()
	c.wall, c.mono = now.Round(0), mono
	return !first && drift.Abs() > maxDrift
}
