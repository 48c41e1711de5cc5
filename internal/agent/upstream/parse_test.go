package upstream

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
)

var example = spiffeid.RequireTrustDomainFromString("example.org")

func testKey() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	return key
}

func testRoot(n int64) []byte {
	key := testKey()
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(n), NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		panic(err)
	}
	return der
}

func testBundle() *types.Bundle {
	pkix := func() []byte {
		der, err := x509.MarshalPKIXPublicKey(testKey().Public())
		if err != nil {
			panic(err)
		}
		return der
	}
	return &types.Bundle{
		TrustDomain: "example.org", SequenceNumber: 7, RefreshHint: 300,
		X509Authorities: []*types.X509Certificate{{Asn1: testRoot(1), Tainted: true}, {Asn1: testRoot(2)}},
		JwtAuthorities: []*types.JWTKey{
			{KeyId: "a", PublicKey: pkix(), ExpiresAt: 2000000000, Tainted: true}, {KeyId: "b", PublicKey: pkix()},
		},
	}
}

func TestParseBundle(t *testing.T) {
	t.Parallel()
	in := testBundle()
	b, err := parseBundle(example, in)
	if err != nil {
		t.Fatal(err)
	}
	x, j := b.X509(), b.JWT()
	if b.Sequence() != 7 || b.RefreshHint() != 5*time.Minute || len(x) != 2 || !x[0].Tainted || x[1].Tainted ||
		len(j) != 2 || !j[0].Tainted || j[1].Tainted || j[0].ExpiresAt.Unix() != 2000000000 || !j[1].ExpiresAt.IsZero() {
		t.Errorf("got %+v, %+v", x, j)
	}
	for name, corrupt := range map[string]func(*types.Bundle){
		"bad DER":          func(b *types.Bundle) { b.X509Authorities[1].Asn1 = []byte("x") },
		"nil authority":    func(b *types.Bundle) { b.X509Authorities[1] = nil },
		"two in one":       func(b *types.Bundle) { b.X509Authorities[1].Asn1 = slices.Concat(testRoot(3), testRoot(4)) },
		"bad JWT key":      func(b *types.Bundle) { b.JwtAuthorities[1].PublicKey = []byte("x") },
		"nil JWT key":      func(b *types.Bundle) { b.JwtAuthorities[1] = nil },
		"no JWT key ID":    func(b *types.Bundle) { b.JwtAuthorities[1].KeyId = "" },
		"JWT key ID twice": func(b *types.Bundle) { b.JwtAuthorities[1].KeyId = "a" },
	} {
		odd := proto.Clone(in).(*types.Bundle)
		corrupt(odd)
		b, err := parseBundle(example, odd)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if len(b.X509())+len(b.JWT()) != 3 || len(b.LeftOut()) != 1 || !b.X509()[0].Tainted || !b.JWT()[0].Tainted {
			t.Errorf("%s: %+v, %+v, left out %v", name, b.X509(), b.JWT(), b.LeftOut())
		}
	}
	for name, corrupt := range map[string]func(*types.Bundle){
		"other domain":    func(b *types.Bundle) { b.TrustDomain = "other.org" },
		"no domain":       func(b *types.Bundle) { b.TrustDomain = "" },
		"no authority":    func(b *types.Bundle) { b.X509Authorities = nil },
		"none of any use": func(b *types.Bundle) { b.X509Authorities = []*types.X509Certificate{{Asn1: []byte("x")}, nil} },
	} {
		bad := proto.Clone(in).(*types.Bundle)
		corrupt(bad)
		if b, err := parseBundle(example, bad); err == nil || b != nil || status.Code(err) != codes.Internal {
			t.Errorf("%s: got %v, %v", name, b, err)
		}
	}
	in.RefreshHint, in.JwtAuthorities[0].ExpiresAt = 1<<62, 1<<62
	if b, err := parseBundle(example, in); err != nil || b.RefreshHint() < 0 || b.JWT()[0].ExpiresAt.Year() != 9999 {
		t.Errorf("huge times: %v, %v", b, err)
	}
}

func TestCode(t *testing.T) {
	t.Parallel()
	for want, err := range map[string]error{
		"OK":               nil,
		"Unavailable":      fmt.Errorf("mint: %w", status.Error(codes.Unavailable, "x")),
		"DeadlineExceeded": fmt.Errorf("mint: %w", context.DeadlineExceeded),
		"Canceled":         context.Canceled,
		"PermissionDenied": fmt.Errorf("mint: %w", ErrBanned),
		"Unauthenticated":  fmt.Errorf("mint: %w", &notAttestedError{errors.New("x")}),
		"Internal":         fmt.Errorf("mint: %w", malformed("x")),
		"Unknown":          errors.New("x"),
	} {
		if got := Code(err); got != want {
			t.Errorf("%v: got %s, want %s", err, got, want)
		}
	}
}

