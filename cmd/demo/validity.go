package main

import "time"

// validity measures how long a workload had no valid SVID after its first one. The zero value
// is ready to use.
type validity struct {
	hadSVID bool
	until   time.Time // end of the SVID held; in the past: there is none
	longest time.Duration
}

// update records at now that the workload has an SVID that is valid until then, or, with the
// zero time, that it has none.
func (v *validity) update(now, until time.Time) {
	v.longest = v.gap(now)
	switch {
	case until.After(now):
		v.hadSVID, v.until = true, until
	case v.hadSVID && v.until.After(now):
		v.until = now // withdrawn before its expiry
	}
}

// gap returns the longest time without a valid SVID until now.
func (v *validity) gap(now time.Time) time.Duration {
	if !v.hadSVID || !now.After(v.until) {
		return v.longest
	}
	return max(v.longest, now.Sub(v.until))
}
