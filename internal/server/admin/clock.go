package admin

import (
	"context"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/clock"
)

// GetClock implements the service.
func (s *Service) GetClock(_ context.Context, req *api.GetClockRequest) (*api.GetClockResponse, error) {
	if err := s.checkTrustDomain(req.GetScope().GetTrustDomain()); err != nil {
		return nil, err
	}
	return &api.GetClockResponse{Clock: s.clock()}, nil
}

// ConfirmClock implements the service. The time is that of another clock, because all
// commands on this machine use the clock in doubt.
func (s *Service) ConfirmClock(ctx context.Context, req *api.ConfirmClockRequest) (*api.ConfirmClockResponse, error) {
	if err := s.checkTrustDomain(req.GetScope().GetTrustDomain()); err != nil {
		return nil, err
	}
	if req.GetTime() == nil {
		return nil, status.Error(codes.InvalidArgument, "time: is not set: give the time of another clock")
	}
	if err := req.GetTime().CheckValid(); err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "time: %v: give the time of another clock", err)
	}
	at := req.GetTime().AsTime()
	same, err := s.config.ConfirmClock(ctx, at)
	switch {
	case err != nil:
		return nil, statusError(fmt.Errorf("confirm the clock: %w", err))
	case !same:
		return nil, status.Errorf(codes.FailedPrecondition,
			"the server's clock shows %s and yours %s, more than %v apart: set the clock of the server's machine, or check yours",
			clock.Text(s.now()), clock.Text(at), clock.Skew)
	}
	return &api.ConfirmClockResponse{Clock: s.clock()}, nil
}

// clock returns the state of the server's clock.
func (s *Service) clock() *api.Clock {
	c := s.config.Clock.State()
	out := &api.Clock{Shows: protoTime(c.Shows), AtLeast: protoTime(c.AtLeast), RotationWaits: c.Waits}
	if c.Doubt != 0 {
		out.Doubt, out.SteadyFor = durationpb.New(c.Doubt), durationpb.New(c.SteadyFor)
	}
	return out
}

// clockNote returns a note for an error about SVIDs in use if the clock is ahead and not
// confirmed, because they count for longer then. Otherwise it is empty.
func (s *Service) clockNote() string {
	c := s.config.Clock.State()
	if c.Shows.Sub(c.AtLeast) <= clock.Skew {
		return ""
	}
	return fmt.Sprintf("; the server's clock went ahead to %s and is not confirmed yet: run \"server clock show\"", clock.Text(c.Shows))
}
