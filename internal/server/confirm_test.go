package server_test

import (
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/server/rotation"
)

// TestConfirmClock: after an outage of a week the clock, which is right, is in doubt. The
// server shows that even if automatic rotation is off. An operator confirms the clock; the
// audit log names the operator, and the confirmation survives a restart.
func TestConfirmClock(t *testing.T) {
	t.Parallel()
	c := newConfig(t, "east", "west")
	c.OperatorAddress, c.EndpointAddress = "", ""
	r := run(t, c)
	r.stop()

	c.Now = shifted(7 * day)
	r = run(t, c)
	shown := func(want bool) {
		t.Helper()
		s, err := r.api.Backend("", "east").Status(t.Context())
		check(t, err)
		if (s.ClockDoubt != "") != want || s.Automatic != "" {
			t.Errorf("list shows %q and %q", s.ClockDoubt, s.Automatic)
		}
		resp, err := r.api.GetClock(t.Context(), &api.GetClockRequest{})
		check(t, err)
		if at := resp.GetClock(); (at.GetDoubt() != nil) != want || at.GetRotationWaits() != want ||
			at.GetShows().AsTime().Sub(at.GetAtLeast().AsTime()) > time.Minute != want {
			t.Errorf("the clock is %v", at)
		}
	}
	shown(true)
	_, err := r.api.ConfirmClock(t.Context(), &api.ConfirmClockRequest{Time: timestamppb.Now()})
	if st := status.Convert(err); st.Code() != codes.FailedPrecondition || !strings.Contains(st.Message(), "set the clock of the server's machine") {
		t.Errorf("confirmed with another time: %v", err)
	}
	shown(true)
	_, err = r.api.ConfirmClock(t.Context(), &api.ConfirmClockRequest{Time: timestamppb.New(c.Now())})
	check(t, err)
	shown(false)
	for _, name := range []string{"east", "west"} {
		resp, err := r.api.ReadAudit(t.Context(), &api.ReadAuditRequest{Scope: scope(name)})
		check(t, err)
		all := resp.GetRecords()
		last := all[len(all)-1]
		if len(all) != 2 || last.GetOperation() != "confirm clock" || !strings.HasPrefix(last.GetActor(), "unix:uid:") || !strings.HasPrefix(last.GetNote(), "another clock showed ") {
			t.Errorf("audit log of %s: %v", name, all)
		}
	}
	r.stop()
	r = run(t, c)
	shown(false)
}

// TestBehindWhenTheClockSteps: automatic rotation waits for an agent that has not applied
// the trust bundle, although its SVID has expired by a clock that is two days ahead.
func TestBehindWhenTheClockSteps(t *testing.T) {
	t.Parallel()
	c := newConfig(t, "default")
	c.OperatorAddress, c.EndpointAddress = "", ""
	c.Rotation = rotation.Policy{Mode: rotation.Paused, PreparationThreshold: 45 * day, ActivationThreshold: time.Second}
	c.Now = shifted(-46 * day)
	r := run(t, c)
	r.stop()

	base := time.Now()
	var off, up atomic.Int64
	c.Now = func() time.Time { return base.Add(time.Duration(up.Load() + off.Load())) }
	c.Uptime = func() time.Duration { return time.Duration(up.Load()) }
	r = run(t, c)
	ctx := t.Context()
	_, err := r.api.ConfirmClock(ctx, &api.ConfirmClockRequest{Time: timestamppb.New(base)})
	check(t, err)
	_, err = r.join("default").Report(ctx, &api.ReportRequest{BundleSequence: 1})
	check(t, err)
	_, err = r.api.PrepareKeyset(ctx, &api.PrepareKeysetRequest{Scope: scope("default")})
	check(t, err)
	waits := func() string { return r.Automatic("default").WaitsFor }
	up.Add(int64(2 * time.Second))
	const want = "1 agent that has not applied the trust bundle"
	if got := waits(); got != want {
		t.Errorf("waits for %q, want %q", got, want)
	}
	off.Store(int64(2 * day))
	if got := waits(); got != want {
		t.Errorf("two days ahead: waits for %q, want %q", got, want)
	}
	if f, err := r.Figures(ctx, "default"); err != nil || f.Agents != 1 || f.AgentsBehind != 1 {
		t.Errorf("two days ahead: %d of %d agents are behind, %v", f.AgentsBehind, f.Agents, err)
	}
}
