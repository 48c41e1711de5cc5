package upstream

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/renewd/renewd/internal/api"
)

// ErrNoReports says that the server does not take reports: it is not one of
// renewd's own.
var ErrNoReports = errors.New("the server takes no reports")

// Report is what the agent has to do with the X.509 authorities that are
// tainted, or removed while something held was signed by them.
type Report struct {
	Sequence    uint64  // of the bundle in force
	Rate        float64 // taint renewals a second at most
	Authorities []AuthorityReport
}

// AuthorityReport is a [Report]'s part about one authority.
type AuthorityReport struct {
	ID               string
	Tainted          bool // false: removed
	Pending, Streams int  // SVIDs to be replaced; workloads that have not read the replacement
	Settled          bool // nothing on the node depends on it any more
	BeginsAt         time.Time
}

// Report tells the server where this node is in a rotation. It fails with
// [ErrNoReports] at a server that does not want to know.
func (c *Client) Report(ctx context.Context, r Report) error {
	req := &api.ReportRequest{BundleSequence: r.Sequence, TaintRate: r.Rate, Process: []byte(c.cfg.Process), Number: c.reports.Add(1)}
	for _, a := range r.Authorities {
		p := &api.AuthorityReport{
			AuthorityId: a.ID, Tainted: a.Tainted, Pending: int64(a.Pending), Streams: int64(a.Streams), Settled: a.Settled,
		}
		if !a.BeginsAt.IsZero() {
			p.BeginsAt = timestamppb.New(a.BeginsAt)
		}
		req.Authorities = append(req.Authorities, p)
	}
	err := c.call(ctx, "report", c.cfg.PollTimeout, needIdentity, func(ctx context.Context, l *link) error {
		_, err := api.NewFleetClient(l.conn).Report(api.WithSentAt(ctx, time.Now()), req)
		return err
	})
	if status.Code(err) == codes.Unimplemented {
		return ErrNoReports
	}
	return err
}
