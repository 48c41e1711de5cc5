package store_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.etcd.io/bbolt"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/seal"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/internal/server/store"
)

// openFails checks that Open fails with an error that contains each of the texts, and
// does not change the file.
func openFails(t *testing.T, path string, o store.Options, want ...string) error {
	t.Helper()
	before, beforeErr := os.ReadFile(path)
	s, err := store.Open(path, o)
	if err == nil {
		closed(t, s)
		t.Fatal("it was opened")
	}
	for _, w := range append(want, "open store "+path) {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q does not say %q", err, w)
		}
	}
	if after, afterErr := os.ReadFile(path); !bytes.Equal(before, after) || (beforeErr == nil) != (afterErr == nil) {
		t.Error("the file was changed")
	}
	return err
}

func TestOpenCreatesTheFile(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	openFails(t, path, store.Options{TrustDomain: td, Seal: key, ReadOnly: true}, "no such file")
	// Of several concurrent calls one creates it, and one at a time has it open.
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			s, err := store.Open(path, options())
			if err != nil {
				t.Error(err)
				return
			}
			if err := update(t.Context(), s.Deployment("default"), 1, "1"); err != nil {
				t.Error(err)
			}
			closed(t, s)
		})
	}
	wg.Wait()
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if names, _ := os.ReadDir(filepath.Dir(path)); len(names) != 1 {
		t.Errorf("files left behind: %v", names)
	}
	// Creating it a second time changes nothing.
	before := readFile(t, path)
	if err := store.Create(path, options()); err != nil || !bytes.Equal(before, readFile(t, path)) {
		t.Errorf("created again: %v", err)
	}
	missing := filepath.Join(filepath.Dir(path), "x", "server.db")
	openFails(t, missing, options(), "its folder must exist")
	for _, o := range []store.Options{{TrustDomain: td}, {Seal: key}} {
		openFails(t, path, o, "needs a trust domain and an encryption key")
	}
}

func TestOpenRejectsOtherFiles(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	s := open(t, path)
	if _, err := keyset.Open(t.Context(), keyset.Config{TrustDomain: td, Storage: s.Deployment("default")}); err != nil {
		t.Fatal(err)
	}
	if err := openFails(t, path, options(), "another process has it open"); !errors.Is(err, store.ErrInUse) {
		t.Error(err)
	}
	closed(t, s)

	other := options()
	other.TrustDomain = spiffeid.RequireTrustDomainFromString("other.org")
	openFails(t, path, other, "belongs to trust domain example.org", "has other.org")

	other = options()
	other.Seal = seal.Ephemeral()
	if err := openFails(t, path, other, "encryption key", "ks_"); !errors.Is(err, seal.ErrWrongKey) {
		t.Error(err)
	}
	openFails(t, filepath.Dir(path), options(), "is a directory")

	empty := newPath(t)
	writeFile(t, empty, nil)
	openFails(t, empty, options(), "empty")

	foreign := newPath(t)
	edit(t, foreign, func(tx *bbolt.Tx) error { _, err := tx.CreateBucket([]byte("x")); return err })
	openFails(t, foreign, options(), "not a store of this program")
}

// edit changes a file as this program never would.
func edit(t *testing.T, path string, change func(tx *bbolt.Tx) error) {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := db.Update(change); err != nil {
		t.Fatal(err)
	}
}

// TestOpenRejectsANewerFormat: the error names the newer format, whatever else has
// changed in it, and is not ErrDamaged: the remedy is the newer program, not a backup.
func TestOpenRejectsANewerFormat(t *testing.T) {
	t.Parallel()
	for _, about := range []string{
		`{"format":6,"trust_domain":"example.org"}`,
		`{"format":6,"trust_domain":"example.org","beat":"2026-01-02T03:04:05Z"}`,
		`{"format":7,"trust_domain":{"name":"example.org"}}`,
		`{"format":2000000000}`,
	} {
		path := newPath(t)
		closed(t, open(t, path))
		edit(t, path, func(tx *bbolt.Tx) error {
			if _, err := tx.CreateBucket([]byte("new")); err != nil {
				return err
			}
			b := tx.Bucket([]byte("about"))
			if err := b.Put([]byte("beat"), []byte("new")); err != nil {
				return err
			}
			return b.Put([]byte("store"), store.Pack([]byte("store"), []byte(about)))
		})
		for _, readOnly := range []bool{false, true} {
			o := options()
			o.ReadOnly = readOnly
			openFails(t, path, o, "format", "up to 5", "newer version")
			if _, err := store.Open(path, o); errors.Is(err, store.ErrDamaged) {
				t.Errorf("%s: taken for damage: %v", about, err)
			}
		}
	}
}

