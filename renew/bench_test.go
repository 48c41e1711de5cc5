package renew

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
)

// These benchmarks show that the cost grows with the number of changes and not with the
// number of SVIDs held. They call the parts of the loop, which itself waits for clocks.

type benchCA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newBenchCA(b *testing.B, name string) benchCA {
	b.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), SubjectKeyId: []byte(name), IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		b.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		b.Fatal(err)
	}
	return benchCA{cert, key}
}

func (ca benchCA) sign(id spiffeid.ID, public crypto.PublicKey) ([]byte, error) {
	return x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), URIs: []*url.URL{id.URL()}, KeyUsage: x509.KeyUsageDigitalSignature,
		NotBefore: time.Now().Add(-10 * time.Second), NotAfter: time.Now().Add(24 * time.Hour),
	}, ca.cert, public, ca.key)
}

// Mint signs each request as an entry of benchEntry.
func (ca benchCA) Mint(_ context.Context, requests []Request) ([]Result, error) {
	out := make([]Result, len(requests))
	for i, r := range requests {
		csr, err := x509.ParseCertificateRequest(r.CSR)
		if err != nil {
			return nil, err
		}
		der, err := ca.sign(spiffeid.RequireFromPath(benchTD, "/"+r.EntryID), csr.PublicKey)
		out[i] = Result{Chain: [][]byte{der}, Err: err}
	}
	return out, nil
}

var benchTD = spiffeid.RequireTrustDomainFromString("example.org")

func benchEntry(i int) *cache.Entry {
	id := fmt.Sprintf("entry-%06d", i)
	return &cache.Entry{ID: id, SPIFFEID: spiffeid.RequireFromPath(benchTD, "/"+id),
		Selectors: []cache.Selector{{Type: "unix", Value: "uid:" + fmt.Sprint(i)}}}
}

func benchSnapshot(b *testing.B, tainted bool, cas ...benchCA) *bundle.Snapshot {
	b.Helper()
	var c bundle.Content
	for i, ca := range cas {
		x := bundle.X509Authority{Certificate: ca.cert}
		if tainted && i == 0 {
			x.Tainted, x.TaintedSince = true, time.Now()
		}
		c.X509 = append(c.X509, x)
	}
	own, err := bundle.New(benchTD, c)
	if err != nil {
		b.Fatal(err)
	}
	return &bundle.Snapshot{Own: own}
}

// holding returns a Renewer over a cache that holds n SVIDs, the first k of
// them signed by few and the rest by many.
func holding(b *testing.B, n, k int, few, many benchCA) *Renewer {
	b.Helper()
	c := cache.New(cache.Config{Limit: n})
	r := New(Config{Cache: c, Minter: many, MaxDelay: time.Minute})
	c.SetBundle(benchSnapshot(b, false, few, many))
	entries := make([]*cache.Entry, n)
	for i := range entries {
		entries[i] = benchEntry(i)
	}
	c.Update(entries, nil)
	for i, e := range entries {
		ca := many
		if i < k {
			ca = few
		}
		if err := c.Put(&cache.SVID{ID: e.SPIFFEID, EntryID: e.ID, Authority: bundle.AuthorityID(ca.cert),
			RenewAt: time.Now().Add(12 * time.Hour), NotAfter: time.Now().Add(24 * time.Hour)}); err != nil {
			b.Fatal(err)
		}
	}
	r.follower = c.Follow()
	r.handleChanges(time.Now())
	return r
}

// A new bundle that changes no authority in use.
func BenchmarkBundleThatChangesNothing(b *testing.B) {
	few, many := newBenchCA(b, "few"), newBenchCA(b, "many")
	base := 0.0
	for _, n := range []int{1_000, 100_000} {
		b.Run(fmt.Sprintf("held=%d", n), func(b *testing.B) {
			r := holding(b, n, 0, few, many)
			snapshots := []*bundle.Snapshot{benchSnapshot(b, false, few, many), benchSnapshot(b, false, few, many)}
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				r.cfg.Cache.SetBundle(snapshots[i%2])
				r.handleChanges(time.Now())
				i++
			}
			report(b, &base)
		})
	}
}

// A taint of the authority of k of n SVIDs: from the new bundle to all of them queued.
func BenchmarkTaint(b *testing.B) {
	few, many := newBenchCA(b, "few"), newBenchCA(b, "many")
	for _, k := range []int{10, 1_000} {
		base := 0.0
		for _, n := range []int{1_000, 10_000, 100_000} {
			b.Run(fmt.Sprintf("touched=%d/held=%d", k, n), func(b *testing.B) {
				r := holding(b, n, k, few, many)
				snapshots := []*bundle.Snapshot{benchSnapshot(b, true, few, many), benchSnapshot(b, false, few, many)}
				i := 0
				for b.Loop() {
					r.cfg.Cache.SetBundle(snapshots[i%2]) // taint and its taking back touch the same
					r.handleChanges(time.Now())
					i++
				}
				report(b, &base)
			})
		}
	}
}

// report gives the time as a multiple of the first benchmark's in its row.
func report(b *testing.B, base *float64) {
	each := float64(b.Elapsed().Nanoseconds()) / float64(b.N)
	if *base == 0 {
		*base = each
	}
	b.ReportMetric(each/(*base), "x-of-first")
}

// One renewal on the agent's side beside its cryptography alone: a key, the signature
// of the CSR and the verification of the answer. Neither has the server's signature.
func BenchmarkRenewal(b *testing.B) {
	ca := newBenchCA(b, "ca")
	entry := benchEntry(1)
	own := benchSnapshot(b, false, ca)
	digest := sha256.Sum256([]byte("message"))
	bare := 0.0
	b.Run("bare cryptography", func(b *testing.B) {
		signature, err := ecdsa.SignASN1(rand.Reader, ca.key, digest[:])
		if err != nil {
			b.Fatal(err)
		}
		for b.Loop() {
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				b.Fatal(err)
			}
			if _, err := ecdsa.SignASN1(rand.Reader, key, digest[:]); err != nil {
				b.Fatal(err)
			}
			if !ecdsa.VerifyASN1(&ca.key.PublicKey, digest[:], signature) {
				b.Fatal("bad signature")
			}
		}
		report(b, &bare)
	})
	b.Run("renewal", func(b *testing.B) {
		c := cache.New(cache.Config{})
		c.SetBundle(own)
		replay := &replay{ca: ca}
		r := New(Config{Cache: c, Minter: replay})
		for b.Loop() {
			attempts := []*attempt{{entry: entry}}
			if err := r.mint(b.Context(), attempts); err != nil {
				b.Fatal(err)
			}
			if attempts[0].err != nil {
				b.Fatal(attempts[0].err)
			}
		}
		each := float64(b.Elapsed().Nanoseconds()-replay.spent.Nanoseconds()) / float64(b.N)
		b.ReportMetric(each, "agent-ns/op")
		b.ReportMetric(each/bare, "x-of-first")
	})
}

// replay signs like benchCA and records how long that took: the server's share.
type replay struct {
	ca    benchCA
	spent time.Duration
}

func (p *replay) Mint(ctx context.Context, requests []Request) ([]Result, error) {
	start := time.Now()
	defer func() { p.spent += time.Since(start) }()
	return p.ca.Mint(ctx, requests)
}
