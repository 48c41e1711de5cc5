package renew

import (
	"time"

	"github.com/cenkalti/backoff/v5"
)

// gate holds calls back while the server does not answer at all. It closes when a call
// fails and the server has answered no other call since that one began. While it is
// closed, single items are probes: each begins a pause after the one before, and the
// least recently tried item is next, so that a bad item does not block the others. The
// first answer opens the gate for all.
//
// All times are monotonic.
type gate struct {
	closed   bool
	since    time.Time // when it was closed
	until    time.Time // when the next probe may begin
	answered time.Time // when the server last answered a call
	reported bool      // the outage was logged
	backoff  *backoff.ExponentialBackOff
}

// blocked reports whether the gate lets no call start now. Hanging probes do not block
// the next one, up to maxBatches in flight.
func (r *Renewer) blocked() bool {
	return r.gate.closed && (r.singles+r.batches >= maxBatches || time.Now().Before(r.gate.until))
}

// hold draws the pause before the next probe.
func (g *gate) hold() {
	g.until = time.Now().Add(max(g.backoff.NextBackOff(), 100*time.Millisecond))
}

// closeGate handles the failure of a call as a whole. The outage is logged when another
// item has failed, too: a single failure may be the fault of its item.
func (r *Renewer) closeGate(c *call) {
	if !r.gate.closed {
		r.gate.closed, r.gate.since, r.gate.reported = true, time.Now(), false
		r.gate.backoff.Reset()
		r.gate.hold()
	} else if c.probe && !r.gate.reported {
		r.gate.reported = true
		r.cfg.Log.Warn("server not answering, renewals paused", "error", c.err, "waiting", r.wave.Len()+r.urgent.Len()+len(c.attempts))
	}
}

// openGate handles an answer of the server.
func (r *Renewer) openGate() {
	r.gate.answered = time.Now()
	if !r.gate.closed {
		return
	}
	r.gate.closed = false
	if r.gate.reported {
		r.cfg.Log.Info("server recovered, renewals resumed", "waiting", r.wave.Len()+r.urgent.Len(),
			"duration", time.Since(r.gate.since).Round(time.Millisecond).String())
	}
}

// later returns the later of two times. The later of now and the NotBefore of an SVID
// that was just minted is the best estimate of the server's time: servers backdate
// SVIDs by seconds (SPIRE by 10) and never postdate them.
func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// setLag records how far in this node's future an SVID begins that was just minted, and
// logs it once.
func (r *Renewer) setLag(lag time.Duration) {
	r.lag.Store(int64(max(lag, 0)))
	switch {
	case lag > maxDrift && !r.lagLogged:
		r.lagLogged = true
		r.cfg.Log.Warn("clock lag detected, validity checked by the server's time; set this node's clock",
			"duration", lag.Round(time.Second).String())
	case lag <= 0 && r.lagLogged:
		r.lagLogged = false
		r.cfg.Log.Info("clock lag recovered")
	}
}

// ClockLag returns how far at least this node's clock is behind the server's, by the
// last SVID minted. Zero means that this one was valid at once. It is safe for
// concurrent use.
func (r *Renewer) ClockLag() time.Duration { return time.Duration(r.lag.Load()) }

// clock detects steps of the wall clock by the monotonic clock.
type clock struct {
	wall time.Time
	mono time.Time
}

// maxDrift is how far the two clocks may drift apart between two checks, which are at
// most maxSleep apart: more than any slewing, and less than would do harm.
const maxDrift = 5 * time.Second

// stepped reports whether the wall clock was set since the last call.
func (c *clock) stepped(now time.Time) bool {
	mono := time.Now()
	drift := now.Round(0).Sub(c.wall) - mono.Sub(c.mono)
	first := c.mono.IsZero()
	c.wall, c.mono = now.Round(0), mono
	return !first && drift.Abs() > maxDrift
}
