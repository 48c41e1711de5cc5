// Package clock decides how far the machine's wall clock can be trusted.
//
// A wall clock can be days or years off for a moment: a battery is empty at boot, a
// virtual machine is resumed, an NTP server is wrong. An irreversible step that is
// taken in such a moment remains when the clock is right again. The monotonic clock
// has no steps, but does not know the time. A [Clock] compares the two, starting
// from a time that is known to have passed:
//
//   - A clock that was set ahead by up to three days is trusted after [Hold] of
//     uptime without another step.
//   - A clock that was set ahead by more, or was set back, is in doubt. Reversible
//     steps continue once it has been steady, for an hour or for a day, and another
//     machine's clock agrees with it and none has disagreed for an hour. It is still
//     not trusted: a caller's clock alone causes no irreversible step.
//   - The doubt ends when the clock is right again or an operator confirms it.
package clock

import (
	"sync"
	"time"
)

// Hold is the uptime after which a wall clock that was set ahead is trusted.
const Hold = 24 * time.Hour

// Skew is how far the clocks of a trust domain's machines may differ, and how far the
// server's clock may be stepped, without an SVID that one machine accepts counting
// as expired on another; see [Over].
const Skew = 5 * time.Minute

// A clock that is ahead by more than maxAhead is in doubt. The limit is days, because
// machines are suspended and shut down. A clock that was set back is in doubt beyond
// [Skew]. A clock in doubt must be steady for probation if it is ahead, and for [Hold]
// if it was set back, before a caller's clock counts.
const (
	maxAhead  = 3 * 24 * time.Hour
	probation = time.Hour
)

// maxSlew is the largest change of the difference between the two clocks that is not
// a step: NTP slews the wall clock, and they are not read at the same moment.
const maxSlew = 5 * time.Second

// Clock watches a wall clock. It samples both clocks with each call of a method, and
// does not see a step that is undone between two calls, so a method should be called
// every minute. All methods may be called concurrently.
type Clock struct {
	now    func() time.Time
	uptime func() time.Duration

	mu sync.Mutex
	// seen holds the offsets of the last Hold that are lower than all later ones, and
	// the present offset, in ascending order. For an offset that is in doubt because
	// the clock is ahead, the lowest one is used instead.
	seen []offset
	// floor is the origin that a new one is compared with: the lowest of seen, except
	// that it does not follow a clock that was set back.
	floor time.Time
	// doubted is the present origin while it is in doubt, since is the uptime when that
	// began; otherwise zero. fits says that a caller's clock agrees, which is not
	// possible before deniedUntil.
	doubted            time.Time
	since, deniedUntil time.Duration
	fits               bool
	// confirmed is the uptime when an operator confirmed the clock last; initially zero.
	confirmed time.Duration
}

// offset is the difference between the wall clock and the uptime.
type offset struct {
	origin time.Time     // wall clock minus uptime
	at     time.Duration // uptime when it was last seen
}

// New makes a Clock over a wall clock, time.Now when nil. uptime is the monotonic
// clock, with any origin; the machine's when nil. heartbeat is the latest time that is
// known to have passed, with which the wall clock is compared first; zero if unknown.
func New(now func() time.Time, uptime func() time.Duration, heartbeat time.Time) *Clock {
	if now == nil {
		now = time.Now
	}
	if uptime == nil {
		start := time.Now()
		uptime = func() time.Duration { return time.Since(start) }
	}
	begin := uptime()
	c := &Clock{now: now, uptime: func() time.Duration { return uptime() - begin }, floor: heartbeat.Round(0)}
	if heartbeat.IsZero() {
		c.floor = now().Round(0)
	}
	c.seen = []offset{{c.floor, 0}}
	c.sampleLocked()
	return c
}

// Now returns the time of the wall clock.
func (c *Clock) Now() time.Time { return c.now() }

// Uptime returns the age of the Clock by the monotonic clock, which has no steps.
func (c *Clock) Uptime() time.Duration { return c.uptime() }

// Start returns when the Clock was made, by the present wall clock.
func (c *Clock) Start() time.Time { return c.now().Round(0).Add(-c.uptime()) }

// AtLeast returns a lower bound of the true time. It is the wall clock, except for
// [Hold] after that was set ahead, and while it is in doubt. It follows a clock that
// is set back at once.
func (c *Clock) AtLeast() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, up := c.sampleLocked()
	return c.seen[0].origin.Add(up)
}

// PastFor returns for how much uptime the wall clock has continuously been at t or
// later, at most [Hold]. It counts from the start, or from when an operator confirmed
// the clock. Before t it is negative: the time until t. While the clock is in doubt
// because it is ahead, that step is ignored.
func (c *Clock) PastFor(t time.Time) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, up := c.sampleLocked()
	last := len(c.seen) - 1
	since := t.Round(0).Sub(c.seen[last].origin)
	for _, o := range c.seen[:last] {
		since = max(since, min(t.Round(0).Sub(o.origin), o.at))
	}
	return min(up-max(since, c.confirmed), Hold)
}

