package upstream_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/renewd/renewd/internal/agent/upstream"
	"github.com/renewd/renewd/internal/api"
)

// fleet takes reports.
type fleet struct {
	api.UnimplementedFleetServer
	last   *api.ReportRequest
	sentAt []string
}

func (f *fleet) Report(ctx context.Context, r *api.ReportRequest) (*api.ReportResponse, error) {
	f.last, f.sentAt = r, metadata.ValueFromIncomingContext(ctx, "renewd-sent-at")
	return &api.ReportResponse{}, nil
}

func TestReport(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, s *server, a *agent) {
		begins := time.Now().Add(time.Minute)
		report := upstream.Report{Sequence: 7, Rate: 20, Hostname: "node-1", Authorities: []upstream.AuthorityReport{
			{ID: "aa", Tainted: true, Pending: 3, Streams: 2, BeginsAt: begins},
			{ID: "bb", Tainted: true, Settled: true},
			{ID: "cc", Pending: 1},
		}}
		if err := a.Report(t.Context(), report); !errors.Is(err, upstream.ErrNoReports) {
			t.Errorf("to a server that accepts none: %v, want ErrNoReports", err)
		}
		s.stop()
		s.fleet = new(fleet)
		s.start()
		if err := a.Report(t.Context(), report); err != nil {
			t.Fatal(err)
		}
		// The second report of this process: the first, which the server rejected, counts.
		if p, n := s.fleet.last.GetProcess(), s.fleet.last.GetNumber(); string(p) != "p1" || n != 2 {
			t.Errorf("process %q, number %d", p, n)
		}
		s.fleet.last.Process, s.fleet.last.Number = nil, 0
		want := &api.ReportRequest{BundleSequence: 7, TaintRate: 20, Hostname: "node-1", Authorities: []*api.AuthorityReport{
			{AuthorityId: "aa", Tainted: true, Pending: 3, Streams: 2, BeginsAt: timestamppb.New(begins)},
			{AuthorityId: "bb", Tainted: true, Settled: true},
			{AuthorityId: "cc", Pending: 1},
		}}
		if !proto.Equal(s.fleet.last, want) {
			t.Errorf("the server received %v, want %v", s.fleet.last, want)
		}
		if now := time.Now().UTC().Format(time.RFC3339Nano); !slices.Equal(s.fleet.sentAt, []string{now}) {
			t.Errorf("sent at %q by the agent's clock, want %q", s.fleet.sentAt, now)
		}
	})
}
