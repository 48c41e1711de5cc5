package renew

import (
	"time"

	"github.com/cenkalti/backoff/v5"
)

// gate holds calls back while the server as a whole does not answer. It closes
// when a call fails and the server has answered no other call since that one
// began. While it is closed, single items try: each begins a pause after the
// one before, and the least recently tried is next, so that one that the server
// cannot answer for does not keep the others from trying. The first answer
// opens the gate for all.
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

// blocked reports whether the gate lets no call through now. Probes that hang
// until their deadline do not keep others from trying, up to as many as there
// are batches in good times.
func (r *Renewer) blocked() bool {
	return r.gate.closed && (r.singles+r.batches >= maxBatches || time.Now().Before(r.gate.until))
}

// hold has the next probe wait.
func (g *gate) hold() {
	g.until = time.Now().Add(max(g.backoff.NextBackOff(), 100*time.Millisecond))
}

// closeGate takes in that a call failed as a whole. Whether the fault is the
// server's is not known before another item was tried as well: only then is it
// logged.
func (r *Renewer) closeGate(c *call) {
	if !r.gate.closed {
		r.gate.closed, r.gate.since, r.gate.reported = true, time.Now(), false
		r.gate.backoff.Reset()
		r.gate.hold()
	} else if c.probe && !r.gate.reported {
		r.gate.reported = true
		r.cfg.Log.Warn("server does not answer, renewals wait", "error", c.err, "waiting", r.wave.Len()+r.urgent.Len()+len(c.attempts))
	}
}

// openGate takes in that the server answered a call.
func (r *Renewer) openGate() {
	r.gate.answered = time.Now()
	if !r.gate.closed {
		return
	}
	r.gate.closed = false
	if r.gate.reported {
		r.cfg.Log.Info("server answers again, renewals go on", "waiting", r.wave.Len()+r.urgent.Len(),
			"after", time.Since(r.gate.since).Round(time.Millisecond).String())
	}
}

// later returns the later of two times. Of now and of the time when an SVID that
// was just minted begins, it is what is known of the server's time: servers date
// SVIDs back by seconds (SPIRE by 10), never forward.
func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// noteLag takes in how far an SVID that was just minted begins in this node's
// future, and logs it once.
func (r *Renewer) noteLag(lag time.Duration) {
	r.lag.Store(int64(max(lag, 0)))
	switch {
	case lag > maxDrift && !r.behind:
		r.behind = true
		r.cfg.Log.Warn("clock lag detected, X.509-SVIDs are used by the server's time: set this node's clock",
			"lag", lag.Round(time.Second).String())
	case lag <= 0 && r.behind:
		r.behind = false
		r.cfg.Log.Info("clock lag recovered")
	}
}

// ClockLag is how far this node's clock is behind the server's, at least, as the
// last SVID told: zero when that one was valid here at once.
func (r *Renewer) ClockLag() time.Duration { return time.Duration(r.lag.Load()) }

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
