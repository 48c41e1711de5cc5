package node_test

import (
	"bytes"
	"crypto"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/agent/node"
)

func openStore(t *testing.T, dir string) *node.Store {
	t.Helper()
	s, err := node.OpenStore(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func loadBundle(s *node.Store) *bundle.Bundle {
	b, _ := s.LoadBundle()
	return b
}

func TestStoreIsEmptyAtFirst(t *testing.T) {
	t.Parallel()
	s := openStore(t, filepath.Join(t.TempDir(), "a", "b"))
	if id, err := s.LoadIdentity(); id != nil || err != nil {
		t.Errorf("identity: %v, %v", id, err)
	}
	if b := loadBundle(s); b != nil {
		t.Errorf("bundle: %v", b)
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
	dir := t.TempDir()
	s := openStore(t, dir)
	s.SaveBundle(want, nil)
	s.Close()
	got := loadBundle(openStore(t, dir))
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
	if got := s.LoadFederated(); len(got) != 0 {
		t.Errorf("at first: %v", got)
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
	s.SaveFederated(want)
	s.Close()
	if got := openStore(t, dir).LoadFederated(); !maps.EqualFunc(got, want, (*bundle.Bundle).Equal) {
		t.Errorf("got %v", got)
	}
}

func TestStoreKeepsAdoptedAuthorities(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openStore(t, dir)
	if _, adopted := s.LoadBundle(); adopted != nil {
		t.Errorf("at first: %q", adopted)
	}
	b := newAuthority(t).bundle()
	for _, want := range [][]string{{"one"}, {"two", "one"}, {}, nil} {
		s.SaveBundle(b, want)
		s.Close()
		s = openStore(t, dir)
		if got, adopted := s.LoadBundle(); !got.Equal(b) || !slices.Equal(adopted, want) || (adopted == nil) != (want == nil) {
			t.Errorf("got %q beside %v, want %q", adopted, got, want)
		}
	}
}

func TestSeedStays(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openStore(t, dir)
	one := s.Seed()
	s.Close()
	s = openStore(t, dir)
	if s.Seed() != one {
		t.Error("another seed")
	}
	other := openStore(t, t.TempDir())
	if other.Seed() == one {
		t.Error("two nodes have the same seed")
	}
}

func overwrite(t *testing.T, dir, name string, content []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestPermissionsAreTightened(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openStore(t, dir)
	s.Seed()
	s.Close()
	for path, mode := range map[string]os.FileMode{dir: 0o755, filepath.Join(dir, "seed"): 0o644} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	s = openStore(t, dir)
	s.Seed()
	s.SaveBundle(newAuthority(t).bundle(), nil)
	if err := s.Sync(); err != nil {
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
	if _, err := node.OpenStore(dir, nil); err == nil || !strings.Contains(err.Error(), "chown") {
		t.Errorf("got %v", err)
	}
}

func TestTwoAgentsNeverShareAFolder(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openStore(t, dir)
	if _, err := node.OpenStore(dir, nil); err == nil || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("got %v", err)
	}
	s.Close()
	openStore(t, dir)
}

// A reader finds one complete identity at any moment, as the next process does after a
// crash.
func TestSavingIsAtomic(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ca := newAuthority(t)
	s := openStore(t, dir)
	n := newNode(t, s, node.JoinToken("t", ""), ca, nil)
	if err := n.Attest(t.Context(), serve(t, &server{ca: ca}), ca.bundle()); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "identity.json")
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	saved := make(chan error, 1)
	go func() {
		for range 100 {
			if err := s.SaveIdentity(n.Identity(), false); err != nil {
				saved <- err
				return
			}
		}
		saved <- nil
	}()
	for {
		if got, err := os.ReadFile(path); !bytes.Equal(got, whole) {
			t.Fatalf("got %d bytes of %d, %v", len(got), len(whole), err)
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
	s, err := node.OpenStore(dir, nil)
	if err != nil {
		f.Fatal(err)
	}
	ca := newAuthority(f)
	n := newNode(f, s, node.JoinToken("t", ""), ca, nil)
	if err := n.Attest(f.Context(), serve(f, &server{ca: ca}), ca.bundle()); err != nil {
		f.Fatal(err)
	}
	s.SaveBundle(ca.bundle(), nil)
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
		overwrite(t, dir, "identity.json", b)
		overwrite(t, dir, "bundle.json", b)
		s, err := node.OpenStore(dir, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		var corrupt *node.CorruptError
		id, err := s.LoadIdentity()
		switch {
		case err != nil && !errors.As(err, &corrupt) && !strings.Contains(err.Error(), "newer version"), err == nil && id == nil:
			t.Fatalf("identity: %v, %v", id, err)
		case err == nil:
			id.ID()
			id.TLSCertificate()
			if err := s.SaveIdentity(id, false); err != nil {
				t.Fatalf("save the identity again: %v", err)
			}
			if again, err := s.LoadIdentity(); err != nil || !again.Chain[0].Equal(id.Chain[0]) {
				t.Fatalf("load the identity again: %v", err)
			}
		}
		kept := loadBundle(s)
		if aside, _ := filepath.Glob(filepath.Join(dir, "bundle.json.*")); (kept == nil) != (len(aside) == 1) {
			t.Fatalf("bundle %v, moved aside %v", kept, aside)
		}
		if kept != nil {
			s.SaveBundle(kept, nil)
			if err := s.Sync(); err != nil {
				t.Fatalf("save the bundle again: %v", err)
			}
			if again := loadBundle(s); !again.Equal(kept) {
				t.Fatalf("load the bundle again: %v", again)
			}
		}
	})
}
