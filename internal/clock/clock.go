// Package clock says how far the machine's wall clock can be believed.
//
// A wall clock can be days or years off for a moment: a battery that is empty at
// boot, a virtual machine that is resumed, an NTP server that is wrong. What is
// done for good because of such a moment cannot be taken back when the clock is
// right again. The monotonic clock has no such moments, but it does not know the
// time. A [Clock] compares the two: a time that comes sooner than uptime explains
// is believed when it has held for [Hold].
package clock

import (
	"sync"
	"time"
)

// Hold is for how much uptime a wall clock that went ahead has to stay there
// before it is believed.
const Hold = 24 * time.Hour

// A clock that went ahead by more than leap is in doubt for probation, one that was
// set back by more than skew for [Hold]: machines are suspended and shut down for
// long, and time never goes back.
const (
	leap      = 3 * 24 * time.Hour
	probation = time.Hour
	skew      = 5 * time.Minute
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
	// the present one; the lowest first.
	seen []offset
	// floor is the lowest of seen before the clock was set back, and trusted the origin
	// that was not in doubt last. Another one, if it is not zero, is in doubt since an
	// uptime.
	floor, trusted, doubted time.Time
	since                   time.Duration
}

// offset is by how much the wall clock was ahead of the uptime.
type offset struct {
	origin time.Time     // what the wall clock showed, less the uptime
	at     time.Duration // uptime when it was last seen
}

// New watches a wall clock. uptime is the monotonic clock, from any moment on; the
// machine's when nil. heartbeat is a time that is known to have passed, the later
// the better, and is what the wall clock is measured by at first; zero when nothing is
// known.
func New(now func() time.Time, uptime func() time.Duration, heartbeat time.Time) *Clock {
	if uptime == nil {
		start := time.Now()
		uptime = func() time.Duration { return time.Since(start) }
	}
	begin := uptime()
	c := &Clock{now: now, uptime: func() time.Duration { return uptime() - begin }, trusted: heartbeat.Round(0)}
	if heartbeat.IsZero() {
		c.trusted = now().Round(0)
	}
	c.floor, c.seen = c.trusted, []offset{{c.trusted, 0}}
	c.look()
	return c
}

// Sure is the time that it is at least: what the wall clock shows, or less for
// [Hold] after it went ahead by itself. It follows a clock that is set back at
// once.
func (c *Clock) Sure() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	up := c.look()
	return c.seen[0].origin.Add(up)
}

// PastFor is for how much uptime the wall clock has shown t or later without a
// break, [Hold] at most; negative before t, by how much it lacks.
func (c *Clock) PastFor(t time.Time) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	up := c.look()
	last := len(c.seen) - 1
	since := t.Round(0).Sub(c.seen[last].origin)
	for _, o := range c.seen[:last] {
		since = max(since, min(t.Round(0).Sub(o.origin), o.at))
	}
	return min(up-max(since, 0), Hold)
}

// Doubt is by how much the wall clock went ahead of the uptime, by more than three
// days, or was set back, by more than five minutes and then negative. Zero when it
// did not, when it is where it was before, or when it has stayed there: for an hour, or
// a day if it was set back. Nothing that can wait should be done meanwhile because of
// the time.
func (c *Clock) Doubt() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.look()
	if c.doubted.IsZero() {
		return 0
	}
	return c.doubted.Sub(c.floor)
}

// Heartbeat is the time to be kept for the next process: [Clock.Sure], except that a
// clock that was set back does not take it along while it is in doubt.
func (c *Clock) Heartbeat() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	up := c.look()
	origin := c.seen[0].origin
	if c.setBack() {
		origin = c.floor
	}
	return origin.Add(up)
}

// look takes in the present offset and returns the uptime.
func (c *Clock) look() time.Duration {
	now, up := c.now().Round(0), c.uptime()
	origin := now.Add(-up)
	c.judge(origin, up)
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
	return up
}

// judge says whether the present origin is in doubt.
func (c *Clock) judge(origin time.Time, up time.Duration) {
	if !c.setBack() {
		c.floor = c.seen[0].origin
	}
	limit := probation
	if origin.Before(c.floor) {
		limit = Hold
	}
	switch {
	case near(origin, c.floor) || near(origin, c.trusted):
	case c.doubted.IsZero() || origin.Sub(c.doubted).Abs() > slewing:
		c.doubted, c.since = origin, up
		return
	case up-c.since < limit:
		return
	}
	c.trusted, c.doubted = origin, time.Time{}
}

// setBack reports whether the clock is in doubt because it was set back.
func (c *Clock) setBack() bool { return !c.doubted.IsZero() && c.doubted.Before(c.floor) }

// near reports whether an origin is so close to another one that it is not in doubt.
func near(origin, other time.Time) bool {
	step := origin.Sub(other)
	return -skew <= step && step <= leap
}
