package main

import "time"

// validity measures how long a workload was without a valid SVID after it had
// its first. The zero value is one that had none yet.
type validity struct {
	had     bool
	until   time.Time // end of the SVID held; in the past: there is none
	longest time.Duration
}

// update takes in what the workload was told at now: an SVID that is valid
// until then, or, with the zero time, that it has none.
func (v *validity) update(now, until time.Time) {
	v.longest = v.gap(now)
	switch {
	case until.After(now):
		v.had, v.until = true, until
	case v.had && v.until.After(now):
		v.until = now // taken away before its end
	}
}

// gap is the longest time without, up to now.
func (v *validity) gap(now time.Time) time.Duration {
	if !v.had || !now.After(v.until) {
		return v.longest
	}
	return max(v.longest, now.Sub(v.until))
}
