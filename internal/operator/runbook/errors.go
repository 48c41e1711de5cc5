package runbook

import (
	"context"
	"errors"
	"fmt"
)

// ErrOutcomeUnknown is wrapped by the error of a mutation that may have
// happened and may not: the time was over, or the connection was lost, before
// the server answered. The next [Backend.Status] tells.
var ErrOutcomeUnknown = errors.New("the outcome is not known")

// NotSafeError says that something still hangs on a keyset, or that this is
// not known. Backends return a pointer to it.
type NotSafeError struct {
	Keyset  string // ID
	Message string // for the operator, complete
}

// Error implements error.
func (e *NotSafeError) Error() string { return e.Message }

// heard marks the error of a mutation whose outcome is not known because its
// context ended. A Backend may pass that on as it is; it was not told "no".
func heard(err error) error {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return fmt.Errorf("%w: %w", ErrOutcomeUnknown, err)
	}
	return err
}

// remedies say what to do about a refusal. Refusals are known by their texts:
// that is what passes through every kind of Backend, and what an operator looks
// up.
var remedies = map[string]string{
	"The request failed due to an internal error, please try again.": "Another change of this deployment was in flight or was first, perhaps automatic rotation's; this one changed nothing.\n" +
		"Run keysetctl list: if the keysets are as intended, nothing is left to do; if not, wait a moment and retry.",
	"key set not found":               "Run keysetctl list to see the keysets that there are.",
	"cannot activate active key set":  "It signs already: nothing is left to do.",
	"cannot activate tainted key set": "Only a Prepared keyset can be activated: prepare a new one.",
	"cannot activate expired key set": "Prepare a new one and activate that.",
	"cannot taint active key set":     "Only a Prepared keyset can be tainted: activate a successor first, and this one steps down to Prepared.",
	"cannot taint tainted key set":    "It is tainted already: wait until it is safe to remove.",
	"cannot remove active key set":    "Only a Tainted keyset can be removed: activate a successor, then taint this one.",
	"cannot remove prepared key set":  "Only a Tainted keyset can be removed: taint it first.",
}

// Remedy says what to do about an error of one of the steps, in full
// sentences; empty where there is nothing to add.
func Remedy(err error) string {
	if errors.Is(err, ErrOutcomeUnknown) {
		return "The change may have happened. Run keysetctl list, and retry only if it did not. Nothing is retried by itself."
	}
	return remedies[err.Error()]
}
