package spireapi_test

import (
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/test/memory"
)

// counts is an observer that counts by type and code.
type counts struct {
	mu sync.Mutex
	by map[string]int
}

func (c *counts) Minted(svidType string, code codes.Code, _ time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.by[fmt.Sprint(svidType, " ", code)]++
}

func (c *counts) Limited(method string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.by["limited "+method]++
}

// limited returns how many calls of a method were limited.
func (c *counts) limited(method string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.by["limited "+method]
}

// total returns how many were counted with a code.
func (c *counts) total(code string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.by["x509 "+code] + c.by["jwt "+code]
}

func TestBatchNewX509SVID(t *testing.T) {
	t.Parallel()
	seen := &counts{by: make(map[string]int)}
	bubble(t, spireapi.Config{Observer: seen, X509TTL: 3 * time.Hour}, func(t *testing.T, s *running) {
		_, c := s.join(t)
		other, _ := s.join(t)
		s.apply(t, []spireapi.Entry{
			entry("plain"),
			entry("short", func(e *spireapi.Entry) { e.X509TTL = time.Hour }),
			entry("named", func(e *spireapi.Entry) { e.DNSNames = []string{"Web.example.org", "*.example.org"} }),
			entry("foreign", func(e *spireapi.Entry) { e.ParentID = other.id }),
		})
		key, _ := newKey(t)
		// Only the key of the CSR is used.
		csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
			Subject: pkix.Name{CommonName: "forged"}, DNSNames: []string{"forged.example.org"}, IPAddresses: []net.IP{net.IPv4(192, 0, 2, 1)},
		}, key)
		if err != nil {
			t.Fatal(err)
		}
		items := []struct {
			entry string
			csr   []byte
			code  codes.Code
			ttl   time.Duration
			names []string
		}{
			{"plain", csr, codes.OK, 3 * time.Hour, nil},
			{"unknown", csr, codes.NotFound, 0, nil},
			{"foreign", csr, codes.NotFound, 0, nil},
			{"plain", []byte("x"), codes.InvalidArgument, 0, nil},
			{"plain", nil, codes.InvalidArgument, 0, nil},
			{"", csr, codes.InvalidArgument, 0, nil},
			{"short", csr, codes.OK, time.Hour, nil},
			{"named", csr, codes.OK, 3 * time.Hour, []string{"web.example.org", "*.example.org"}},
		}
		req := &svidv1.BatchNewX509SVIDRequest{}
		for _, item := range items {
			req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: item.entry, Csr: item.csr})
		}
		resp, err := c.BatchNewX509SVID(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		if len(resp.GetResults()) != len(items) {
			t.Fatalf("%d results", len(resp.GetResults()))
		}
		authorities := x509bundle.FromX509Authorities(td, s.Keysets().Bundle().Certificates())
		for i, item := range items {
			r := resp.GetResults()[i]
			if codes.Code(r.GetStatus().GetCode()) != item.code || (r.GetSvid() != nil) != (item.code == codes.OK) {
				t.Errorf("item %d: %v", i, r)
			}
			if r.GetSvid() == nil {
				continue
			}
			id, _, err := x509svid.ParseAndVerify(r.GetSvid().GetCertChain(), authorities, x509svid.WithTime(time.Now()))
			if err != nil || id.Path() != "/workload/"+item.entry || r.GetSvid().GetId().GetPath() != id.Path() {
				t.Errorf("item %d: %v, %v", i, id, err)
			}
			leaf, err := x509.ParseCertificate(r.GetSvid().GetCertChain()[0])
			if err != nil || !slices.Equal(leaf.DNSNames, item.names) || len(leaf.IPAddresses) > 0 || leaf.Subject.CommonName != strings.Join(item.names[:min(len(item.names), 1)], "") {
				t.Errorf("item %d: DNS names %q, addresses %v, subject %v, %v", i, leaf.DNSNames, leaf.IPAddresses, leaf.Subject, err)
			}
			if got := r.GetSvid().GetExpiresAt(); got != time.Now().Add(item.ttl).Unix() {
				t.Errorf("item %d expires at %d", i, got)
			}
		}
		if got, want := fmt.Sprint(seen.by), "map[x509 InvalidArgument:3 x509 NotFound:2 x509 OK:3]"; got != want {
			t.Errorf("observed %s, want %s", got, want)
		}
	})
}

