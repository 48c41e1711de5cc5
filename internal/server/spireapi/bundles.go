package spireapi

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/server/keyset"
)

// published is a bundle in the forms that are served and verified against. It is
// made once for each bundle and refresh hint.
type published struct {
	bundle      *keyset.Bundle
	hint        time.Duration
	proto       *types.Bundle
	authorities *x509bundle.Bundle
}

// published returns the published bundle.
func (s *Server) published() *published {
	b, hint := s.config.Published(), time.Duration(s.refreshHint.Load())
	if p := s.rendered.Load(); p != nil && p.bundle == b && p.hint == hint {
		return p
	}
	p := &published{
		bundle: b, hint: hint, proto: protoBundle(s.td, b, hint),
		authorities: x509bundle.FromX509Authorities(s.td, b.Certificates()),
	}
	// If a concurrent call stores an older one last, the next call replaces it.
	s.rendered.Store(p)
	return p
}

// SetFederatedBundle sets the bundle of another trust domain and its refresh hint;
// a nil bundle removes it. It is kept in memory only. Its JWT authorities may have
// no expiry.
func (s *Server) SetFederatedBundle(td spiffeid.TrustDomain, b *keyset.Bundle, hint time.Duration) error {
	switch {
	case td.IsZero():
		return errors.New("set federated bundle: no trust domain")
	case td == s.td:
		return fmt.Errorf("set federated bundle: %q is the server's own trust domain", td.Name())
	}
	s.federatedMu.Lock()
	defer s.federatedMu.Unlock()
	if b == nil {
		delete(s.federated, td)
		return nil
	}
	s.federated[td] = protoBundle(td, b, hint)
	return nil
}

type bundleService struct {
	bundlev1.UnimplementedBundleServer
	s *Server
}

func (b *bundleService) GetBundle(_ context.Context, req *bundlev1.GetBundleRequest) (*types.Bundle, error) {
	return masked(b.s.published().proto, req.GetOutputMask()), nil
}

func (b *bundleService) GetFederatedBundle(_ context.Context, req *bundlev1.GetFederatedBundleRequest) (*types.Bundle, error) {
	td, err := spiffeid.TrustDomainFromString(req.GetTrustDomain())
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "trust domain: %v", err)
	}
	if td == b.s.td {
		return nil, status.Error(codes.InvalidArgument, "this is the server's own trust domain")
	}
	b.s.federatedMu.RLock()
	f := b.s.federated[td]
	b.s.federatedMu.RUnlock()
	if f == nil {
		return nil, status.Errorf(codes.NotFound, "no bundle of %q", td.Name())
	}
	return masked(f, req.GetOutputMask()), nil
}

func protoBundle(td spiffeid.TrustDomain, b *keyset.Bundle, hint time.Duration) *types.Bundle {
	out := &types.Bundle{TrustDomain: td.Name(), RefreshHint: int64(hint / time.Second), SequenceNumber: b.Sequence}
	for _, a := range b.X509 {
		out.X509Authorities = append(out.X509Authorities, &types.X509Certificate{Asn1: a.Certificate.Raw, Tainted: a.Tainted})
	}
	for _, a := range b.JWT {
		key := &types.JWTKey{PublicKey: a.PKIX, KeyId: a.KeyID, Tainted: a.Tainted}
		if !a.ExpiresAt.IsZero() {
			key.ExpiresAt = a.ExpiresAt.Unix()
		}
		out.JwtAuthorities = append(out.JwtAuthorities, key)
	}
	return out
}

// masked returns the fields of a bundle that a mask selects, all when it is nil.
// The result shares the authorities with b.
func masked(b *types.Bundle, mask *types.BundleMask) *types.Bundle {
	all := mask == nil
	out := &types.Bundle{TrustDomain: b.TrustDomain}
	if all || mask.RefreshHint {
		out.RefreshHint = b.RefreshHint
	}
	if all || mask.SequenceNumber {
		out.SequenceNumber = b.SequenceNumber
	}
	if all || mask.X509Authorities {
		out.X509Authorities = b.X509Authorities
	}
	if all || mask.JwtAuthorities {
		out.JwtAuthorities = b.JwtAuthorities
	}
	return out
}
