package server

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

	"github.com/renewd/renewd/internal/keyset"
)

type svidService struct {
	svidv1.UnimplementedSVIDServer
	s *Server
}

// BatchNewX509SVID answers each item in order, with a status of its own.
func (v *svidService) BatchNewX509SVID(ctx context.Context, req *svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error) {
	agent, err := caller(ctx)
	if err != nil {
		return nil, err
	}
	switch n := len(req.GetParams()); {
	case n == 0:
		return nil, status.Error(codes.InvalidArgument, "missing parameters")
	case n > maxBatch:
		return nil, status.Errorf(codes.ResourceExhausted, "%d SVIDs asked for at once: %d at most", n, maxBatch)
	}
	resp := &svidv1.BatchNewX509SVIDResponse{Results: make([]*svidv1.BatchNewX509SVIDResponse_Result, len(req.GetParams()))}
	for i, p := range req.GetParams() {
		// The rest would be signed for nobody.
		if ctx.Err() != nil {
			return nil, status.FromContextError(ctx.Err()).Err()
		}
		begin := v.s.now()
		svid, err := v.x509(agent, p)
		st := status.Convert(err)
		v.s.observer.Minted("x509", st.Code(), v.s.now().Sub(begin))
		resp.Results[i] = &svidv1.BatchNewX509SVIDResponse_Result{
			Status: &types.Status{Code: int32(st.Code()), Message: st.Message()}, Svid: svid,
		}
	}
	return resp, nil
}

func (v *svidService) x509(agent spiffeid.ID, p *svidv1.NewX509SVIDParams) (*types.X509SVID, error) {
	switch {
	case p.GetEntryId() == "":
		return nil, status.Error(codes.InvalidArgument, "missing entry ID")
	case len(p.GetCsr()) == 0:
		return nil, status.Error(codes.InvalidArgument, "missing CSR")
	}
	entry := v.s.entries.Load().find(agent, p.GetEntryId())
	if entry == nil {
		return nil, status.Error(codes.NotFound, "entry not found or not authorized")
	}
	key, err := keyset.ParseCSR(p.GetCsr())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	svid, err := v.s.keysets.SignX509(entry.SPIFFEID, key, cmp.Or(entry.X509TTL, v.s.config.X509TTL))
	if err != nil {
		return nil, v.s.internal("sign X.509-SVID", err)
	}
	out := protoX509(svid)
	out.Hint = entry.Hint
	return out, nil
}

func (v *svidService) NewJWTSVID(ctx context.Context, req *svidv1.NewJWTSVIDRequest) (*svidv1.NewJWTSVIDResponse, error) {
	agent, err := caller(ctx)
	if err != nil {
		return nil, err
	}
	begin := v.s.now()
	svid, err := v.jwt(agent, req)
	v.s.observer.Minted("jwt", status.Code(err), v.s.now().Sub(begin))
	if err != nil {
		return nil, err
	}
	return &svidv1.NewJWTSVIDResponse{Svid: svid}, nil
}

func (v *svidService) jwt(agent spiffeid.ID, req *svidv1.NewJWTSVIDRequest) (*types.JWTSVID, error) {
	entry := v.s.entries.Load().find(agent, req.GetEntryId())
	if entry == nil {
		return nil, status.Error(codes.NotFound, "entry not found or not authorized")
	}
	ttl := cmp.Or[time.Duration](entry.JWTTTL, v.s.config.JWTTTL)
	svid, err := v.s.keysets.SignJWT(entry.SPIFFEID, req.GetAudience(), ttl)
	switch {
	case errors.Is(err, keyset.ErrSignNoAudience):
		return nil, status.Error(codes.InvalidArgument, "at least one audience is required")
	case err != nil:
		return nil, v.s.internal("sign JWT-SVID", err)
	}
	return &types.JWTSVID{
		Token: svid.Token, Id: protoID(svid.ID), Hint: entry.Hint,
		IssuedAt: svid.IssuedAt.Unix(), ExpiresAt: svid.ExpiresAt.Unix(),
	}, nil
}
