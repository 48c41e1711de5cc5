// Package clock says how far the machine's wall clock can be believed.
//
// A wall clock can be days or years off for a moment: a battery that is empty at
// boot, a virtual machine that is resumed, an NTP server that is wrong. What is
// done for good because of such a moment cannot be taken back when the clock is
// right again. The monotonic clock has no such moments, but it does not know the
// time. A [Clock] compares the two, from a time on that is known to have passed:
//
//   - A clock that went ahead by no more than three days is believed when it has held
//     for [Hold] of uptime.
//   - One that went ahead by more, or was set back, is in doubt. When it has stayed
//     there, for an hour or for a day, and another machine's clock fits it and none
//     that was heard within an hour says otherwise, what can be taken back goes on. It is
//     still not believed: a caller's word makes nothing happen that is for good.
//   - Only an operator's word ends a doubt, or the clock when it is right again.
package clock

import (
	"sync"
	"time"
)

// Hold is for how much uptime a wall clock that went ahead has to stay there
// before it is believed.
const Hold = 24 * time.Hour

// Skew is how far the clocks of a trust domain's machines may differ, and how far the
// server's own may be set, without anything being taken for over while somebody
// takes it for valid; see [Over].
const Skew = 5 * time.Minute

// A clock that went ahead by more than leap is in doubt: machines are suspended and
// shut down for long. One that was set back is by more than [Skew], since time never
// goes back. They stay where they are for probation, or for [Hold], before a caller's
// clock can speak for them.
const (
	leap      = 3 * 24 * time.Hour
	probation = time.Hour
)

// slewing is how far the two clocks may part without a step: by NTP, or because
// they are not read at the same moment.
const slewing = 5 * time.Second

// Clock is a wall clock that is watched. It notices what happens between two calls
// of its methods only by what is left of it at the second one, so one of them should
// be called every minute. All methods may be called concurrently.
type Clock struct {
	now    func() time.Time
	uptime func() time.Duration

	mu sync.Mutex
	// The offsets of the last Hold that are below all that were seen after them, and
	// the present one; the lowest first. One that is in doubt because it is ahead is not
	// among them: the lowest goes on in its place.
	seen []offset
	// floor is what an origin is measured by: the lowest of seen, except that it does
	// not follow a clock that was set back.
	floor time.Time
	// doubted is the present origin while it is in doubt, since an uptime; else zero.
	// fits says that calls speak for it. None can before deniedUntil.
	doubted            time.Time
	since, deniedUntil time.Duration
	fits               bool
	// confirmed is the uptime when an operator did, or zero, the start.
	confirmed time.Duration
}

// offset is by how much the wall clock was ahead of the uptime.
type offset struct {
	origin time.Time     // what the wall clock showed, less the uptime
	at     time.Duration // uptime when it was last seen
}

// New watches a wall clock, time.Now when nil. uptime is the monotonic clock, from any
// moment on; the machine's when nil. heartbeat is a time that is known to have passed,
// the later the better, and is what the wall clock is measured by at first; zero when
// nothing is known.
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
	c.look()
	return c
}

// Now is what the wall clock shows.
func (c *Clock) Now() time.Time { return c.now() }

// Uptime is how long the Clock exists by the monotonic clock, which no step changes.
func (c *Clock) Uptime() time.Duration { return c.uptime() }

// Start is when the Clock was made, by what the wall clock shows now.
func (c *Clock) Start() time.Time { return c.now().Round(0).Add(-c.uptime()) }

// Sure is the time that it is at least: what the wall clock shows, or less for
// [Hold] after it went ahead by itself, or while it is in doubt. It follows a clock that
// is set back at once.
func (c *Clock) Sure() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, up := c.look()
	return c.seen[0].origin.Add(up)
}

// PastFor is for how much uptime the wall clock has shown t or later without a
// break, since the start or since an operator confirmed the clock, [Hold] at most;
// negative before t, by how much it lacks. While the clock is in doubt because it went
// ahead it is as if it had not.
func (c *Clock) PastFor(t time.Time) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, up := c.look()
	last := len(c.seen) - 1
	since := t.Round(0).Sub(c.seen[last].origin)
	for _, o := range c.seen[:last] {
		since = max(since, min(t.Round(0).Sub(o.origin), o.at))
	}
	return min(up-max(since, c.confirmed), Hold)
}

