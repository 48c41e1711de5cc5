package node_test

import (
	"crypto"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/node"
)

func openStore(t *testing.T, dir string) *node.Store {
	t.Helper()
	s, err := node.OpenStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestStoreIsEmptyAtFirst(t *testing.T) {
	t.Parallel()
	s := openStore(t, filepath.Join(t.TempDir(), "a", "b"))
	if id, err := s.LoadIdentity(); id != nil || err != nil {
		t.Errorf("identity: %v, %v", id, err)
	}
	if b, err := s.LoadBundle(); b != nil || err != nil {
		t.Errorf("bundle: %v, %v", b, err)
	}
	if err := s.WipeIdentity(); err != nil {
		t.Errorf("wipe: %v", err)
	}
}

func TestStoreKeepsTheIdentity(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ca := newAuthority(t)
	s := openStore(t, dir)
	srv := &server{ca: ca}
	n := newNode(t, s, node.JoinToken("t", ""), ca, nil)
	if err := n.Attest(t.Context(), serve(t, srv), ca.bundle()); err != nil {
		t.Fatal(err)
	}
	want := n.Identity()
	s.Close()
	s = openStore(t, dir)
	got, err := s.LoadIdentity()
	if err != nil {
		t.Fatal(err)
	}
	if !got.Key.(interface{ Equal(crypto.PrivateKey) bool }).Equal(want.Key) || len(got.Chain) != len(want.Chain) ||
		!got.Chain[0].Equal(want.Chain[0]) || got.Reattestable != want.Reattestable || got.ID() != want.ID() {
		t.Errorf("got %v", got)
	}
	if c := got.TLSCertificate(); len(c.Certificate) != len(want.Chain) || c.PrivateKey == nil {
		t.Errorf("TLS certificate %v", c)
	}
	s.Close()
}

func TestStoreKeepsTheBundleWithItsTaints(t *testing.T) {
	t.Parallel()
	a, b := newAuthority(t), newAuthority(t)
	since := time.Now().Add(-time.Minute).Round(0)
	want, err := bundle.New(td, bundle.Content{
		Sequence: 7, RefreshHint: 5 * time.Minute,
		X509: []bundle.X509Authority{{Certificate: a.cert, Tainted: true, TaintedSince: since}, {Certificate: b.cert}},
		JWT: []bundle.JWTAuthority{
			{KeyID: "a", PublicKey: a.key.Public(), ExpiresAt: time.Unix(2000000000, 0), Tainted: true},
			{KeyID: "b", PublicKey: b.key.Public()},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	s := openStore(t, t.TempDir())
	if err := s.SaveBundle(want); err != nil {
		t.Fatal(err)
	}
	got, err := s.LoadBundle()
	if err != nil {
		t.Fatal(err)
	}
	if !got.Equal(want) {
		t.Errorf("got %+v", got)
	}
	if at := got.X509()[0].TaintedSince; !at.Equal(since) {
		t.Errorf("tainted since %v instead of %v", at, since)
	}
	if !got.X509()[1].TaintedSince.IsZero() {
		t.Error("an authority became tainted")
	}
}

func TestStoreKeepsFederatedBundles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openStore(t, dir)
	if got, err := s.LoadFederated(); len(got) != 0 || err != nil {
		t.Errorf("at first: %v, %v", got, err)
	}
	want := map[spiffeid.TrustDomain]*bundle.Bundle{}
	for _, name := range []string{"b.example", "a.example"} {
		of := spiffeid.RequireTrustDomainFromString(name)
		b, err := bundle.New(of, bundle.Content{
			Sequence: 7,
			X509:     []bundle.X509Authority{{Certificate: newAuthority(t).cert}},
			JWT:      []bundle.JWTAuthority{{KeyID: name, PublicKey: newAuthority(t).key.Public()}},
		})
		if err != nil {
			t.Fatal(err)
		}
		want[of] = b
	}
	if err := s.SaveFederated(want); err != nil {
		t.Fatal(err)
	}
	got, err := s.LoadFederated()
	if err != nil || !maps.EqualFunc(got, want, (*bundle.Bundle).Equal) {
		t.Errorf("got %v, %v", got, err)
	}
	for _, content := range []string{"", "{", "{}", `[{"version":1}]`, `[{"version":2,"trust_domain":"a.example"}]`} {
		damage(t, dir, "federated.json", []byte(content))
		var corrupt *node.CorruptError
		if got, err := s.LoadFederated(); !errors.As(err, &corrupt) || got != nil {
			t.Errorf("%q: %v, %v; want a CorruptError", content, got, err)
		}
	}
}

func TestStoreKeepsWhatWasAdopted(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openStore(t, dir)
	for _, want := range []string{"", "one", "two"} {
		if want != "" {
			if err := s.SaveAdopted(want); err != nil {
				t.Fatal(err)
			}
		}
		s.Close()
		s = openStore(t, dir)
		if got, err := s.LoadAdopted(); got != want || err != nil {
			t.Errorf("got %q, %v; want %q", got, err, want)
		}
	}
}

func TestSeedStays(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openStore(t, dir)
	one, err := s.Seed()
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	s = openStore(t, dir)
	if two, err := s.Seed(); two != one || err != nil {
		t.Errorf("another seed, %v", err)
	}
	other := openStore(t, t.TempDir())
	if two, _ := other.Seed(); two == one {
		t.Error("two nodes have the same seed")
	}
	damage(t, dir, "seed", []byte("x"))
	var corrupt *node.CorruptError
	if _, err := s.Seed(); !errors.As(err, &corrupt) || !strings.Contains(err.Error(), filepath.Join(dir, "seed")) {
		t.Errorf("got %v", err)
	}
}

func damage(t *testing.T, dir, name string, content []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestPermissionsAreTightened(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openStore(t, dir)
	if _, err := s.Seed(); err != nil {
		t.Fatal(err)
	}
	s.Close()
	for path, mode := range map[string]os.FileMode{dir: 0o755, filepath.Join(dir, "seed"): 0o644} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	s = openStore(t, dir)
	if _, err := s.Seed(); err != nil {
		t.Fatal(err)
	}
	if err := s.SaveBundle(newAuthority(t).bundle()); err != nil {
		t.Fatal(err)
	}
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, walkErr error) error {
		if walkErr != nil {
			return walkErr
		}
		info, err := d.Info()
		if err == nil && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func TestFolderOfAnotherUser(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("only root can give a folder away")
	}
	dir := t.TempDir()
	if err := os.Chown(dir, 12345, 12345); err != nil {
		t.Fatal(err)
	}
	if _, err := node.OpenStore(dir); err == nil || !strings.Contains(err.Error(), "chown") {
		t.Errorf("got %v", err)
	}
}

func TestTwoAgentsNeverShareAFolder(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openStore(t, dir)
	if _, err := node.OpenStore(dir); err == nil || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("got %v", err)
	}
	s.Close()
	openStore(t, dir)
}

// Whoever looks at the file at any moment, as the next process does after a
// crash, sees one of the identities whole.
func TestSavingIsAtomic(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ca := newAuthority(t)
	s := openStore(t, dir)
	n := newNode(t, s, node.JoinToken("t", ""), ca, nil)
	if err := n.Attest(t.Context(), serve(t, &server{ca: ca}), ca.bundle()); err != nil {
		t.Fatal(err)
	}
	saved := make(chan error, 1)
	go func() {
		for range 100 {
			if err := s.SaveIdentity(n.Identity()); err != nil {
				saved <- err
				return
			}
		}
		saved <- nil
	}()
	for {
		if id, err := s.LoadIdentity(); id == nil || err != nil {
			t.Fatalf("got %v, %v", id, err)
		}
		select {
		case err := <-saved:
			if err != nil {
				t.Fatal(err)
			}
			return
		default:
		}
	}
}

func FuzzStoredFiles(f *testing.F) {
	dir := f.TempDir()
	s, err := node.OpenStore(dir)
	if err != nil {
		f.Fatal(err)
	}
	ca := newAuthority(f)
	n := newNode(f, s, node.JoinToken("t", ""), ca, nil)
	if err := n.Attest(f.Context(), serve(f, &server{ca: ca}), ca.bundle()); err != nil {
		f.Fatal(err)
	}
	if err := s.SaveBundle(ca.bundle()); err != nil {
		f.Fatal(err)
	}
	s.Close()
	for _, name := range []string{"identity.json", "bundle.json"} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := t.TempDir()
		damage(t, dir, "identity.json", b)
		damage(t, dir, "bundle.json", b)
		s, err := node.OpenStore(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		var corrupt *node.CorruptError
		id, err := s.LoadIdentity()
		switch {
		case err != nil && !errors.As(err, &corrupt), err == nil && id == nil:
			t.Fatalf("identity: %v, %v", id, err)
		case err == nil:
			id.ID()
			id.TLSCertificate()
			if err := s.SaveIdentity(id); err != nil {
				t.Fatalf("save the identity again: %v", err)
			}
			if again, err := s.LoadIdentity(); err != nil || !again.Chain[0].Equal(id.Chain[0]) {
				t.Fatalf("load the identity again: %v", err)
			}
		}
		kept, err := s.LoadBundle()
		switch {
		case err != nil && !errors.As(err, &corrupt), err == nil && kept == nil:
			t.Fatalf("bundle: %v, %v", kept, err)
		case err == nil:
			if err := s.SaveBundle(kept); err != nil {
				t.Fatalf("save the bundle again: %v", err)
			}
			if again, err := s.LoadBundle(); err != nil || !again.Equal(kept) {
				t.Fatalf("load the bundle again: %v", err)
			}
		}
	})
}