// TestOpenUpgradesAnOlderFormat: opening a store for writing upgrades its format, so that
// an older program does not take it for damaged. Opening it read-only does not.
func TestOpenUpgradesAnOlderFormat(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	closed(t, open(t, path))
	about := []byte(`{"format":1,"trust_domain":"example.org"}`)
	edit(t, path, func(tx *bbolt.Tx) error {
		return tx.Bucket([]byte("about")).Put([]byte("store"), store.Pack([]byte("store"), about))
	})
	for _, readOnly := range []bool{true, false} {
		o := options()
		o.ReadOnly = readOnly
		s, err := store.Open(path, o)
		if err != nil {
			t.Fatal(err)
		}
		closed(t, s)
		edit(t, path, func(tx *bbolt.Tx) error {
			if old := bytes.Contains(tx.Bucket([]byte("about")).Get([]byte("store")), []byte(`"format":1`)); old != readOnly {
				t.Errorf("read only %v: format 1 %v", readOnly, old)
			}
			return nil
		})
	}
}

// TestKeysCannotBeSwapped: a sealed key cannot be opened in another place.
func TestKeysCannotBeSwapped(t *testing.T) {
	t.Parallel()
	for name, swap := range map[string]func(a, b *keyset.Document){
		"between deployments": func(a, b *keyset.Document) { *b = *a },
		"between keysets":     func(a, _ *keyset.Document) { a.Records[0].ID, a.Records[1].ID = a.Records[1].ID, a.Records[0].ID },
		"between kinds":       func(a, _ *keyset.Document) { a.Records[0].JWTKey = a.Records[0].CAKey },
	} {
		path := newPath(t)
		s := open(t, path)
		for _, d := range []string{"a", "b"} {
			if err := s.Deployment(d).Save(t.Context(), document(1), keyset.Change{}); err != nil {
				t.Fatal(err)
			}
		}
		closed(t, s)
		edit(t, path, func(tx *bbolt.Tx) error {
			a, b := store.SealedDocument(t, tx, "a"), store.SealedDocument(t, tx, "b")
			if bytes.Contains(a.Records[0].CAKey, []byte{1, 2}) {
				t.Error("the key can be read")
			}
			swap(&a, &b)
			store.PutSealedDocument(t, tx, "a", a)
			store.PutSealedDocument(t, tx, "b", b)
			return nil
		})
		if err := openFails(t, path, options(), "keyset ks_"); !errors.Is(err, seal.ErrWrongKey) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestEncryptionKeyRotation: after a key was added, the next Open seals everything with it.
func TestEncryptionKeyRotation(t *testing.T) {
	t.Parallel()
	path, keyFile := newPath(t), filepath.Join(t.TempDir(), "key")
	manager := func() store.Options {
		m, err := seal.File(keyFile)
		if err != nil {
			t.Fatal(err)
		}
		return store.Options{TrustDomain: td, Seal: m}
	}
	if err := seal.NewFile(keyFile); err != nil {
		t.Fatal(err)
	}
	old := manager()
	s, err := store.Open(path, old)
	if err != nil {
		t.Fatal(err)
	}
	fill(t, s.Deployment("default"))
	if err := s.Deployment("tokens").PutToken(t.Context(), spireapi.Token{Value: "other"}); err != nil {
		t.Fatal(err)
	}
	want := mustContents(t, s)
	if bytes.Contains(readFile(t, path), []byte(`"token"`)) {
		t.Error("a join token can be read")
	}
	closed(t, s)
	if err := seal.AddKey(keyFile); err != nil {
		t.Fatal(err)
	}
	var commits []int
	for n := range 2 {
		o := manager()
		if n == 1 {
			o.Seal = newest{o.Seal}
		}
		if s, err = store.Open(path, o); err != nil {
			t.Fatal(err)
		}
		commits = append(commits, s.Commits(t))
		if got := mustContents(t, s); got != want {
			t.Errorf("%s\nwant %s", got, want)
		}
		closed(t, s)
	}
	if commits[0] != commits[1] {
		t.Error("sealed a second time")
	}
	// The old key can open nothing, and is not needed.
	if err := openFails(t, path, old); !errors.Is(err, seal.ErrWrongKey) {
		t.Error(err)
	}
	if token, err := func() (spireapi.Token, error) {
		s, err := store.Open(path, manager())
		if err != nil {
			return spireapi.Token{}, err
		}
		defer closed(t, s)
		return s.Deployment("tokens").TakeToken(t.Context(), "other")
	}(); err != nil || token.Value != "other" {
		t.Errorf("%+v, %v", token, err)
	}
}

// newest is a Manager without its older keys.
type newest struct{ seal.Manager }

func (n newest) Open(sealed, context []byte) ([]byte, error) {
	if !n.Current(sealed) {
		return nil, seal.ErrWrongKey
	}
	return n.Manager.Open(sealed, context)
}

func TestReadOnly(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	s := open(t, path)
	fill(t, s.Deployment("default"))
	want := mustContents(t, s)
	closed(t, s)
	before := readFile(t, path)
	o := options()
	o.ReadOnly = true
	var stores []*store.Store
	for range 2 { // at the same time
		s, err := store.Open(path, o)
		if err != nil {
			t.Fatal(err)
		}
		stores = append(stores, s)
		if got := mustContents(t, s); got != want {
			t.Errorf("%s\nwant %s", got, want)
		}
		if err := update(t.Context(), s.Deployment("default"), 1, "2"); !errors.Is(err, store.ErrReadOnly) {
			t.Errorf("write: %v", err)
		}
	}
	if err := openFails(t, path, options()); !errors.Is(err, store.ErrInUse) {
		t.Error(err)
	}
	for _, s := range stores {
		closed(t, s)
	}
	if !bytes.Equal(before, readFile(t, path)) {
		t.Error("the file was changed")
	}
}

func TestClosed(t *testing.T) {
	t.Parallel()
	s := open(t, newPath(t))
	d := s.Deployment("default")
	closed(t, s)
	if err := update(t.Context(), d, 1, "1"); !errors.Is(err, store.ErrClosed) {
		t.Errorf("write: %v", err)
	}
	if _, err := d.Agents(t.Context()); !errors.Is(err, store.ErrClosed) {
		t.Errorf("read: %v", err)
	}
}

// tmpfs mounts a memory file system, or skips.
func tmpfs(t *testing.T, options string) (dir string, remount func(flags uintptr)) {
	t.Helper()
	dir = t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
		t.Skipf("mounting a tmpfs needs root and a container that allows it: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir, func(flags uintptr) {
		t.Helper()
		if err := syscall.Mount("tmpfs", dir, "tmpfs", syscall.MS_REMOUNT|flags, options); err != nil {
			t.Fatal(err)
		}
	}
}

func TestReadOnlyFileSystem(t *testing.T) {
	t.Parallel()
	dir, remount := tmpfs(t, "size=4m")
	path := filepath.Join(dir, "server.db")
	remount(syscall.MS_RDONLY)
	openFails(t, path, options(), "read-only file system", "able to write")
	remount(0)
	s := open(t, path)
	fill(t, s.Deployment("default"))
	closed(t, s)
	remount(syscall.MS_RDONLY)
	if err := openFails(t, path, options(), "able to read and write"); !errors.Is(err, syscall.EROFS) {
		t.Error(err)
	}
	o := options()
	o.ReadOnly = true
	s, err := store.Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	mustContents(t, s)
	closed(t, s)
}

func TestNoPermission(t *testing.T) {
	t.Parallel()
	if os.Getuid() == 0 {
		t.Skip("root may do everything")
	}
	path := newPath(t)
	closed(t, open(t, path))
	if err := os.Chmod(path, 0o400); err != nil {
		t.Fatal(err)
	}
	if err := openFails(t, path, options(), "able to read and write"); !errors.Is(err, fs.ErrPermission) {
		t.Error(err)
	}
}

// fillUp fills a file system with one file.
func fillUp(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestFullFileSystem fills a file system, writes to the store, and frees space.
func TestFullFileSystem(t *testing.T) {
	t.Parallel()
	dir, _ := tmpfs(t, "size=600k")
	path := filepath.Join(dir, "server.db")
	ballast := filepath.Join(dir, "ballast")
	fillUp := func() { fillUp(t, ballast) }
	fillUp()
	openFails(t, path, options(), "no space left")
	if names, _ := os.ReadDir(dir); len(names) != 1 {
		t.Errorf("files left behind: %v", names)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	s := open(t, path)
	d := s.Deployment("default")
	var done []int
	full := func(from int) {
		t.Helper()
		for n := from; n < from+500; n++ {
			err := update(t.Context(), d, n, strings.Repeat("x", 3000))
			if err == nil {
				done = append(done, n)
				continue
			}
			if !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "make room") {
				t.Errorf("%v", err)
			}
			break
		}
		all, err := d.Agents(t.Context())
		if err != nil || len(all) != len(done) {
			t.Fatalf("%d agents, %v, want %d", len(all), err, len(done))
		}
	}
	fillUp()
	full(0)
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	full(1000)
	if len(done) < 20 || done[len(done)-1] < 1000 {
		t.Errorf("written: %v", done)
	}
	closed(t, s)
	s = opened(t, path)
	all, err := s.Deployment("default").Agents(t.Context())
	if err != nil || !slices.IsSorted(done) || len(all) != len(done) {
		t.Errorf("after a restart: %d agents, %v, want %d", len(all), err, len(done))
	}
}
