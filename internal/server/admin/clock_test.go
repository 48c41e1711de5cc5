package admin_test

import (
	"fmt"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/operator/renewd"
	"github.com/renewd/renewd/test/listentest"
)

// TestOperatorsTimeIsSent: each call from another machine sends its time; one from this
// machine does not.
func TestOperatorsTimeIsSent(t *testing.T) {
	t.Parallel()
	for name, wrap := range map[string]func(net.Listener) net.Listener{
		"another machine": func(l net.Listener) net.Listener { return listentest.From(l, listentest.Elsewhere) },
		"this machine":    func(l net.Listener) net.Listener { return l },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				var received []string
				w.received = func(actor string, sentAt time.Time) {
					received = append(received, fmt.Sprint(actor, " ", time.Since(sentAt)))
				}
				r := w.serve(t, bufconn.Listen(1<<20), wrap)
				_, err := r.as(t, w, viewer).ListKeysets(t.Context(), &api.ListKeysetsRequest{})
				check(t, err)
				_, err = r.as(t, w, boss).PrepareKeyset(t.Context(), &api.PrepareKeysetRequest{})
				check(t, err)
				want := "[" + viewer.String() + " 0s " + boss.String() + " 0s]"
				if name == "this machine" {
					want = "[]"
				}
				if got := fmt.Sprint(received); got != want {
					t.Errorf("received %s, want %s", got, want)
				}
			})
		})
	}
}

// TestConfirmClockRefuses: the time must be valid and near the server's.
func TestConfirmClockRefuses(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, _ *world, _ *remote, c *renewd.Client) {
		for _, row := range []struct {
			req  *api.ConfirmClockRequest
			code codes.Code
			text string
		}{
			{&api.ConfirmClockRequest{}, codes.InvalidArgument, "time: is not set: give the time of another clock"},
			{&api.ConfirmClockRequest{Time: &timestamppb.Timestamp{Nanos: -1}}, codes.InvalidArgument, "time: proto"},
			{
				&api.ConfirmClockRequest{Time: timestamppb.New(time.Now().Add(6 * time.Minute))}, codes.FailedPrecondition,
				"the server's clock shows 2000-01-01 00:00:00 +0000 UTC and yours 2000-01-01 00:06:00 +0000 UTC, more than 5m0s apart: set the clock of the server's machine, or check yours",
			},
			{&api.ConfirmClockRequest{Time: timestamppb.Now(), Scope: &api.Scope{TrustDomain: "other.org"}}, codes.NotFound, "this is the server of trust domain"},
			{&api.ConfirmClockRequest{Time: timestamppb.New(time.Now().Add(5 * time.Minute))}, codes.OK, ""},
		} {
			_, err := c.ConfirmClock(t.Context(), row.req)
			if st := status.Convert(err); st.Code() != row.code || len(st.Message()) < len(row.text) || st.Message()[:len(row.text)] != row.text {
				t.Errorf("%v: %v", row.req, err)
			}
		}
	})
}
