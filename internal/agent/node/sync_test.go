package node_test

import (
	"bytes"
	"crypto/x509"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/agent/node"
)

// state is a store with everything that is saved in it.
type state struct {
	*node.Store
	dir    string
	logs   bytes.Buffer
	ca     *authority
	node   *node.Node
	seed   [32]byte
	bundle *bundle.Bundle
}

func newState(t *testing.T, dir string) *state { return newStateOf(t, dir, "t") }

// newStateOf is newState with the node's name.
func newStateOf(t *testing.T, dir, name string) *state {
	t.Helper()
	s := &state{dir: dir, ca: newAuthority(t)}
	var err error
	if s.Store, err = node.OpenStore(dir, slog.New(slog.NewTextHandler(&s.logs, nil))); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	s.seed = s.Seed()
	s.node = newNode(t, s.Store, node.JoinToken("t", ""), s.ca, nil)
	srv := &server{ca: s.ca, corrupt: func(c *x509.Certificate) { c.URIs[0].Path = "/spire/agent/join_token/" + name }}
	check(t, s.node.Attest(t.Context(), serve(t, srv), s.ca.bundle()))
	s.save(t)
	check(t, s.Sync())
	return s
}

// save saves new bundles.
func (s *state) save(t *testing.T) {
	t.Helper()
	s.bundle = newAuthority(t).bundle()
	s.SaveBundle(s.bundle, nil)
	s.SaveFederated(map[spiffeid.TrustDomain]*bundle.Bundle{td: s.bundle})
}

// restart checks that a new process finds everything in dir.
func (s *state) restart(t *testing.T, dir string) {
	t.Helper()
	next := openStore(t, dir)
	defer next.Close()
	if id, err := next.LoadIdentity(); err != nil || id == nil || !id.Chain[0].Equal(s.node.Identity().Chain[0]) {
		t.Errorf("identity: %v, %v", id, err)
	}
	if !loadBundle(next).Equal(s.bundle) || !next.LoadFederated()[td].Equal(s.bundle) {
		t.Error("a bundle is not the one saved last")
	}
	if next.Seed() != s.seed {
		t.Error("another seed")
	}
}

func check(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// Sync restores the folder after any change, and holds a lock against other agents.
func TestSyncRestoresTheFolder(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(t *testing.T, dir string){
		"removed":                func(t *testing.T, dir string) { check(t, os.RemoveAll(dir)) },
		"removed and made again": func(t *testing.T, dir string) { check(t, os.RemoveAll(dir), os.Mkdir(dir, 0o755)) },
		"moved":                  func(t *testing.T, dir string) { check(t, os.Rename(dir, dir+".old")) },
		"moved and a link in its place": func(t *testing.T, dir string) {
			check(t, os.Rename(dir, dir+".old"), os.Mkdir(dir+".new", 0o700), os.Symlink(dir+".new", dir))
		},
		"emptied": func(t *testing.T, dir string) {
			for _, name := range append([]string{"lock"}, node.Files...) {
				check(t, os.Remove(filepath.Join(dir, name)))
			}
		},
		"one file removed": func(t *testing.T, dir string) { check(t, os.Remove(filepath.Join(dir, "bundle.json"))) },
		"lock removed":     func(t *testing.T, dir string) { check(t, os.Remove(filepath.Join(dir, "lock"))) },
		"a file damaged":   func(t *testing.T, dir string) { overwrite(t, dir, "identity.json", []byte("{")) },
		"a file opened to all": func(t *testing.T, dir string) {
			check(t, os.Chmod(filepath.Join(dir, "identity.json"), 0o644))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newState(t, filepath.Join(t.TempDir(), "data"))
			change(t, s.dir)
			check(t, s.Sync(), s.Err())
			if _, err := node.OpenStore(s.dir, nil); err == nil || !strings.Contains(err.Error(), "another agent") {
				t.Errorf("a second agent: %v", err)
			}
			if info, err := os.Stat(filepath.Join(s.dir, "identity.json")); err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("identity.json: %v, %v", info, err)
			}
			if _, err := os.Stat(s.dir + ".old"); err == nil {
				openStore(t, s.dir+".old").Close() // unlocked
			}
			check(t, s.Close())
			s.restart(t, s.dir)
		})
	}
}

