package seal_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/tink-crypto/tink-go/v2/insecurecleartextkeyset"
	"github.com/tink-crypto/tink-go/v2/keyset"
	"github.com/tink-crypto/tink-go/v2/mac"

	"github.com/renewd/renewd/internal/server/seal"
)

func newFile(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "key.json")
	if err := seal.NewFile(path); err != nil {
		t.Fatal(err)
	}
	return path
}

func file(t *testing.T, path string) seal.Manager {
	t.Helper()
	m, err := seal.File(path)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func sealed(t *testing.T, m seal.Manager, plaintext, context string) []byte {
	t.Helper()
	s, err := m.Seal([]byte(plaintext), []byte(context))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSealAndOpen(t *testing.T) {
	t.Parallel()
	path := newFile(t)
	for name, m := range map[string]seal.Manager{"file": file(t, path), "ephemeral": seal.Ephemeral()} {
		s := sealed(t, m, "secret", "a")
		if bytes.Contains(s, []byte("secret")) {
			t.Errorf("%s: the plaintext can be read", name)
		}
		if bytes.Equal(s, sealed(t, m, "secret", "a")) {
			t.Errorf("%s: the same plaintext is sealed the same twice", name)
		}
		if got, err := m.Open(s, []byte("a")); err != nil || string(got) != "secret" {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		if !m.Current(s) {
			t.Errorf("%s: what was just sealed is not current", name)
		}
		if _, err := m.Open(s, []byte("b")); !errors.Is(err, seal.ErrWrongKey) {
			t.Errorf("%s: another context: %v", name, err)
		}
		if _, err := seal.Ephemeral().Open(s, []byte("a")); !errors.Is(err, seal.ErrWrongKey) {
			t.Errorf("%s: another key: %v", name, err)
		}
		for i := range s {
			broken := bytes.Clone(s)
			broken[i] ^= 1
			if _, err := m.Open(broken, []byte("a")); !errors.Is(err, seal.ErrWrongKey) {
				t.Errorf("%s: byte %d changed: %v", name, i, err)
			}
			if _, err := m.Open(s[:i], []byte("a")); !errors.Is(err, seal.ErrWrongKey) {
				t.Errorf("%s: cut off at %d: %v", name, i, err)
			}
		}
	}
	s := sealed(t, file(t, path), "secret", "a")
	if got, err := file(t, path).Open(s, []byte("a")); err != nil || string(got) != "secret" {
		t.Errorf("read again: %q, %v", got, err)
	}
}

func TestNewFileNeverOverwrites(t *testing.T) {
	t.Parallel()
	path := newFile(t)
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o600 {
		t.Fatalf("mode %v, %v", info.Mode(), err)
	}
	before, _ := os.ReadFile(path)
	if err := seal.NewFile(path); err == nil || !strings.Contains(err.Error(), path+" exists") {
		t.Errorf("second: %v", err)
	}
	if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
		t.Error("the key was overwritten")
	}
	if names, _ := os.ReadDir(filepath.Dir(path)); len(names) != 1 {
		t.Errorf("files left behind: %v", names)
	}
	if err := seal.NewFile(filepath.Join(path, "x")); err == nil {
		t.Error("no error for a folder that is not there")
	}
	var out bytes.Buffer
	if err := seal.NewKey(&out); err != nil || !json.Valid(out.Bytes()) {
		t.Errorf("NewKey: %v", err)
	}
	other := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(other, out.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	file(t, other)
}

func TestAddKey(t *testing.T) {
	t.Parallel()
	path := newFile(t)
	old := file(t, path)
	first := sealed(t, old, "secret", "a")
	if err := seal.AddKey(path); err != nil {
		t.Fatal(err)
	}
	m := file(t, path)
	if got, err := m.Open(first, []byte("a")); err != nil || string(got) != "secret" || m.Current(first) {
		t.Errorf("sealed before: %q, %v, current %v", got, err, m.Current(first))
	}
	second := sealed(t, m, "secret", "a")
	if !m.Current(second) {
		t.Error("the new key does not seal")
	}
	if _, err := old.Open(second, []byte("a")); !errors.Is(err, seal.ErrWrongKey) {
		t.Errorf("with the old key alone: %v", err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if err := seal.AddKey(path + "x"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("to no file: %v", err)
	}
}

// TestAddKeyInPlace: the file keeps its path and its owner, because root may add a key for
// a server that runs as another user.
func TestAddKeyInPlace(t *testing.T) {
	t.Parallel()
	path := newFile(t)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	const owner, group = 4242, 4343
	root := os.Geteuid() == 0 // only root can give a file away
	if root {
		if err := os.Chown(path, owner, group); err != nil {
			t.Fatal(err)
		}
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := seal.AddKey(link); err != nil {
		t.Fatal(err)
	}
	if to, err := os.Readlink(link); err != nil || to != path {
		t.Errorf("the link leads to %q, %v", to, err)
	}
	if after, err := os.ReadFile(path); err != nil || bytes.Equal(before, after) {
		t.Errorf("the file has no other key, %v", err)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if is := info.Sys().(*syscall.Stat_t); root && (is.Uid != owner || is.Gid != group) || info.Mode() != 0o600 {
		t.Errorf("owner %d, group %d, mode %v", is.Uid, is.Gid, info.Mode())
	}
}

func TestFileRejected(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	good, err := os.ReadFile(newFile(t))
	if err != nil {
		t.Fatal(err)
	}
	var macs bytes.Buffer
	h, err := keyset.NewHandle(mac.HMACSHA256Tag128KeyTemplate())
	if err != nil {
		t.Fatal(err)
	}
	if err := insecurecleartextkeyset.Write(h, keyset.NewJSONWriter(&macs)); err != nil {
		t.Fatal(err)
	}
	noPrimary := bytes.Replace(good, []byte(`"primaryKeyId":`), []byte(`"primaryKeyId":1`), 1)
	for name, c := range map[string]struct {
		data []byte
		mode fs.FileMode
		want string
	}{
		"group":      {good, 0o640, "chmod 600"},
		"others":     {good, 0o604, "chmod 600"},
		"empty":      {nil, 0o600, "has no valid key"},
		"half":       {good[:len(good)/2], 0o600, "has no valid key"},
		"other JSON": {[]byte(`{"secret":"hunter2"}`), 0o600, "has no valid key"},
		"no JSON":    {[]byte("hunter2"), 0o600, "has no valid key"},
		"no primary": {noPrimary, 0o600, "key"},
		"other use":  {macs.Bytes(), 0o600, "AEAD"},
	} {
		path := filepath.Join(dir, strings.ReplaceAll(name, " ", "-"))
		if err := os.WriteFile(path, c.data, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, c.mode); err != nil {
			t.Fatal(err)
		}
		_, err := seal.File(path)
		if err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v", name, err)
		}
	}
	missing := filepath.Join(dir, "missing")
	if _, err := seal.File(missing); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "server key new "+missing) {
		t.Errorf("missing: %v", err)
	}
	if _, err := seal.File(dir); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("a folder: %v", err)
	}
}

func TestFind(t *testing.T) {
	t.Parallel()
	path := newFile(t)
	dir := t.TempDir()
	credentials := func(string) string { return dir }
	if _, err := seal.Find(path, credentials); err != nil {
		t.Errorf("a path: %v", err)
	}
	if _, err := seal.Find("", func(string) string { return "" }); err == nil || !strings.Contains(err.Error(), seal.CredentialName) {
		t.Errorf("nothing at all: %v", err)
	}
	if _, err := seal.Find("", credentials); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no such credential: %v", err)
	}
	credential := filepath.Join(dir, seal.CredentialName)
	data, _ := os.ReadFile(path)
	if err := os.WriteFile(credential, data, 0o600); err != nil {
		t.Fatal(err)
	}
	for mode, ok := range map[fs.FileMode]bool{0o400: true, 0o440: true, 0o444: false} {
		if err := os.Chmod(credential, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := seal.Find("", credentials); (err == nil) != ok {
			t.Errorf("a credential of mode %04o: %v", mode, err)
		}
	}
}

// TestAddKeyConcurrently: several operators add a key at the same time, and a server
// reads the file after each. What those servers seal can be opened with the final file.
func TestAddKeyConcurrently(t *testing.T) {
	t.Parallel()
	path := newFile(t)
	const n = 16
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	var sealed [n][]byte
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			name := path
			if i%2 == 1 {
				name = link
			}
			err := seal.AddKey(name)
			if err != nil {
				t.Errorf("AddKey: %v", err)
				return
			}
			m, err := seal.File(path)
			if err == nil {
				sealed[i], err = m.Seal([]byte("key"), nil)
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	m := file(t, path)
	for _, s := range sealed {
		if _, err := m.Open(s, nil); err != nil {
			t.Fatalf("a key in use is lost: %v", err)
		}
	}
}
