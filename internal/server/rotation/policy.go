package rotation

import (
	"errors"
	"fmt"
	"time"
)

// Mode says what automatic rotation does.
type Mode string

// The modes. Paused looks and shows what it would do, and does nothing.
const (
	Off    Mode = "off"
	On     Mode = "on"
	Paused Mode = "paused"
)

// Policy says when keysets are rotated. The zero value works; [Policy.For]
// fills in what is left open. The thresholds are in whole seconds.
type Policy struct {
	Mode Mode // On when empty
	// PreparationThreshold is how long before the active keyset's expiry its
	// successor is prepared: 14 days of a life of 90 days when zero, and as much
	// in proportion of another.
	PreparationThreshold time.Duration
	// ActivationThreshold is the least age of a keyset that takes over, so
	// that everybody who verifies knows it before they meet it: one ninetieth
	// of the life when zero, which is a day of 90.
	ActivationThreshold time.Duration
	// TaintThreshold is how long after it was replaced a keyset is tainted. When
	// it is no shorter than an SVID's life, hardly anything is left to be renewed
	// because of the taint. One ninetieth of the life when zero.
	TaintThreshold time.Duration
}

// PolicyError is a field of a [Policy] that does not fit.
type PolicyError struct {
	Field   string // mode, preparation_threshold, activation_threshold or taint_threshold
	Problem string // "is …"
	Remedy  string // "give …"
}

// Error implements error.
func (e *PolicyError) Error() string {
	return fmt.Sprintf("rotation: %s %s: %s", e.Field, e.Problem, e.Remedy)
}

// For fills in what is left open for keysets of the lifetime, and checks that
// the thresholds fit: a keyset is replaced in the second half of its life, takes
// over in the first half of what is left, and is tainted before it has
// expired. Everything that does not fit is in the error, each a [*PolicyError],
// joined. The lifetime is at least an hour.
func (p Policy) For(lifetime time.Duration) (Policy, error) {
	if p.Mode == "" {
		p.Mode = On
	}
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
