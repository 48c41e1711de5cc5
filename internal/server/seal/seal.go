// Package seal encrypts what must not lie readable on a disk: the signing keys
// in the store.
//
// A [Manager] is all that the store knows of it. The one here keeps its keys in
// a file of mode 0600 or in a systemd credential: a keyset of Tink (AES-256-GCM)
// as JSON. The file may hold several keys. The primary one seals, and each of
// them opens what it has sealed, which is how the key is rotated ([AddKey]). A
// manager that asks a key service fits behind the same interface.
package seal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/tink-crypto/tink-go/v2/aead"
	"github.com/tink-crypto/tink-go/v2/core/cryptofmt"
	"github.com/tink-crypto/tink-go/v2/insecurecleartextkeyset"
	"github.com/tink-crypto/tink-go/v2/keyset"
	"github.com/tink-crypto/tink-go/v2/tink"
	"golang.org/x/sys/unix"
)

// ErrWrongKey is returned for what cannot be opened: it was sealed with a key
// that is not at hand or under another context, or it is damaged.
var ErrWrongKey = errors.New("it was not sealed with this encryption key")

// Manager seals and opens. It is safe for concurrent use. Its errors hold no
// key material.
type Manager interface {
	// Seal encrypts and authenticates plaintext. The context is authenticated
	// and not stored: it says what the plaintext is for, so that one sealed
	// value cannot take the place of another.
	Seal(plaintext, context []byte) ([]byte, error)
	// Open returns what Seal was given, or ErrWrongKey.
	Open(sealed, context []byte) ([]byte, error)
	// Current reports whether Seal would use the key that sealed was sealed
	// with. What is not current is to be sealed again, so that the older key
	// can go.
	Current(sealed []byte) bool
}

// CredentialName is the systemd credential that is looked for when no key file
// is configured.
const CredentialName = "renewd-store-key"

// maxFile bounds a key file, in bytes; a key takes about 250.
const maxFile = 1 << 20

type manager struct {
	aead   tink.AEAD
	prefix []byte // of all that the primary key seals
}

func newManager(h *keyset.Handle) (*manager, error) {
	primary, err := h.Primary()
	if err != nil {
		return nil, errors.New("it has no primary key")
	}
	a, err := aead.New(h)
	if err != nil {
		return nil, errors.New("its keys are not for authenticated encryption (AEAD)")
	}
	prefix := append([]byte{cryptofmt.TinkStartByte}, binary.BigEndian.AppendUint32(nil, primary.KeyID())...)
	return &manager{aead: a, prefix: prefix}, nil
}

func (m *manager) Seal(plaintext, context []byte) ([]byte, error) {
	sealed, err := m.aead.Encrypt(plaintext, context)
	if err != nil {
		return nil, errors.New("seal: encryption failed")
	}
	return sealed, nil
}

func (m *manager) Open(sealed, context []byte) ([]byte, error) {
	plaintext, err := m.aead.Decrypt(sealed, context)
	if err != nil {
		return nil, ErrWrongKey
	}
	return plaintext, nil
}

func (m *manager) Current(sealed []byte) bool { return bytes.HasPrefix(sealed, m.prefix) }

// Ephemeral makes a manager whose key ends with the process.
func Ephemeral() Manager {
	h, err := newHandle()
	if err == nil {
		var m *manager
		if m, err = newManager(h); err == nil {
			return m
		}
	}
	panic(fmt.Sprintf("make an encryption key: %v", err)) // the template is a constant
}

func newHandle() (*keyset.Handle, error) { return keyset.NewHandle(aead.AES256GCMKeyTemplate()) }

// Find reads the configured key file or, when path is empty, the credential
// [CredentialName] that systemd has put into $CREDENTIALS_DIRECTORY.
func Find(path string, getenv func(string) string) (Manager, error) {
	if path != "" {
		return File(path)
	}
	dir := getenv("CREDENTIALS_DIRECTORY")
	if dir == "" {
		return nil, fmt.Errorf("no encryption key: name a key file in the configuration, or give the service the systemd credential %s", CredentialName)
	}
	// For a service that does not run as root, systemd grants access by an
	// access control list, whose mask shows as permissions of the group.
	return load(filepath.Join(dir, CredentialName), 0o007)
}

// File reads a key file. It refuses one that the group or others can access.
func File(path string) (Manager, error) { return load(path, 0o077) }

