package renewd

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/clock"
)

// sendTime sends the client's time with each call.
func sendTime(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	return invoke(api.WithSentAt(ctx, time.Now()), method, req, reply, conn, opts...)
}

// ClockDoubt describes a server's clock that is in doubt: the reason, the consequence and
// the remedy. It is empty if the clock is not in doubt.
func ClockDoubt(c *api.Clock) string {
	if c.GetDoubt() == nil {
		return ""
	}
	text := fmt.Sprintf("it shows %s, ", clock.Text(fromProtoTime(c.GetShows())))
	if by := c.GetDoubt().AsDuration(); by > 0 {
		text += fmt.Sprintf("%v ahead of the time by uptime, and SVIDs that were valid on %s count as valid", by.Round(time.Minute), clock.Text(fromProtoTime(c.GetAtLeast())))
	} else {
		text += fmt.Sprintf("and was set back by %v", -by.Round(time.Minute))
	}
	if c.GetRotationWaits() {
		text += "; automatic rotation waits"
	}
	return text + "; set it, or confirm it with \"server clock confirm\""
}
