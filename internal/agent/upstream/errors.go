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
)

// ErrBanned says that the server has banned this node. It is final.
var ErrBanned = errors.New("the server has banned this node: delete the agent at the server, then give this node a new proof such as a join token")

// errClosed is what calls get after Close.
var errClosed = errors.New("the client is closed")

// A protocolError is an answer that cannot be right. Nothing of it is used.
type protocolError struct{ text string }

func (e *protocolError) Error() string { return "the server's answer cannot be right: " + e.text }

// GRPCStatus makes it count as Internal, as gRPC's own decoding errors do.
func (e *protocolError) GRPCStatus() *status.Status { return status.New(codes.Internal, e.Error()) }

func malformed(format string, args ...any) error {
	return &protocolError{fmt.Sprintf(format, args...)}
}

// ended turns the end of a stream before its time into an error that says so.
func ended(err error) error {
	if errors.Is(err, io.EOF) {
		return malformed("it ended too early")
	}
	return err
}

// numbers are runs of digits, with what stands between and behind them in
// times, durations and addresses.
var numbers = regexp.MustCompile(`(?:[0-9][0-9.:]*(?:[nµm]?s|[hm])?)+`)

// kind is the text of an error without its numbers. Two failures of one kind
// differ in the time, a port or a count: to log the second one as a warning, too,
// says nothing new.
func kind(err error) string { return numbers.ReplaceAllString(err.Error(), "#") }

// Code is the name of the gRPC status code that err stands for, for use as the
// value of a metric's label: OK, Unavailable, DeadlineExceeded and so on.
func Code(err error) string {
	if errors.Is(err, ErrBanned) {
		return codes.PermissionDenied.String()
	}
	if s, ok := status.FromError(err); ok {
		return s.Code().String()
	}
	return status.FromContextError(err).Code().String()
}

// unproved is why a call was not made: there is no identity to make it with.
type unproved struct{ err error }

func (e *unproved) Error() string { return "the node has to be proved first: " + e.err.Error() }
func (e *unproved) Unwrap() error { return e.err }
func (e *unproved) GRPCStatus() *status.Status {
	return status.New(codes.Unauthenticated, e.Error())
}

// denial is the reason that a server gives with PermissionDenied, UNKNOWN when
// it gives none.
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

// unwelcome reports whether the server lacks the method, or lets no agent call it.
func unwelcome(err error) bool {
	code := status.Code(err)
	return code == codes.Unimplemented || code == codes.PermissionDenied && denial(err) == types.PermissionDeniedDetails_UNKNOWN
}

// wantsProof reports whether the server refused the identity and asks for a
// new proof of the node.
func wantsProof(err error) bool {
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

// timedOut reports whether a call, which had the deadline of ctx, failed because
// of that, and not because its caller gave up or had less time.
func timedOut(err error, ctx, caller context.Context) bool {
	if caller.Err() != nil {
		return false
	}
	// The server knows the deadline, too, and may be the first to say so.
	own, _ := ctx.Deadline()
	if d, ok := caller.Deadline(); ok && !d.After(own) {
		return false
	}
	return errors.Is(err, context.DeadlineExceeded) || status.Code(err) == codes.DeadlineExceeded
}
