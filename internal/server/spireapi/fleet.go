package spireapi

import (
	"context"
	"math"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/server/ledger"
)

const (
	// maxAuthorities is the most authorities in one report: far more than are
	// tainted or removed at a time.
	maxAuthorities = 64
	// maxAuthorityID is the most characters in an authority's ID.
	maxAuthorityID = 128
	// maxCount and maxRate are more than any node has. They keep sums over a fleet
	// meaningful whatever an agent reports.
	maxCount = math.MaxInt32
	maxRate  = 1e6
	// maxProcess is the most bytes in the ID of an agent's process.
	maxProcess = 64
	// maxHostname is the most characters in a node's hostname.
	maxHostname = 255
)

type fleetService struct {
	api.UnimplementedFleetServer
	s *Server
}

// Report stores an agent's report on the SVIDs that it holds. The agent is the one
// that its SVID identifies, so an agent can report on itself only.
func (f *fleetService) Report(ctx context.Context, req *api.ReportRequest) (*api.ReportResponse, error) {
	agent, err := callingAgent(ctx)
	if err != nil {
		return nil, err
	}
	id := agent.ID
	if sentAt, ok := api.SentAt(ctx); ok {
		f.s.config.Heard(id.String(), sentAt)
	}
	r, err := checkReport(req)
	if err != nil {
		return nil, err
	}
	if err := f.s.ledger.Report(ctx, id.String(), r); err != nil {
		if ctx.Err() != nil {
			return nil, status.FromContextError(ctx.Err()).Err()
		}
		f.s.log.Error("report not stored", "agent_id", id.String(), "error", err)
		return nil, status.Error(codes.Unavailable, "failed to store the report")
	}
	if name := req.GetHostname(); name != "" && name != agent.Hostname {
		// It is stored, because after a restart of the server the agents that do not
		// report are those that an operator looks for.
		_, err := f.s.storage.UpdateAgent(ctx, id, ifAttested(id, func(a *Agent) { a.Hostname = name }))
		if status.Code(err) == codes.PermissionDenied {
			return nil, err
		}
		if err != nil {
			return nil, f.s.internalError("update agent", err)
		}
	}
	return &api.ReportResponse{}, nil
}

func checkReport(req *api.ReportRequest) (ledger.Report, error) {
	wrong := func(format string, args ...any) (ledger.Report, error) {
		return ledger.Report{}, status.Errorf(codes.InvalidArgument, format, args...)
	}
	rate := req.GetTaintRate()
	switch n := len(req.GetAuthorities()); {
	case math.IsNaN(rate) || rate < 0 || rate > maxRate:
		return wrong("taint_rate: %v is not within 0 to %v", rate, float64(maxRate))
	case n > maxAuthorities:
		return wrong("authorities: has %d elements, more than %d", n, maxAuthorities)
	case utf8.RuneCountInString(req.GetHostname()) > maxHostname:
		return wrong("hostname: is longer than %d characters", maxHostname)
	case len(req.GetProcess()) > maxProcess:
		return wrong("process: is longer than %d bytes", maxProcess)
	}
	r := ledger.Report{Sequence: req.GetBundleSequence(), Rate: rate, Process: string(req.GetProcess()), Number: req.GetNumber()}
	seen := make(map[string]bool, len(req.GetAuthorities()))
	for i, a := range req.GetAuthorities() {
		id := a.GetAuthorityId()
		switch {
		case id == "":
			return wrong("authorities[%d].authority_id: is not set", i)
		case utf8.RuneCountInString(id) > maxAuthorityID:
			return wrong("authorities[%d].authority_id: is longer than %d characters", i, maxAuthorityID)
		case seen[id]:
			return wrong("authorities[%d].authority_id: %q appears twice", i, id)
		case a.GetPending() < 0 || a.GetPending() > maxCount:
			return wrong("authorities[%d].pending: %d is not within 0 to %d", i, a.GetPending(), maxCount)
		case a.GetStreams() < 0 || a.GetStreams() > maxCount:
			return wrong("authorities[%d].streams: %d is not within 0 to %d", i, a.GetStreams(), maxCount)
		}
		seen[id] = true
		out := ledger.AuthorityReport{
			Authority: id, Tainted: a.GetTainted(), Settled: a.GetSettled(),
			Pending: int(a.GetPending()), Streams: int(a.GetStreams()),
		}
		if begins := a.GetBeginsAt(); begins != nil {
			if err := begins.CheckValid(); err != nil {
				return wrong("authorities[%d].begins_at: %v", i, err)
			}
			out.BeginsAt = begins.AsTime()
		}
		r.Authorities = append(r.Authorities, out)
	}
	return r, nil
}