// State is what is believed of a clock at a moment.
type State struct {
	Shows   time.Time // by the wall clock
	AtLeast time.Time // see [Clock.Sure]
	// Doubt is by how much the wall clock is ahead of what uptime explains, by more than
	// three days, or was set back, by more than five minutes and then negative; zero when it
	// is not in doubt. SteadyFor is for how much uptime it has stayed there.
	Doubt, SteadyFor time.Duration
	// Waits: nothing that can wait should be done because of the time.
	Waits bool
}

// State returns the present one.
func (c *Clock) State() State {
	c.mu.Lock()
	defer c.mu.Unlock()
	now, up := c.look()
	s := State{Shows: now, AtLeast: c.seen[0].origin.Add(up)}
	if !c.doubted.IsZero() {
		s.Doubt, s.SteadyFor, s.Waits = c.doubted.Sub(c.floor), up-c.since, !c.fits
	}
	return s
}

// Heartbeat is the time to be kept for the next process: the one that was believed
// last. A clock that was set back does not take it along, neither while it is in doubt nor
// after it is right again, or the next process would doubt the one that is right.
func (c *Clock) Heartbeat() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, up := c.look()
	return c.floor.Add(up)
}

// Verdict is what another clock says of one that is in doubt.
type Verdict int

// The verdicts.
const (
	Unheard Verdict = iota // the clock is not in doubt, has not stayed long enough, or that was known
	Fits                   // what can be taken back goes on
	Denies                 // it waits for an hour more; said once in that hour
)

// Heard compares the clock with what another machine's shows at this moment. Where they
// differ by more than [Skew] the other one may be wrong as well, so it only keeps what
// waits waiting.
func (c *Clock) Heard(other time.Time) Verdict {
	c.mu.Lock()
	defer c.mu.Unlock()
	now, up := c.look()
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

// Confirm takes an operator's word that the wall clock is right, by another clock that
// shows this time. It is believed from then on, except that [Clock.PastFor] begins anew.
// It reports false, and changes nothing, where the two differ by more than [Skew].
func (c *Clock) Confirm(other time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	now, up := c.look()
	if now.Sub(other).Abs() > Skew {
		return false
	}
	c.floor, c.doubted, c.confirmed = now.Add(-up), time.Time{}, up
	c.seen = []offset{{c.floor, up}}
	return true
}

// look takes in the present offset and returns what the two clocks show.
func (c *Clock) look() (now time.Time, up time.Duration) {
	now, up = c.now().Round(0), c.uptime()
	origin := now.Add(-up)
	c.judge(origin, up)
	if c.doubted.After(c.floor) {
		origin = c.seen[0].origin
	}
	n := len(c.seen)
	for n > 0 && !c.seen[n-1].origin.Before(origin) {
		n--
	}
	c.seen = c.seen[:n]
	if n > 0 && origin.Sub(c.seen[n-1].origin) <= slewing {
		c.seen[n-1].at = up
	} else {
		c.seen = append(c.seen, offset{origin, up})
	}
	gone := 0
	for gone < len(c.seen)-1 && up-c.seen[gone].at >= Hold {
		gone++
	}
	c.seen = append(c.seen[:0], c.seen[gone:]...)
	if c.doubted.IsZero() && c.seen[0].origin.After(c.floor) {
		c.floor = c.seen[0].origin
	}
	return now, up
}

// judge says whether the present origin is in doubt.
func (c *Clock) judge(origin time.Time, up time.Duration) {
	switch step := origin.Sub(c.floor); {
	case -Skew <= step && step <= leap:
		c.doubted = time.Time{}
		if step < 0 {
			c.floor = origin
		}
	case c.doubted.IsZero() || origin.Sub(c.doubted).Abs() > slewing:
		c.doubted, c.since, c.deniedUntil, c.fits = origin, up, 0, false
	}
}
