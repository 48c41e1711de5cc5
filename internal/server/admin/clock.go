package admin

import (
	"context"
	"fmt"
	"time"

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

// ConfirmClock implements the service. The time is that of the operator's own watch:
// on this machine every command has the clock that is in doubt.
func (s *Service) ConfirmClock(ctx context.Context, req *api.ConfirmClockRequest) (*api.ConfirmClockResponse, error) {
	if err := s.checkTrustDomain(req.GetScope().GetTrustDomain()); err != nil {
		return nil, err
	}
	if req.GetTime() == nil {
		return nil, status.Error(codes.InvalidArgument, "time: is not set: give what another clock shows")
	}
	if err := req.GetTime().CheckValid(); err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "time: %v: give what another clock shows", err)
	}
	at := req.GetTime().AsTime()
	same, err := s.config.ConfirmClock(ctx, at)
	switch {
	case err != nil:
		return nil, fail(fmt.Errorf("confirm the clock: %w", err))
	case !same:
		return nil, status.Errorf(codes.FailedPrecondition,
			"the server's clock shows %s UTC and yours %s UTC, more than %v apart: set the clock of the server's machine, or look at yours again",
			s.now().UTC().Format(time.DateTime), at.Format(time.DateTime), clock.Skew)
	}
	return &api.ConfirmClockResponse{Clock: s.clock()}, nil
}

// clock is what is believed of the server's clock.
func (s *Service) clock() *api.Clock {
	c := s.config.Clock.State()
	out := &api.Clock{Shows: stamp(c.Shows), AtLeast: stamp(c.AtLeast), RotationWaits: c.Waits}
	if c.Doubt != 0 {
		out.Doubt, out.SteadyFor = durationpb.New(c.Doubt), durationpb.New(c.SteadyFor)
	}
	return out
}

// countsLonger is added to what may be in use while the clock is not believed that it is
// over; empty when it is.
func (s *Service) countsLonger() string {
	c := s.config.Clock.State()
	if c.Shows.Sub(c.AtLeast) <= clock.Skew {
		return ""
	}
	return fmt.Sprintf("; the server's clock went ahead to %s UTC and is not believed yet: look at \"server clock show\"", c.Shows.UTC().Format(time.DateTime))
}
