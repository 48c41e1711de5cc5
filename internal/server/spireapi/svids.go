package spireapi

import (
	"cmp"
	"context"
	"errors"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/ledger"
)

type svidService struct {
	svidv1.UnimplementedSVIDServer
	s *Server
}

// signed is the outcome of one item of a batch.
type signed struct {
	svid *types.X509SVID
	err  error
	took time.Duration
}

// BatchNewX509SVID answers each item in order, with its own status. The SVIDs are
// recorded together: if that fails, so does the call.
func (v *svidService) BatchNewX509SVID(ctx context.Context, req *svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error) {
	agent, err := callingAgent(ctx)
	if err != nil {
		return nil, err
	}
	switch n := len(req.GetParams()); {
	case n == 0:
		return nil, status.Error(codes.InvalidArgument, "missing parameters")
	case n > maxBatch:
		return nil, status.Errorf(codes.ResourceExhausted, "batch of %d SVIDs: ask for at most %d", n, maxBatch)
	}
	end := v.s.ledger.Begin()
	defer end()
	items := make([]signed, 0, len(req.GetParams()))
	rows := make([]ledger.Row, 0, len(req.GetParams()))
	for _, p := range req.GetParams() {
		// The caller has left: do not sign the rest.
		if ctx.Err() != nil {
			err = status.FromContextError(ctx.Err()).Err()
			break
		}
		begin := v.s.now()
		svid, r, err := v.x509(agent, p)
		items = append(items, signed{svid, err, v.s.now().Sub(begin)})
		if err == nil {
			rows = append(rows, r)
		}
	}
	begin := v.s.now()
	if err == nil && len(rows) > 0 {
		if err = v.s.ledger.RecordX509(ctx, rows...); err != nil {
			err = v.s.recordError(ctx, err)
		}
	}
	recording := v.s.now().Sub(begin)
	resp := &svidv1.BatchNewX509SVIDResponse{Results: make([]*svidv1.BatchNewX509SVIDResponse_Result, len(items))}
	for i, item := range items {
		if item.err == nil {
			item.err, item.took = err, item.took+recording
		}
		st := status.Convert(item.err)
		v.s.observer.Minted("x509", st.Code(), item.took)
		resp.Results[i] = &svidv1.BatchNewX509SVIDResponse_Result{
			Status: &types.Status{Code: int32(st.Code()), Message: st.Message()}, Svid: item.svid,
		}
	}
	if err != nil {
		return nil, err
	}
	return resp, nil
}

func (v *svidService) x509(agent *Agent, p *svidv1.NewX509SVIDParams) (*types.X509SVID, ledger.Row, error) {
	refused := func(err error) (*types.X509SVID, ledger.Row, error) { return nil, ledger.Row{}, err }
	switch {
	case p.GetEntryId() == "":
		return refused(status.Error(codes.InvalidArgument, "missing entry ID"))
	case len(p.GetCsr()) == 0:
		return refused(status.Error(codes.InvalidArgument, "missing CSR"))
	}
	entry := v.s.EntrySet().find(agent, p.GetEntryId())
	if entry == nil {
		return refused(status.Error(codes.NotFound, "entry not found or not authorized"))
	}
	key, err := keyset.ParseCSR(p.GetCsr())
	if err != nil {
		return refused(status.Error(codes.InvalidArgument, err.Error()))
	}
	svid, err := v.s.keysets.SignX509(entry.SPIFFEID, key, cmp.Or(entry.X509TTL, v.s.config.X509TTL), entry.DNSNames...)
	if err != nil {
		return refused(v.s.internalError("sign X.509-SVID", err))
	}
	out := protoX509(svid)
	out.Hint = entry.Hint
	return out, ledgerRow(svid, agent.ID, entry.ID), nil
}

// ledgerRow returns the ledger's row for an SVID.
func ledgerRow(v keyset.X509SVID, agent spiffeid.ID, entryID string) ledger.Row {
	return ledger.Row{Authority: v.Authority, Agent: agent.String(), Entry: entryID, NotAfter: v.NotAfter}
}

func (v *svidService) NewJWTSVID(ctx context.Context, req *svidv1.NewJWTSVIDRequest) (*svidv1.NewJWTSVIDResponse, error) {
	agent, err := callingAgent(ctx)
	if err != nil {
		return nil, err
	}
	begin := v.s.now()
	end := v.s.ledger.Begin()
	defer end()
	svid, err := v.jwt(ctx, agent, req)
	v.s.observer.Minted("jwt", status.Code(err), v.s.now().Sub(begin))
	if err != nil {
		return nil, err
	}
	return &svidv1.NewJWTSVIDResponse{Svid: svid}, nil
}

func (v *svidService) jwt(ctx context.Context, agent *Agent, req *svidv1.NewJWTSVIDRequest) (*types.JWTSVID, error) {
	entry := v.s.EntrySet().find(agent, req.GetEntryId())
	if entry == nil {
		return nil, status.Error(codes.NotFound, "entry not found or not authorized")
	}
	ttl := cmp.Or[time.Duration](entry.JWTTTL, v.s.config.JWTTTL)
	sign := v.s.keysets.SignJWT
	if entry.JWTSVIDIncludeJTI {
		sign = v.s.keysets.SignJWTWithID
	}
	svid, err := sign(entry.SPIFFEID, req.GetAudience(), ttl)
	switch {
	case errors.Is(err, keyset.ErrSignNoAudience):
		return nil, status.Error(codes.InvalidArgument, "at least one audience is required")
	case errors.Is(err, keyset.ErrSignLongAudience):
		return nil, status.Error(codes.InvalidArgument, err.Error())
	case err != nil:
		return nil, v.s.internalError("sign JWT-SVID", err)
	}
	if err := v.s.ledger.RecordJWT(ctx, svid.KeyID, svid.ExpiresAt); err != nil {
		return nil, v.s.recordError(ctx, err)
	}
	return &types.JWTSVID{
		Token: svid.Token, Id: protoID(svid.ID), Hint: entry.Hint,
		IssuedAt: svid.IssuedAt.Unix(), ExpiresAt: svid.ExpiresAt.Unix(),
	}, nil
}
