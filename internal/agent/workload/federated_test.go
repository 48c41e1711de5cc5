package workload

import (
	"testing"
	"testing/synctest"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
)

// The first answer waits for the federated bundles, but not for long: the server may
// not answer.
func TestFirstAnswerWaitsForFederatedBundles(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*bundle.Snapshot, *bundle.Bundle){
		"found": func(s *bundle.Snapshot, b *bundle.Bundle) {
			s.Federated = map[spiffeid.TrustDomain]*bundle.Bundle{otherTD: b}
		},
		"not found": func(s *bundle.Snapshot, _ *bundle.Bundle) { s.NotFound = map[spiffeid.TrustDomain]bool{otherTD: true} },
		"never":     nil,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s := newSystem(t, nil)
				e := entry("e1", "/one", 1000)
				e.FederatesWith = []spiffeid.TrustDomain{otherTD}
				s.add(e)
				c := s.client(1000)
				svids := fetchX509(t.Context(), c)
				bundles := receive(c.FetchX509Bundles(withHeader(t.Context()), &workloadpb.X509BundlesRequest{}))
				keys := receive(c.FetchJWTBundles(withHeader(t.Context()), &workloadpb.JWTBundlesRequest{}))
				time.Sleep(bundleGrace - time.Second)
				noAnswer(t, svids)
				noAnswer(t, bundles)
				noAnswer(t, keys)
				want := 0
				if change == nil {
					time.Sleep(time.Second)
				} else {
					next := &bundle.Snapshot{Own: bundleOf(t, td, 1, s.ca)}
					change(next, bundleOf(t, otherTD, 1, newAuthority(t, otherTD, "other")))
					want = len(next.Federated)
					s.cache.SetBundle(next)
				}
				x, b, k := one(t, svids), one(t, bundles), one(t, keys)
				if len(x.FederatedBundles) != want || len(b.Bundles) != 1+want || len(k.Bundles) != 1+want {
					t.Errorf("%d, %d and %d bundles, want %d federated ones", len(x.FederatedBundles), len(b.Bundles), len(k.Bundles), want)
				}
			})
		})
	}
}