func TestBatchSize(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		_, c := s.join(t)
		s.apply(t, []spireapi.Entry{entry("a")})
		_, csr := newKey(t)
		batch := func(n int) error {
			params := slices.Repeat([]*svidv1.NewX509SVIDParams{{EntryId: "a", Csr: csr}}, n)
			resp, err := c.BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{Params: params})
			if err == nil && len(resp.GetResults()) != n {
				t.Errorf("%d results for %d", len(resp.GetResults()), n)
			}
			return err
		}
		wantCode(t, batch(0), codes.InvalidArgument)
		wantCode(t, batch(500), codes.OK)
		wantCode(t, batch(501), codes.ResourceExhausted)
	})
}

func TestNewJWTSVID(t *testing.T) {
	t.Parallel()
	seen := &counts{by: make(map[string]int)}
	bubble(t, spireapi.Config{Observer: seen}, func(t *testing.T, s *running) {
		_, c := s.join(t)
		s.apply(t, []spireapi.Entry{
			entry("a", func(e *spireapi.Entry) { e.JWTTTL = 5 * time.Minute }),
			entry("unique", func(e *spireapi.Entry) { e.JWTSVIDIncludeJTI = true }),
		})
		mint := func(id string, audience ...string) (*types.JWTSVID, error) {
			resp, err := c.NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: id, Audience: audience})
			return resp.GetSvid(), err
		}
		svid, err := mint("a", "x", "y")
		if err != nil {
			t.Fatal(err)
		}
		if svid.GetExpiresAt()-svid.GetIssuedAt() != 300 || svid.GetIssuedAt() != time.Now().Unix() {
			t.Errorf("from %d to %d", svid.GetIssuedAt(), svid.GetExpiresAt())
		}
		bundle, err := s.dial(t, nil).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
		if err != nil {
			t.Fatal(err)
		}
		keys := jwtbundle.New(td)
		for _, k := range bundle.GetJwtAuthorities() {
			pub, err := x509.ParsePKIXPublicKey(k.GetPublicKey())
			if err == nil {
				err = keys.AddJWTAuthority(k.GetKeyId(), pub)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		got, err := jwtsvid.ParseAndValidate(svid.GetToken(), keys, []string{"y"})
		if err != nil || got.ID.Path() != "/workload/a" {
			t.Errorf("validated %v, %v", got, err)
		}
		if id, has := got.Claims["jti"]; has {
			t.Errorf("jti %v, which the entry does not ask for", id)
		}
		seen.by = make(map[string]int)
		ids := map[any]bool{}
		for range 2 {
			svid, err := mint("unique", "y")
			if err != nil {
				t.Fatal(err)
			}
			got, err := jwtsvid.ParseAndValidate(svid.GetToken(), keys, []string{"y"})
			if err != nil || got.Claims["jti"] == nil {
				t.Fatalf("validated %v, %v", got, err)
			}
			ids[got.Claims["jti"]] = true
		}
		if len(ids) != 2 {
			t.Errorf("two tokens have the jti %v", ids)
		}
		_, err = mint("a")
		wantCode(t, err, codes.InvalidArgument)
		_, err = mint("a", strings.Repeat("x", 64<<10))
		wantCode(t, err, codes.InvalidArgument)
		_, err = mint("unknown", "x")
		wantCode(t, err, codes.NotFound)
		if got, want := fmt.Sprint(seen.by), "map[jwt InvalidArgument:2 jwt NotFound:1 jwt OK:2]"; got != want {
			t.Errorf("observed %s, want %s", got, want)
		}
	})
}