func load(path string, forbidden fs.FileMode) (Manager, error) {
	h, err := read(path, forbidden)
	if err != nil {
		return nil, err
	}
	m, err := newManager(h)
	if err != nil {
		return nil, fmt.Errorf("key file %s: %w", path, err)
	}
	return m, nil
}

func read(path string, forbidden fs.FileMode) (*keyset.Handle, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, openError(path, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("key file: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("key file %s is not a regular file", path)
	}
	if mode := info.Mode().Perm(); mode&forbidden != 0 {
		return nil, fmt.Errorf("key file %s has mode %04o, others than its owner can access it: run \"chmod 600 %s\"", path, mode, path)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile))
	if err != nil {
		return nil, fmt.Errorf("key file: %w", err)
	}
	h, err := insecurecleartextkeyset.Read(keyset.NewJSONReader(bytes.NewReader(data)))
	if err != nil {
		// The library's error may quote the content.
		return nil, fmt.Errorf("key file %s holds no key: it should be what \"server key new\" writes; restore it from a backup", path)
	}
	return h, nil
}

func openError(path string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("key file: %w: put back the one that the store was made with, or, for a new store, make one with \"server key new %s\"", err, path)
	}
	return fmt.Errorf("key file: %w", err)
}

// NewKey writes a new key, as a key file holds it, to w.
func NewKey(w io.Writer) error {
	h, err := newHandle()
	if err != nil {
		return fmt.Errorf("make an encryption key: %w", err)
	}
	return write(h, w)
}

func write(h *keyset.Handle, w io.Writer) error {
	var out bytes.Buffer
	if err := insecurecleartextkeyset.Write(h, keyset.NewJSONWriter(&out)); err != nil {
		return fmt.Errorf("encode the encryption key: %w", err)
	}
	out.WriteByte('\n')
	_, err := w.Write(out.Bytes())
	return err
}

// NewFile makes a key file of mode 0600 with a new key. It never overwrites: a
// key that is lost takes everything with it that was sealed.
func NewFile(path string) error {
	h, err := newHandle()
	if err != nil {
		return fmt.Errorf("make an encryption key: %w", err)
	}
	// A link fails where a rename would replace.
	err = place(path, h, os.Link)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("key file %s exists and is left as it is: what was sealed with it could not be opened without it", path)
	}
	return err
}

// AddKey adds a new key to a key file and makes it the primary one. The older
// keys stay for what they have sealed; the store seals its keys anew when it is
// opened the next time. Several calls, of several processes, take turns: a file
// written from what another call has replaced would lose the key that it added.
func AddKey(path string) error {
	// The file itself is replaced, not a link to it.
	file, err := filepath.EvalSymlinks(path)
	if err != nil {
		return openError(path, err)
	}
	// The folder stays the same file while what is in it is replaced.
	dir, err := os.Open(filepath.Dir(file))
	if err != nil {
		return fmt.Errorf("key file: %w", err)
	}
	defer dir.Close() // unlocks
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("key file: lock folder %s: %w", dir.Name(), err)
	}
	h, err := read(file, 0o077)
	if err != nil {
		return err
	}
	m := keyset.NewManagerFromHandle(h)
	id, err := m.Add(aead.AES256GCMKeyTemplate())
	if err != nil {
		return fmt.Errorf("add an encryption key: %w", err)
	}
	if err := m.SetPrimary(id); err != nil {
		return fmt.Errorf("add an encryption key: %w", err)
	}
	if h, err = m.Handle(); err != nil {
		return fmt.Errorf("add an encryption key: %w", err)
	}
	return place(file, h, func(from, to string) error {
		if err := giveAs(from, to); err != nil {
			return err
		}
		return os.Rename(from, to)
	})
}

// giveAs makes a file that of another's owner. Root may add a key for a server
// that is another user's and could not read it at its next start.
func giveAs(path, other string) error {
	info, err := os.Stat(other)
	if err != nil {
		return err
	}
	is, ok := info.Sys().(*syscall.Stat_t)
	if !ok || int(is.Uid) == os.Geteuid() {
		return nil
	}
	return os.Chown(path, int(is.Uid), int(is.Gid))
}

// place writes a complete file beside path and lets put bring it there.
func place(path string, h *keyset.Handle, put func(from, to string) error) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return fmt.Errorf("write key file: %w", err)
	}
	defer os.Remove(f.Name())
	err = write(h, f)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write key file %s: %w", path, err)
	}
	if err := put(f.Name(), path); err != nil {
		return fmt.Errorf("write key file: %w", err)
	}
	// The name is durable only with its folder.
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("write key file: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("write key file: %w", err)
	}
	return nil
}
