package upstream_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/test/bufconn"

	"github.com/renewd/renewd/internal/agent/bootstrap"
	"github.com/renewd/renewd/internal/agent/node"
	"github.com/renewd/renewd/internal/agent/upstream"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/ledger"
	embedded "github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/test/memory"
)

// newEmbedded returns a server that keeps everything in memory.
func newEmbedded(t *testing.T) *embedded.Server {
	t.Helper()
	return must(embedded.New(embedded.Config{
		TrustDomain: td, Storage: memory.NewServer(),
		Keysets: must(keyset.Open(t.Context(), keyset.Config{TrustDomain: td, Storage: new(memory.Keysets)})),
		Ledger:  must(ledger.Open(t.Context(), ledger.Config{Storage: memory.Ledger{}})),
	}))
}

// A node with the embedded server: bootstrap from a file, attestation, entries,
// mints, a rotation with a renewal of the agent SVID, eviction, ban.
func TestNodeLifecycleWithTheEmbeddedServer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		s := newEmbedded(t)
		lis := bufconn.Listen(1 << 16)
		served := make(chan error, 1)
		go func() { served <- s.Serve(ctx, lis) }()
		defer func() {
			cancel()
			if err := <-served; err != nil {
				t.Errorf("serve: %v", err)
			}
		}()
		dir := t.TempDir()
		file := filepath.Join(dir, "bundle.pem")
		if err := os.WriteFile(file, s.BundlePEM(), 0o600); err != nil {
			t.Fatal(err)
		}
		token := filepath.Join(dir, "token")
		give := func() {
			if err := os.WriteFile(token, []byte(must(s.CreateJoinToken(ctx, time.Hour, "")).Value), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		give()

		a := &agent{}
		a.trust.Store(must(bootstrap.File{Path: file, TrustDomain: td}.Fetch(t.Context(), bootstrap.Request{})))
		a.store = must(node.OpenStore(filepath.Join(dir, "data"), nil))
		a.node = must(node.New(node.Config{TrustDomain: td, Attestor: node.JoinToken("", token), Store: a.store, Bundle: a.trust.Load}))
		a.Client = must(upstream.New(upstream.Config{
			TrustDomain: td, Node: a.node, Bundle: a.trust.Load, Version: "1.0",
			Dial: func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) },
		}))
		defer a.close(t)
		if err := a.Attest(ctx); err != nil {
			t.Fatal(err)
		}
		if err := a.PostStatus(ctx, 1); err != nil {
			t.Error(err)
		}

		list := make([]embedded.Entry, 700)
		for i := range list {
			e := entry(i)
			list[i] = embedded.Entry{
				ID: e.Id, SPIFFEID: spiffeid.RequireFromPath(td, e.SpiffeId.Path),
				Selectors: []embedded.Selector{{Type: "unix", Value: e.Selectors[0].Value}},
			}
		}
		if _, err := s.ApplyEntries(ctx, list, false); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second) // a server may take a while to notice
		h := holder{}
		if up, _ := h.sync(t, a); len(up) != 700 {
			t.Errorf("%d entries", len(up))
		}
		if err := s.DeleteEntry(ctx, entry(7).Id); err != nil {
			t.Fatal(err)
		}
		list[9].Hint = "new"
		if _, err := s.UpsertEntry(ctx, list[9]); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		up, gone := h.sync(t, a)
		want(t, "upsert", up, entry(9).Id)
		want(t, "gone", gone, entry(7).Id)

		key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
		csr := must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key))
		signed := must(a.MintX509(ctx, []upstream.CSR{{entry(1).Id, csr}, {"none", csr}, {entry(2).Id, csr}}))
		if signed[0].Err != nil || signed[1].Err == nil || signed[2].Err != nil {
			t.Errorf("minted %v", signed)
		}
		if _, err := a.MintJWT(ctx, entry(1).Id, []string{"x"}); err != nil {
			t.Error(err)
		}

		// Prepare, activate, taint; the new authority signs the agent SVID.
		old := s.Keysets().Active()
		next := must(s.Keysets().Prepare(ctx))
		a.trust.Store(must(a.FetchBundle(ctx)))
		if err := s.Keysets().Activate(ctx, next.ID); err != nil {
			t.Fatal(err)
		}
		if err := s.Keysets().Taint(ctx, old.ID); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		b := must(a.FetchBundle(ctx))
		a.trust.Store(b)
		authority := func() string { return hex.EncodeToString(a.node.Identity().Chain[0].AuthorityKeyId) }
		if x, ok := b.X509Authority(authority()); !ok || !x.Tainted {
			t.Errorf("the agent SVID's authority is %+v, known %v", x, ok)
		}
		if err := a.RenewNode(ctx); err != nil {
			t.Fatal(err)
		}
		if x, ok := b.X509Authority(authority()); !ok || x.Tainted {
			t.Errorf("the renewed SVID's authority is %+v, known %v", x, ok)
		}
		if err := s.Keysets().Remove(ctx, old.ID); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		a.trust.Store(must(a.FetchBundle(ctx)))
		if _, err := a.SyncEntries(ctx, h); err != nil {
			t.Errorf("after the rotation: %v", err)
		}

		// After an eviction the node attests with a new token; after a ban it does not.
		if err := s.EvictAgent(ctx, a.node.Identity().ID(), false); err != nil {
			t.Fatal(err)
		}
		if _, err := a.SyncEntries(ctx, h); err == nil {
			t.Error("an evicted node is served")
		}
		give()
		time.Sleep(6 * time.Second)
		if err := a.PostStatus(ctx, 1); err != nil {
			t.Errorf("after the re-attestation: %v", err)
		}
		if err := s.BanAgent(ctx, a.node.Identity().ID()); err != nil {
			t.Fatal(err)
		}
		if err := a.PostStatus(ctx, 1); !errors.Is(err, upstream.ErrBanned) {
			t.Errorf("got %v", err)
		}
	})
}
