package spire

import (
	"fmt"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/operator/runbook"
	"github.com/renewd/renewd/internal/refusal"
)

// The kinds of authorities, as errors name them.
const (
	x509Kind = "X.509"
	jwtKind  = "JWT"
)

// mutation is a call that changes one authority of a keyset.
type mutation struct {
	kind      string
	authority authority
	make      func(authorityID string) error
}

// apply makes the calls for the authorities that need them, in order, and stops at the
// first error.
func apply(step, id string, needed func(authority) bool, mutations ...mutation) error {
	var done string
	for _, c := range mutations {
		if !c.authority.exists() || !needed(c.authority) {
			continue
		}
		if err := c.make(c.authority.id); err != nil {
			return callError(step, id, c.kind, done, err)
		}
		done = c.kind
	}
	return nil
}

// callError returns the error of a step for the error of a call. done is the kind of
// authority that the step has already changed, or empty.
func callError(step, id, kind, done string, err error) error {
	// Only some codes are sure to mean that the call changed nothing.
	unknown := false
	switch status.Code(err) {
	case codes.InvalidArgument:
		// The state has changed since it was read.
		if done == "" {
			return refusal.ErrBusy
		}
	case codes.FailedPrecondition, codes.NotFound, codes.PermissionDenied, codes.Unauthenticated, codes.Unimplemented:
	default:
		unknown = true
	}
	what := fmt.Sprintf("%s the %s authority", step, kind)
	if done != "" {
		again := strings.TrimSpace(step + " " + id)
		what = fmt.Sprintf("the step is complete for the %s authority, but perhaps not for the %s authority; run keysetctl %s again: %s", done, kind, again, what)
	}
	if unknown {
		return fmt.Errorf("%s: %w: %w", what, runbook.ErrOutcomeUnknown, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}