// TestRotation checks what an agent sees in each of the four steps.
func TestRotation(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{RefreshHint: 5 * time.Minute}, func(t *testing.T, s *running) {
		anyone := s.dial(t, nil)
		var sequence uint64
		look := func(grown bool, want ...bool) {
			t.Helper()
			b, err := anyone.GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
			if err != nil {
				t.Fatal(err)
			}
			var x, j []bool
			for _, a := range b.GetX509Authorities() {
				x = append(x, a.GetTainted())
			}
			for _, a := range b.GetJwtAuthorities() {
				j = append(j, a.GetTainted())
			}
			if !slices.Equal(x, want) || !slices.Equal(j, want) {
				t.Errorf("marks are %v and %v, want %v", x, j, want)
			}
			if (b.GetSequenceNumber() > sequence) != grown || b.GetRefreshHint() != 300 || b.GetTrustDomain() != "example.org" {
				t.Errorf("sequence %d after %d, hint %d, trust domain %q", b.GetSequenceNumber(), sequence, b.GetRefreshHint(), b.GetTrustDomain())
			}
			sequence = b.GetSequenceNumber()
		}
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		keys := s.Keysets()
		old := keys.Active()
		look(true, false)
		next, err := keys.Prepare(t.Context())
		must(err)
		look(true, false, false)
		must(keys.Activate(t.Context(), next.ID))
		look(false, false, false)
		must(keys.Taint(t.Context(), old.ID))
		look(true, true, false)
		must(keys.Remove(t.Context(), old.ID))
		look(true, false)

		masked, err := anyone.GetBundle(t.Context(), &bundlev1.GetBundleRequest{OutputMask: &types.BundleMask{SequenceNumber: true}})
		must(err)
		if masked.GetSequenceNumber() != sequence || masked.GetX509Authorities() != nil || masked.GetJwtAuthorities() != nil || masked.GetRefreshHint() != 0 {
			t.Errorf("masked bundle %v", masked)
		}
	})
}

func TestFederatedBundle(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		_, c := s.join(t)
		get := func(name string) (*types.Bundle, error) {
			return c.GetFederatedBundle(t.Context(), &bundlev1.GetFederatedBundleRequest{TrustDomain: name})
		}
		_, err := get("partner.org")
		wantCode(t, err, codes.NotFound)
		_, err = get("Not A Domain")
		wantCode(t, err, codes.InvalidArgument)
		_, err = get("example.org")
		wantCode(t, err, codes.InvalidArgument)

		theirs, err := keyset.Open(t.Context(), keyset.Config{TrustDomain: partner, Storage: new(memory.Keysets)})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.SetFederatedBundle(partner, theirs.Bundle(), time.Minute); err != nil {
			t.Fatal(err)
		}
		b, err := get("partner.org")
		if err != nil || b.GetTrustDomain() != "partner.org" || b.GetRefreshHint() != 60 || len(b.GetX509Authorities()) != 1 {
			t.Errorf("bundle %v, %v", b, err)
		}
		// A key in a SPIFFE bundle has no expiry.
		endless := *theirs.Bundle()
		endless.JWT = slices.Clone(endless.JWT)
		endless.JWT[0].ExpiresAt = time.Time{}
		if err := s.SetFederatedBundle(partner, &endless, 0); err != nil {
			t.Fatal(err)
		}
		if b, err := get("partner.org"); err != nil || len(b.GetJwtAuthorities()) != 1 || b.GetJwtAuthorities()[0].GetExpiresAt() != 0 {
			t.Errorf("bundle %v, %v", b, err)
		}
		if err := s.SetFederatedBundle(partner, nil, 0); err != nil {
			t.Fatal(err)
		}
		_, err = get("partner.org")
		wantCode(t, err, codes.NotFound)
		for _, wrong := range []spiffeid.TrustDomain{{}, td} {
			if err := s.SetFederatedBundle(wrong, theirs.Bundle(), 0); err == nil {
				t.Errorf("set the bundle of %q", wrong.Name())
			}
		}
		_, err = s.dial(t, nil).GetFederatedBundle(t.Context(), &bundlev1.GetFederatedBundleRequest{TrustDomain: "partner.org"})
		wantCode(t, err, codes.PermissionDenied, notAttested)
	})
}
