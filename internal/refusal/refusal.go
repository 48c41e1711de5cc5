// Package refusal has the errors by which a step of a rotation is refused: by our own
// signing server, and by a SPIRE server as the operator's commands see it.
package refusal

// Error says why an operation was refused. Nothing was changed then. The texts are part
// of the operators' interface and are never wrapped.
type Error string

// Error implements error.
func (e Error) Error() string { return string(e) }

// The refusals of the steps. ErrBusy means that another mutation of the same
// deployment is in flight or was committed first: nothing was changed by this one.
const (
	ErrBusy            Error = "The request failed due to an internal error, please try again."
	ErrNotFound        Error = "key set not found"
	ErrActivateActive  Error = "cannot activate active key set"
	ErrActivateTainted Error = "cannot activate tainted key set"
	ErrTaintActive     Error = "cannot taint active key set"
	ErrTaintTainted    Error = "cannot taint tainted key set"
	ErrRemoveActive    Error = "cannot remove active key set"
	ErrRemovePrepared  Error = "cannot remove prepared key set"
)
