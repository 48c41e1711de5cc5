package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/keyset"
)

// federated is another trust domain's bundle.
type federated struct {
	bundle *keyset.Bundle
	hint   time.Duration
}

// SetFederatedBundle sets the bundle of another trust domain, with the refresh
// hint that goes with it; a nil bundle removes it. It is held in memory.
func (s *Server) SetFederatedBundle(td spiffeid.TrustDomain, b *keyset.Bundle, hint time.Duration) error {
	switch {
	case td.IsZero():
		return errors.New("set federated bundle: no trust domain")
	case td == s.td:
		return fmt.Errorf("set federated bundle: %q is the server's own trust domain", td.Name())
	}
	s.federatedM.Lock()
	defer s.federatedM.Unlock()
	if b == nil {
		delete(s.federated, td)
		return nil
	}
	s.federated[td] = federated{bundle: b, hint: hint}
	return nil
}

type bundleService struct {
	bundlev1.UnimplementedBundleServer
	s *Server
}

func (b *bundleService) GetBundle(_ context.Context, req *bundlev1.GetBundleRequest) (*types.Bundle, error) {
	return protoBundle(b.s.td, b.s.keysets.Bundle(), b.s.config.RefreshHint, req.GetOutputMask()), nil
}

func (b *bundleService) GetFederatedBundle(_ context.Context, req *bundlev1.GetFederatedBundleRequest) (*types.Bundle, error) {
	td, err := spiffeid.TrustDomainFromString(req.GetTrustDomain())
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "trust domain: %v", err)
	}
	if td == b.s.td {
		return nil, status.Error(codes.InvalidArgument, "this is the server's own trust domain")
	}
	b.s.federatedM.RLock()
	f, ok := b.s.federated[td]
	b.s.federatedM.RUnlock()
	if !ok {
		return nil, status.Errorf(codes.NotFound, "no bundle of %q", td.Name())
	}
	return protoBundle(td, f.bundle, f.hint, req.GetOutputMask()), nil
}

// protoBundle renders a bundle. A nil mask wants all.
func protoBundle(td spiffeid.TrustDomain, b *keyset.Bundle, hint time.Duration, mask *types.BundleMask) *types.Bundle {
	all := mask == nil
	out := &types.Bundle{TrustDomain: td.Name()}
	if all || mask.RefreshHint {
		out.RefreshHint = int64(hint / time.Second)
	}
	if all || mask.SequenceNumber {
		out.SequenceNumber = b.Sequence
	}
	if all || mask.X509Authorities {
		for _, a := range b.X509 {
			out.X509Authorities = append(out.X509Authorities, &types.X509Certificate{Asn1: a.Certificate.Raw, Tainted: a.Tainted})
		}
	}
	if all || mask.JwtAuthorities {
		for _, a := range b.JWT {
			out.JwtAuthorities = append(out.JwtAuthorities, &types.JWTKey{
				PublicKey: a.PKIX, KeyId: a.KeyID, ExpiresAt: a.ExpiresAt.Unix(), Tainted: a.Tainted,
			})
		}
	}
	return out
}
