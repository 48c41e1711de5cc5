package renewd

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc"

	"github.com/renewd/renewd/internal/api"
)

// sayTime says with each call of a client what its clock shows.
func sayTime(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	return invoke(api.WithSentAt(ctx, time.Now()), method, req, reply, conn, opts...)
}

// ClockDoubt says of a server's clock that is in doubt why, what follows, and what to do;
// empty when it is not.
func ClockDoubt(c *api.Clock) string {
	if c.GetDoubt() == nil {
		return ""
	}
	text := fmt.Sprintf("it shows %s UTC, ", instant(c.GetShows()).Format(time.DateTime))
	if by := c.GetDoubt().AsDuration(); by > 0 {
		text += fmt.Sprintf("%v ahead of what uptime explains, and what was valid on %s UTC counts as valid", by.Round(time.Minute), instant(c.GetAtLeast()).Format(time.DateTime))
	} else {
		text += fmt.Sprintf("and was set back by %v", -by.Round(time.Minute))
	}
	if c.GetRotationWaits() {
		text += "; automatic rotation waits"
	}
	return text + "; set it, or confirm it with \"server clock confirm\""
}
