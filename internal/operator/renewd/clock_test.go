package renewd_test

import (
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/operator/renewd"
)

// TestClockDoubt checks the description of a clock in doubt.
func TestClockDoubt(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	c := &api.Clock{Shows: timestamppb.New(at), AtLeast: timestamppb.New(at.Add(-96 * time.Hour))}
	for _, row := range []struct {
		doubt time.Duration
		waits bool
		want  string
	}{
		{0, false, ""},
		{
			96 * time.Hour, true, "it shows 2026-01-02 03:04:05 +0000 UTC, 96h0m0s ahead of the time by uptime, and SVIDs that were valid on 2025-12-29 03:04:05 +0000 UTC count as valid; " +
				`automatic rotation waits; set it, or confirm it with "server clock confirm"`,
		},
		{-time.Hour, false, `it shows 2026-01-02 03:04:05 +0000 UTC, and was set back by 1h0m0s; set it, or confirm it with "server clock confirm"`},
	} {
		if c.Doubt, c.RotationWaits = nil, row.waits; row.doubt != 0 {
			c.Doubt = durationpb.New(row.doubt)
		}
		if got := renewd.ClockDoubt(c); got != row.want {
			t.Errorf("%v: %q, want %q", row.doubt, got, row.want)
		}
	}
}
