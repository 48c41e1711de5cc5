package bundle

import "time"

// Doubt counts consecutive answers that would take away what is held: an older bundle, or
// none. They may come from a replica that reads from a lagging database, so they count
// only when they have come for a while. The zero value has counted none. It is not safe
// for concurrent use.
type Doubt struct {
	last  time.Time
	stood time.Duration
}

// Again counts one such answer. It reports whether it is the first, and whether they have
// come for so long that this one counts; then it has counted none again. An outage of the
// server, or a pause of this process, between two answers counts as step at most.
func (d *Doubt) Again(step, limit time.Duration) (first, counts bool) {
	now := time.Now()
	first = d.last.IsZero()
	if !first {
		d.stood += min(now.Sub(d.last), step)
	}
	d.last = now
	if counts = d.stood >= limit; counts {
		*d = Doubt{}
	}
	return first, counts
}

// Clear is for any other answer: it is from a server that is up to date.
func (d *Doubt) Clear() { *d = Doubt{} }
