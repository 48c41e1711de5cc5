package spire

import (
	"fmt"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/operator/runbook"
	"github.com/renewd/renewd/internal/refusal"
)

// The two kinds of authority, in what people read.
const (
	x509Kind = "X.509"
	jwtKind  = "JWT"
)

// call moves one half of a keyset.
type call struct {
	kind string
	half half
	make func(authorityID string) error
}

// carryOut makes the calls for the halves that are there and need it, one after
// the other, and stops at the first that fails.
func carryOut(step, id string, needed func(half) bool, calls ...call) error {
	var done string
	for _, c := range calls {
		if !c.half.here() || !needed(c.half) {
			continue
		}
		if err := c.make(c.half.id); err != nil {
			return failed(step, id, c.kind, done, err)
		}
		done = c.kind
	}
	return nil
}

// failed says what an error of a mutating call means. done is the half that
// the same step has moved before, if any.
func failed(step, id, kind, done string, err error) error {
	// That a call could not be carried out is certain only when the server
	// says so before it does anything.
	unknown := false
	switch status.Code(err) {
	case codes.InvalidArgument:
		// The state is not what was read a moment ago: somebody was first.
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
		what = fmt.Sprintf("the %s authority is done, the %s authority may not be; run keysetctl %s again to finish: %s", done, kind, again, what)
	}
	if unknown {
		return fmt.Errorf("%s: %w: %w", what, runbook.ErrOutcomeUnknown, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}