// State describes a clock at a moment.
type State struct {
	Shows   time.Time // the wall clock
	AtLeast time.Time // see [Clock.AtLeast]
	// Doubt is the step of a clock in doubt: positive, more than three days, if the wall
	// clock is ahead of what the uptime explains; negative, more than five minutes, if it
	// was set back; zero if the clock is not in doubt. SteadyFor is the uptime since the
	// step.
	Doubt, SteadyFor time.Duration
	// Waits says that steps which depend on the time should wait.
	Waits bool
}

// State returns the present state.
func (c *Clock) State() State {
	c.mu.Lock()
	defer c.mu.Unlock()
	now, up := c.sampleLocked()
	s := State{Shows: now, AtLeast: c.seen[0].origin.Add(up)}
	if !c.doubted.IsZero() {
		s.Doubt, s.SteadyFor, s.Waits = c.doubted.Sub(c.floor), up-c.since, !c.fits
	}
	return s
}

// Heartbeat returns the time to store for the next process: the latest one that was
// not in doubt, plus the uptime since. It does not follow a clock that was set back.
// Otherwise the next process would doubt the clock once it is right again.
func (c *Clock) Heartbeat() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, up := c.sampleLocked()
	return c.floor.Add(up)
}

// Verdict is the result of comparing a clock in doubt with another machine's.
type Verdict int

// The verdicts.
const (
	Unheard Verdict = iota // no change: the clock is not in doubt, or not steady for long enough, or the result is known
	Fits                   // the clocks agree: reversible steps continue
	Denies                 // the clocks disagree: steps wait for another hour; returned once in that hour
)

// Heard compares the clock with the present time of another machine's. If they differ
// by more than [Skew], the other clock may be wrong, so the only effect is that steps
// wait.
func (c *Clock) Heard(other time.Time) Verdict {
	c.mu.Lock()
	defer c.mu.Unlock()
	now, up := c.sampleLocked()
	limit := probation
	if c.doubted.Before(c.floor) {
		limit = Hold
	}
	switch {
	case c.doubted.IsZero():
	case now.Sub(other).Abs() > Skew:
		known := up < c.deniedUntil
		c.fits, c.deniedUntil = false, up+probation
		if !known {
			return Denies
		}
	case !c.fits && up-c.since >= limit && up >= c.deniedUntil:
		c.fits = true
		return Fits
	}
	return Unheard
}

// Confirm accepts the wall clock as right, because an operator confirms it by another
// clock, which shows the time other. [Clock.PastFor] starts over. If the two differ by
// more than [Skew], it returns false and changes nothing.
func (c *Clock) Confirm(other time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	now, up := c.sampleLocked()
	if now.Sub(other).Abs() > Skew {
		return false
	}
	c.floor, c.doubted, c.confirmed = now.Add(-up), time.Time{}, up
	c.seen = []offset{{c.floor, up}}
	return true
}

// sampleLocked reads both clocks, and updates the offsets and the doubt.
func (c *Clock) sampleLocked() (now time.Time, up time.Duration) {
	now, up = c.now().Round(0), c.uptime()
	origin := now.Add(-up)
	c.judgeLocked(origin, up)
	if c.doubted.After(c.floor) {
		origin = c.seen[0].origin
	}
	n := len(c.seen)
	for n > 0 && !c.seen[n-1].origin.Before(origin) {
		n--
	}
	c.seen = c.seen[:n]
	if n > 0 && origin.Sub(c.seen[n-1].origin) <= maxSlew {
		c.seen[n-1].at = up
	} else {
		c.seen = append(c.seen, offset{origin, up})
	}
	expired := 0
	for expired < len(c.seen)-1 && up-c.seen[expired].at >= Hold {
		expired++
	}
	c.seen = append(c.seen[:0], c.seen[expired:]...)
	if c.doubted.IsZero() && c.seen[0].origin.After(c.floor) {
		c.floor = c.seen[0].origin
	}
	return now, up
}

// judgeLocked decides whether an origin is in doubt.
func (c *Clock) judgeLocked(origin time.Time, up time.Duration) {
	switch step := origin.Sub(c.floor); {
	case -Skew <= step && step <= maxAhead:
		c.doubted = time.Time{}
		if step < 0 {
			c.floor = origin
		}
	case c.doubted.IsZero() || origin.Sub(c.doubted).Abs() > maxSlew:
		c.doubted, c.since, c.deniedUntil, c.fits = origin, up, 0, false
	}
}
