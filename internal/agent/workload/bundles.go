package workload

import (
	"slices"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/renewd/renewd/bundle"
)

const (
	x509Bundles = 2 // X509BundlesResponse.bundles
	jwtBundles  = 1 // JWTBundlesResponse.bundles
)

// FetchX509Bundles streams the X.509 bundles, as DER, of the agent's trust domain
// and of those that the caller's entries federate with.
func (s *service) FetchX509Bundles(_ *workloadpb.X509BundlesRequest, stream grpc.ServerStreamingServer[workloadpb.X509BundlesResponse]) error {
	return s.streamBundles("FetchX509Bundles", stream, x509Bundles, (*bundle.Bundle).X509DER)
}

// FetchJWTBundles streams the JWT bundles, as JWK sets, of the same trust domains.
func (s *service) FetchJWTBundles(_ *workloadpb.JWTBundlesRequest, stream grpc.ServerStreamingServer[workloadpb.JWTBundlesResponse]) error {
	return s.streamBundles("FetchJWTBundles", stream, jwtBundles, (*bundle.Bundle).JWKS)
}

func (s *service) streamBundles(method string, stream grpc.ServerStream, field protowire.Number, form func(*bundle.Bundle) []byte) error {
	c, err := s.admitCall(stream.Context())
	if err != nil {
		return err
	}
	defer c.release()
	s.cfg.Observer.StreamOpened(method)
	defer s.cfg.Observer.StreamClosed(method)
	watch := s.cfg.Cache.Watch()
	defer watch.Close()

	opened := time.Now()
	var last []encodedBundle
	return s.follow(stream.Context(), c, outcome{}, watch.C(), func() (outcome, error) {
		if _, err := s.reattest(stream.Context(), c); err != nil {
			return outcome{}, err
		}
		v := s.cfg.Cache.Match(c.selectors)
		if err := c.authorize(&v); err != nil {
			return outcome{}, err
		}
		if left := bundleGrace - time.Since(opened); v.BundlesPending && last == nil && left > 0 {
			return outcome{after: left}, nil
		}
		own := encodedBundle{v.Bundle.Own.TrustDomain(), form(v.Bundle.Own)}
		next := slices.Insert(federatedBundles(&v, form), 0, own)
		if last != nil && equalBundles(next, last) {
			return outcome{}, nil
		}
		if c.peer.Alive() != nil {
			return outcome{}, errGone
		}
		if err := stream.SendMsg(encodedMessage{encodeBundles(field, next)}); err != nil {
			return outcome{}, err
		}
		last = next
		return outcome{sent: true}, nil
	})
}