func FuzzBundleAnswer(f *testing.F) {
	seed, err := proto.Marshal(testBundle())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Fuzz(func(t *testing.T, b []byte) {
		var in types.Bundle
		if proto.Unmarshal(b, &in) != nil {
			return
		}
		out, err := parseBundle(example, &in)
		if (out == nil) == (err == nil) {
			t.Fatalf("got %v, %v", out, err)
		}
		if err != nil {
			return
		}
		if out.RefreshHint() < 0 {
			t.Fatalf("refresh hint %v", out.RefreshHint())
		}
		// What is neither there nor left out is lost, and so is a mark.
		for _, a := range in.X509Authorities {
			cert, err := x509.ParseCertificate(a.GetAsn1())
			if err != nil {
				continue
			}
			id := bundle.AuthorityID(cert)
			x, ok := out.X509Authority(id)
			if ok && a.Tainted && !x.Tainted {
				t.Fatalf("the mark of %s is lost", id)
			}
			if !ok && !slices.ContainsFunc(out.LeftOut(), func(l bundle.LeftOut) bool { return l.ID == id }) {
				t.Fatalf("%s is lost", id)
			}
		}
		for _, k := range in.JwtAuthorities {
			j, ok := out.JWTKey(k.GetKeyId())
			if ok && k.Tainted && !j.Tainted {
				t.Fatalf("the mark of %q is lost", k.KeyId)
			}
			if !ok && !slices.ContainsFunc(out.LeftOut(), func(l bundle.LeftOut) bool { return l.ID == k.GetKeyId() }) {
				t.Fatalf("%q is lost", k.GetKeyId())
			}
		}
	})
}

func FuzzMintAnswer(f *testing.F) {
	seed, err := proto.Marshal(&svidv1.BatchNewX509SVIDResponse{Results: []*svidv1.BatchNewX509SVIDResponse_Result{
		{Status: &types.Status{}, Svid: &types.X509SVID{CertChain: [][]byte{{1}}}}, {Status: &types.Status{Code: 5}},
	}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed, 2)
	f.Fuzz(func(t *testing.T, b []byte, n int) {
		var in svidv1.BatchNewX509SVIDResponse
		if proto.Unmarshal(b, &in) != nil || n < 0 {
			return
		}
		out, err := parseSigned(&in, n)
		if err != nil {
			return
		}
		if len(out) != n {
			t.Fatalf("%d of %d", len(out), n)
		}
		for _, s := range out {
			if (s.Err == nil) == (len(s.Chain) == 0) {
				t.Fatalf("got %+v", s)
			}
		}
	})
}

// pagesOf plays a recorded stream.
type pagesOf struct {
	pages []*entryv1.SyncAuthorizedEntriesResponse
}

func (p *pagesOf) Recv() (*entryv1.SyncAuthorizedEntriesResponse, error) {
	if len(p.pages) == 0 {
		return nil, io.EOF
	}
	next := p.pages[0]
	p.pages = p.pages[1:]
	return next, nil
}

// FuzzEntriesAnswer checks that whatever a server sends, the result fits what
// is held: every entry is usable and new or changed, and nothing is both held
// and unheard of.
func FuzzEntriesAnswer(f *testing.F) {
	page := func(m *entryv1.SyncAuthorizedEntriesResponse) []byte {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		return b
	}
	e := func(id string, revision int64) *types.Entry {
		return &types.Entry{
			Id: id, SpiffeId: &types.SPIFFEID{TrustDomain: "example.org", Path: "/" + id}, RevisionNumber: revision,
			Selectors: []*types.Selector{{Type: "unix", Value: "uid:1"}},
		}
	}
	f.Add(page(&entryv1.SyncAuthorizedEntriesResponse{Entries: []*types.Entry{e("a", 1), e("b", 2)}}), []byte{})
	f.Add(page(&entryv1.SyncAuthorizedEntriesResponse{EntryRevisions: []*entryv1.EntryRevision{{Id: "a", RevisionNumber: 2}}}),
		page(&entryv1.SyncAuthorizedEntriesResponse{Entries: []*types.Entry{e("a", 2)}}))
	f.Fuzz(func(t *testing.T, one, two []byte) {
		var first, second entryv1.SyncAuthorizedEntriesResponse
		if proto.Unmarshal(one, &first) != nil || proto.Unmarshal(two, &second) != nil {
			return
		}
		c := &Client{cfg: Config{TrustDomain: example, Log: slog.New(slog.DiscardHandler)}}
		have := map[string]*cache.Entry{"a": {ID: "a", Revision: 1}, "b": {ID: "b", Revision: 1}}
		s := c.newSync(have)
		rest := &pagesOf{[]*entryv1.SyncAuthorizedEntriesResponse{&second}}
		var err error
		if len(first.GetEntryRevisions()) == 0 {
			err = s.pages(rest, &first)
		} else {
			var ask []string
			if ask, _, err = s.revisions(rest, &first); err == nil && len(ask) > 0 {
				err = s.answers(rest, ask)
			}
		}
		if err != nil {
			return
		}
		changes := s.result()
		seen := make(map[string]bool)
		for _, e := range changes.Upsert {
			if e.ID == "" || seen[e.ID] || len(e.Selectors) == 0 || e.SPIFFEID.TrustDomain() != example {
				t.Fatalf("got %+v", e)
			}
			seen[e.ID] = true
		}
		gone := changes.Missing
		for _, e := range changes.Withdrawn {
			gone = append(gone, e.ID)
		}
		for _, id := range gone {
			if _, held := have[id]; !held || seen[id] {
				t.Fatalf("%q is gone, held %v, and of use %v", id, held, seen[id])
			}
		}
	})
}
