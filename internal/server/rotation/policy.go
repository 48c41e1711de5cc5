package rotation

import (
	"cmp"
	"errors"
	"fmt"
	"time"
)

// Mode is the mode of automatic rotation.
type Mode string

// The modes. Paused shows and logs the next step and does not carry it out.
const (
	Off    Mode = "off"
	On     Mode = "on"
	Paused Mode = "paused"
)

// Policy sets when keysets are rotated. The zero value works; [Policy.For] sets the
// defaults of zero fields. The thresholds are whole seconds.
type Policy struct {
	Mode Mode // On when empty
	// PreparationThreshold is how long before the active keyset's expiry its successor
	// is prepared; 14/90 of the lifetime when zero, which is 14 days of 90.
	PreparationThreshold time.Duration
	// ActivationThreshold is the minimum age of a keyset at its activation, so that
	// every verifier has its authorities before it signs; 1/90 of the lifetime when
	// zero, which is a day of 90.
	ActivationThreshold time.Duration
	// TaintThreshold is how long after its replacement a keyset is tainted; 1/90 of the
	// lifetime when zero. If it is at least the lifetime of SVIDs, the taint forces few
	// renewals.
	TaintThreshold time.Duration
}

// PolicyError describes an invalid field of a [Policy].
type PolicyError struct {
	Field   string // mode, preparation_threshold, activation_threshold or taint_threshold
	Problem string // "is …"
	Remedy  string // "give …"
}

// Error implements error.
func (e *PolicyError) Error() string {
	return fmt.Sprintf("rotation: %s %s: %s", e.Field, e.Problem, e.Remedy)
}

// For sets the defaults for keysets of a lifetime of at least an hour, and checks the
// thresholds: a keyset is replaced in the second half of its lifetime, its successor is
// activated in the first half of the remaining time, and it is tainted before it expires.
// The error joins a [*PolicyError] for each invalid field.
func (p Policy) For(lifetime time.Duration) (Policy, error) {
	p.Mode = cmp.Or(p.Mode, On)
	for field, days := range map[*time.Duration]int64{
		&p.PreparationThreshold: 14, &p.ActivationThreshold: 1, &p.TaintThreshold: 1,
	} {
		if *field == 0 {
			*field = time.Duration(int64(lifetime) / 90 * days).Truncate(time.Second)
		}
	}
	var errs []error
	if p.Mode != Off && p.Mode != On && p.Mode != Paused {
		errs = append(errs, &PolicyError{"mode", fmt.Sprintf("is %q", p.Mode), "give off, on or paused"})
	}
	atMostHalf := func(field string, value time.Duration, of string, whole time.Duration) {
		half := (whole / 2).Truncate(time.Second)
		switch {
		case value < time.Second || value%time.Second != 0:
			errs = append(errs, &PolicyError{field, fmt.Sprintf("is %v", value), "give whole seconds, at least one"})
		case value > half:
			errs = append(errs, &PolicyError{
				field, fmt.Sprintf("is %v, more than half of %s, %v", value, of, whole), fmt.Sprintf("give at most %v", half),
			})
		}
	}
	atMostHalf("preparation_threshold", p.PreparationThreshold, "a keyset's lifetime", lifetime)
	atMostHalf("activation_threshold", p.ActivationThreshold, "the preparation threshold", p.PreparationThreshold)
	atMostHalf("taint_threshold", p.TaintThreshold, "the preparation threshold", p.PreparationThreshold)
	if len(errs) > 0 {
		return Policy{}, errors.Join(errs...)
	}
	return p, nil
}
