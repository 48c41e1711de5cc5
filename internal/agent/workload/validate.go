package workload

import (
	"context"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
)

// ValidateJWTSVID validates a JWT-SVID against the bundles that the caller may see
// (SPIFFE Workload API, section 6.2.3).
func (s *service) ValidateJWTSVID(ctx context.Context, req *workloadpb.ValidateJWTSVIDRequest) (*workloadpb.ValidateJWTSVIDResponse, error) {
	c, err := s.admitCall(ctx)
	if err != nil {
		return nil, err
	}
	defer c.release()
	switch {
	case req.Audience == "":
		return nil, status.Error(codes.InvalidArgument, "audience missing")
	case req.Svid == "":
		return nil, status.Error(codes.InvalidArgument, "svid missing")
	}
	v := s.cfg.Cache.Match(c.selectors)
	if err := c.authorize(&v); err != nil {
		return nil, err
	}
	svid, err := jwtsvid.ParseAndValidate(req.Svid, newKeySource(&v), []string{req.Audience})
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	claims, err := structpb.NewStruct(svid.Claims)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "claims: %v", err)
	}
	return &workloadpb.ValidateJWTSVIDResponse{SpiffeId: svid.ID.String(), Claims: claims}, nil
}

// keySource is a jwtbundle.Source over some bundles.
type keySource []*bundle.Bundle

// newKeySource returns the bundles that a caller may see: the agent's trust domain
// and those that the caller's entries federate with.
func newKeySource(v *cache.View) keySource {
	k := keySource{v.Bundle.Own}
	for _, e := range v.Entries {
		for _, td := range e.FederatesWith {
			if b := v.Bundle.Federated[td]; b != nil && !slices.Contains(k, b) {
				k = append(k, b)
			}
		}
	}
	return k
}

// GetJWTBundleForTrustDomain implements jwtbundle.Source.
func (k keySource) GetJWTBundleForTrustDomain(td spiffeid.TrustDomain) (*jwtbundle.Bundle, error) {
	at := slices.IndexFunc(k, func(b *bundle.Bundle) bool { return b.TrustDomain() == td })
	if at < 0 {
		return nil, fmt.Errorf("no bundle of trust domain %q", td.Name())
	}
	out := jwtbundle.New(td)
	for _, key := range k[at].JWT() {
		if err := out.AddJWTAuthority(key.KeyID, key.PublicKey); err != nil {
			return nil, err
		}
	}
	return out, nil
}