// Failed writes are reported by file and retried until they succeed. There is one log
// line for the failure and one for the recovery.
func TestSyncRetriesFailedWrites(t *testing.T) {
	t.Parallel()
	s := newState(t, t.TempDir())
	repair := makeUnwritable(t, s.dir)
	s.save(t)
	if err := s.SaveIdentity(s.node.Identity(), true); err == nil {
		t.Fatal("saved")
	}
	check(t, os.Remove(filepath.Join(s.dir, "seed")))
	for range 3 {
		if s.Sync() == nil {
			t.Fatal("no error")
		}
	}
	unsaved := s.Unsaved()
	for _, name := range node.Files {
		if unsaved[name] == nil || !strings.Contains(s.Err().Error(), name+": ") {
			t.Errorf("%s is not named: %v", name, s.Err())
		}
	}
	repair()
	check(t, s.Sync(), s.Err())
	if len(s.Unsaved()) > 0 {
		t.Errorf("left: %v", s.Unsaved())
	}
	check(t, s.Close())
	s.restart(t, s.dir)
	if failed, recovered := strings.Count(s.logs.String(), "state not written"), strings.Count(s.logs.String(), "recovered"); failed != 1 || recovered != 1 {
		t.Errorf("log: %s", &s.logs)
	}
}

// A failed SaveIdentity without retry is not written later, either: presenting that
// identity after a restart would revoke the one in use.
func TestFailedSaveIsNotRetried(t *testing.T) {
	t.Parallel()
	s := newState(t, t.TempDir())
	repair := makeUnwritable(t, s.dir)
	other := newState(t, t.TempDir())
	if err := s.SaveIdentity(other.node.Identity(), false); err == nil {
		t.Fatal("saved")
	}
	for range 2 {
		if s.Sync() == nil {
			t.Error("the failure is forgotten while the disk refuses to write")
		}
		if err := s.Err(); err == nil || !strings.HasPrefix(err.Error(), "identity.json: ") {
			t.Errorf("got %v", err)
		}
	}
	repair()
	check(t, s.Sync(), s.Err(), s.Close())
	s.restart(t, s.dir)
}

// Two agents never write to one folder, and another agent's key is not lost.
func TestFolderReplacedByThatOfAnotherAgent(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	s, other := newState(t, filepath.Join(root, "data")), newStateOf(t, filepath.Join(root, "other"), "other")
	check(t, os.Rename(s.dir, s.dir+".old"), os.Rename(other.dir, s.dir))
	if err := s.Sync(); err == nil || !strings.Contains(err.Error(), "another agent") || s.Err() == nil {
		t.Fatalf("got %v, %v", err, s.Err())
	}
	theirs, err := os.ReadFile(filepath.Join(s.dir, "identity.json"))
	check(t, err, other.Close(), s.Sync(), s.Err(), s.Close())
	s.restart(t, s.dir)
	aside, err := filepath.Glob(filepath.Join(s.dir, "identity.json.other-*"))
	check(t, err)
	if len(aside) != 1 {
		t.Fatalf("moved aside: %v", aside)
	}
	if got, err := os.ReadFile(aside[0]); err != nil || !bytes.Equal(got, theirs) {
		t.Errorf("the other identity is lost: %v", err)
	}
}

