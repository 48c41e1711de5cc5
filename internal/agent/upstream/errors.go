package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"regexp"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/config"
)

// ErrBanned means that the server has banned this node. Every later call fails
// with it, also after a restart.
var ErrBanned = config.Permanent(errors.New("the server has banned this node: evict the agent at the server, then attest this node again, for example with a new join token"))

// errClosed is the error of calls after Close.
var errClosed = errors.New("the client is closed")

// protocolError is the error for an invalid answer, of which nothing is used.
type protocolError struct{ text string }

func (e *protocolError) Error() string { return "the server's answer is invalid: " + e.text }

// GRPCStatus has code Internal, as gRPC's own decoding errors have.
func (e *protocolError) GRPCStatus() *status.Status { return status.New(codes.Internal, e.Error()) }

func malformed(format string, args ...any) error {
	return &protocolError{fmt.Sprintf(format, args...)}
}

// ended returns err, or a protocolError when err is the early end of a stream.
func ended(err error) error {
	if errors.Is(err, io.EOF) {
		return malformed("it ended too early")
	}
	return err
}

// numbers matches digits with the punctuation and units of times, durations and
// addresses.
var numbers = regexp.MustCompile(`(?:[0-9][0-9.:]*(?:[nµm]?s|[hm])?)+`)

// withoutNumbers is the text of an error without its numbers. Two failures with
// equal texts differ only in a time, a port or a count, so that one warning is
// enough for both.
func withoutNumbers(err error) string { return numbers.ReplaceAllString(err.Error(), "#") }

// Code returns the name of the gRPC status code of err, for use as a metric label:
// OK, Unavailable, DeadlineExceeded and so on.
func Code(err error) string {
	if errors.Is(err, ErrBanned) {
		return codes.PermissionDenied.String()
	}
	if s, ok := status.FromError(err); ok {
		return s.Code().String()
	}
	return status.FromContextError(err).Code().String()
}

// notAttestedError is why a call was not made: there is no usable identity.
type notAttestedError struct{ err error }

func (e *notAttestedError) Error() string { return "the node is not attested: " + e.err.Error() }
func (e *notAttestedError) Unwrap() error { return e.err }
func (e *notAttestedError) GRPCStatus() *status.Status {
	return status.New(codes.Unauthenticated, e.Error())
}

// denial returns the reason in the details of PermissionDenied, UNKNOWN when there
// is none.
func denial(err error) types.PermissionDeniedDetails_Reason {
	s, ok := status.FromError(err)
	if !ok || s.Code() != codes.PermissionDenied {
		return types.PermissionDeniedDetails_UNKNOWN
	}
	for _, d := range s.Details() {
		if d, ok := d.(*types.PermissionDeniedDetails); ok {
			return d.GetReason()
		}
	}
	return types.PermissionDeniedDetails_UNKNOWN
}

// notOffered reports whether the server lacks the method or denies it to all agents.
func notOffered(err error) bool {
	code := status.Code(err)
	return code == codes.Unimplemented || code == codes.PermissionDenied && denial(err) == types.PermissionDeniedDetails_UNKNOWN
}

// wantsAttestation reports whether the server refused the identity and requires
// re-attestation.
func wantsAttestation(err error) bool {
	switch denial(err) {
	case types.PermissionDeniedDetails_AGENT_EXPIRED,
		types.PermissionDeniedDetails_AGENT_NOT_ACTIVE,
		types.PermissionDeniedDetails_AGENT_NOT_ATTESTED,
		types.PermissionDeniedDetails_AGENT_MUST_REATTEST:
		return true
	}
	return false
}

func banned(err error) bool { return denial(err) == types.PermissionDeniedDetails_AGENT_BANNED }

// timedOut reports whether a call failed because of the deadline of ctx, and not
// because its caller gave up or had an earlier deadline.
func timedOut(err error, ctx, caller context.Context) bool {
	if caller.Err() != nil {
		return false
	}
	// The server knows the deadline, too, and may report it first.
	deadline, _ := ctx.Deadline()
	if d, ok := caller.Deadline(); ok && !d.After(deadline) {
		return false
	}
	return errors.Is(err, context.DeadlineExceeded) || status.Code(err) == codes.DeadlineExceeded
}
