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

// ErrNoReports means that the server does not accept reports: it is not renewd's
// own server, or it is older.
var ErrNoReports = errors.New("the server accepts no reports")

// Report says how far this node's renewals are for each X.509 authority that is
// tainted, or was removed while the node still used it.
type Report struct {
	Sequence    uint64  // of the bundle in force
	Rate        float64 // limit of taint renewals a second
	Hostname    string  // of the node, at most 255 characters
	Authorities []AuthorityReport
}

// AuthorityReport is the part of a [Report] about one authority.
type AuthorityReport struct {
	ID               string
	Tainted          bool // false: removed
	Pending, Streams int  // SVIDs to replace; workloads that have not read the replacement
	Settled          bool // nothing on the node depends on the authority
	BeginsAt         time.Time
}

// Report sends a report to the server. It fails with [ErrNoReports] when the
// server accepts none.
func (c *Client) Report(ctx context.Context, r Report) error {
	req := &api.ReportRequest{BundleSequence: r.Sequence, TaintRate: r.Rate, Process: []byte(c.cfg.Process), Number: c.reports.Add(1), Hostname: r.Hostname}
	for _, a := range r.Authorities {
		p := &api.AuthorityReport{
			AuthorityId: a.ID, Tainted: a.Tainted, Pending: int64(a.Pending), Streams: int64(a.Streams), Settled: a.Settled,
		}
		if !a.BeginsAt.IsZero() {
			p.BeginsAt = timestamppb.New(a.BeginsAt)
		}
		req.Authorities = append(req.Authorities, p)
	}
	err := c.call(ctx, "report", pollTimeout, needIdentity, func(ctx context.Context, l *link) error {
		_, err := api.NewFleetClient(l.conn).Report(api.WithSentAt(ctx, time.Now()), req)
		return err
	})
	if status.Code(err) == codes.Unimplemented {
		return ErrNoReports
	}
	return err
}