// A corrupt bundle or seed, or one of a newer version, does not prevent a start. It is
// moved aside, and the server has the bundles.
func TestCorruptFilesAreMovedAside(t *testing.T) {
	t.Parallel()
	s := newState(t, t.TempDir())
	check(t, s.Close())
	for _, name := range []string{"bundle.json", "federated.json", "seed"} {
		whole, err := os.ReadFile(filepath.Join(s.dir, name))
		check(t, err)
		for why, content := range map[string][]byte{
			"empty": nil, "cut": whole[:len(whole)/2], "zeros": make([]byte, 64),
			"newer": bytes.ReplaceAll(whole, []byte(`"version":1`), []byte(`"version":2`)),
		} {
			if why == "newer" && name == "seed" {
				continue
			}
			overwrite(t, s.dir, name, content)
			var logs bytes.Buffer
			next, err := node.OpenStore(s.dir, slog.New(slog.NewTextHandler(&logs, nil)))
			check(t, err)
			if name == "bundle.json" && loadBundle(next) != nil || name == "federated.json" && next.LoadFederated() != nil || name == "seed" && next.Seed() == s.seed {
				t.Errorf("%s, %s: loaded", name, why)
			}
			aside, err := filepath.Glob(filepath.Join(s.dir, name+".*"))
			check(t, err)
			if len(aside) != 1 || strings.Count(logs.String(), "moved_to="+aside[0]) != 1 {
				t.Fatalf("%s, %s: moved aside %v, log %s", name, why, aside, &logs)
			}
			if got, err := os.ReadFile(aside[0]); err != nil || !bytes.Equal(got, content) {
				t.Errorf("%s, %s: the file moved aside was changed: %v", name, why, err)
			}
			check(t, os.Remove(aside[0]), next.Close())
			if name == "seed" {
				again := openStore(t, s.dir)
				one := again.Seed()
				check(t, again.Close())
				if again = openStore(t, s.dir); again.Seed() != one {
					t.Errorf("%s: the new seed does not stay", why)
				}
				check(t, again.Close())
			}
		}
	}
}

// The identity file of a newer version stays as it is: the operator can install that
// version again, but cannot use the join token again.
func TestIdentityOfANewerVersionIsLeftAlone(t *testing.T) {
	t.Parallel()
	s := newState(t, t.TempDir())
	check(t, s.Close())
	path := filepath.Join(s.dir, "identity.json")
	whole, err := os.ReadFile(path)
	check(t, err)
	for _, content := range [][]byte{
		bytes.Replace(whole, []byte(`"version":1`), []byte(`"version":2`), 1),
		[]byte(`{"version":2,"key":{"another":"shape"}}`),
	} {
		overwrite(t, s.dir, "identity.json", content)
		store := openStore(t, s.dir)
		_, err = node.New(node.Config{TrustDomain: td, Attestor: node.JoinToken("t", ""), Store: store, Bundle: s.ca.bundle})
		if err == nil || !strings.Contains(err.Error(), "install that version again") {
			t.Errorf("got %v", err)
		}
		check(t, store.Close())
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, content) {
			t.Errorf("changed: %v", err)
		}
	}
}

// Real file systems: a full one, and one that was remounted read-only.
func TestFullAndReadOnlyFileSystems(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=128k"); err != nil {
		t.Skipf("no file system can be mounted: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	s := newState(t, filepath.Join(dir, "data"))
	filler := filepath.Join(dir, "filler")
	if err := os.WriteFile(filler, make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the disk is not full: %v", err)
	}
	s.save(t)
	if err := s.Sync(); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("full: %v", err)
	}
	check(t, os.Remove(filler), s.Sync(), s.Err(), s.Close())
	check(t, unix.Mount("none", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	s.restart(t, s.dir)
	again := openStore(t, s.dir)
	again.SaveBundle(s.ca.bundle(), nil)
	if err := again.Sync(); !errors.Is(err, unix.EROFS) || again.Err() == nil || again.Unsaved()["bundle.json"] == nil {
		t.Errorf("read only: %v, %v", err, again.Err())
	}
	check(t, unix.Mount("none", dir, "", unix.MS_REMOUNT, "size=128k"), again.Sync(), again.Err())
	if !loadBundle(again).Equal(s.ca.bundle()) {
		t.Error("not written after the disk was repaired")
	}
}
