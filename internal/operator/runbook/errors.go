package runbook

import (
	"context"
	"errors"
	"fmt"
)

// ErrOutcomeUnknown is wrapped by the error of a mutation that ended without the
// server's answer, by a timeout or a lost connection. The mutation may have
// happened; the next [Backend.Status] shows whether it did.
var ErrOutcomeUnknown = errors.New("the outcome is not known")

// NotSafeError says that SVIDs still depend on a keyset, or that this is not known.
// Backends return a pointer to it.
type NotSafeError struct {
	Keyset  string // ID
	Message string // complete, for the operator
}

// Error implements error.
func (e *NotSafeError) Error() string { return e.Message }

// PermanentError is the error of a read that cannot succeed if it is repeated, such as one
// for a deployment that does not exist. Backends return a pointer to it.
type PermanentError struct{ Err error }

// Error implements error.
func (e *PermanentError) Error() string { return e.Err.Error() }

// Unwrap returns the cause.
func (e *PermanentError) Unwrap() error { return e.Err }

// markUnknownOutcome wraps [ErrOutcomeUnknown] into the error of a mutation whose
// context ended: a Backend may return such an error unchanged.
func markUnknownOutcome(err error) error {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return fmt.Errorf("%w: %w", ErrOutcomeUnknown, err)
	}
	return err
}

// remedies maps the text of a server's error to its remedy. The text is all that
// passes through every kind of Backend.
var remedies = map[string]string{
	"The request failed due to an internal error, please try again.": "The deployment was being changed by another command or by automatic rotation. Your command had no effect.\n" +
		"Check keysetctl list, and repeat the command if it is still needed.",
	"key set not found":               "Copy the ID from keysetctl list.",
	"cannot activate active key set":  "Nothing to do: the keyset is signing.",
	"cannot activate tainted key set": "A taint cannot be undone. Run keysetctl prepare, and activate the ID that it prints.",
	"cannot activate expired key set": "Run keysetctl prepare, and activate the ID that it prints.",
	"cannot taint active key set":     "The keyset is signing. Let another one sign with keysetctl activate, then repeat the command.",
	"cannot taint tainted key set":    "Nothing to do: the taint is published. Go on with keysetctl wait.",
	"cannot remove active key set":    "The keyset is signing. Let another one sign with keysetctl activate, then taint this one and wait.",
	"cannot remove prepared key set":  "Run keysetctl taint and keysetctl wait with its ID before you remove it.",
}

// Remedy returns what an operator can do about the error of a step, in full
// sentences. It is empty if there is nothing to add.
func Remedy(err error) string {
	if errors.Is(err, ErrOutcomeUnknown) {
		return "The change may have been made. Check keysetctl list before you repeat the command."
	}
	return remedies[err.Error()]
}
