// Package seal encrypts the secrets in the store: signing keys and join tokens.
//
// The store uses a [Manager]. The implementation here reads its keys from a file of
// mode 0600 or a systemd credential: a Tink keyset (AES-256-GCM) as JSON. The file
// may have several keys. The primary key encrypts, and every key decrypts what it has
// encrypted, so that keys can be rotated ([AddKey]). A Manager that uses a key
// management service fits the same interface.
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

	"github.com/renewd/renewd/internal/config"
)

// ErrWrongKey is returned for a value that cannot be decrypted: it was sealed with a key
// that is not in the file or with another context, or it is damaged.
var ErrWrongKey = config.Permanent(errors.New("it was not sealed with this encryption key"))

// Manager encrypts and decrypts secrets. It is safe for concurrent use. Its errors
// contain no key material.
type Manager interface {
	// Seal encrypts and authenticates plaintext. The context is authenticated and not
	// stored: it identifies the purpose of the plaintext, so that one sealed value
	// cannot replace another.
	Seal(plaintext, context []byte) ([]byte, error)
	// Open returns the plaintext of a sealed value, or ErrWrongKey.
	Open(sealed, context []byte) ([]byte, error)
	// Current reports whether sealed was sealed with the key that Seal uses. The caller
	// should seal other values again, so that older keys can be removed.
	Current(sealed []byte) bool
}

// CredentialName is the name of the systemd credential that [Find] reads if no key file
// is configured.
const CredentialName = "renewd-store-key"

// maxFile bounds a key file, in bytes; a key takes about 250.
const maxFile = 1 << 20

type manager struct {
	aead   tink.AEAD
	prefix []byte // of every value that the primary key has sealed
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

// Ephemeral returns a Manager with a new key that exists in memory only.
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

// Find reads the configured key file or, if path is empty, the credential
// [CredentialName] in $CREDENTIALS_DIRECTORY, which systemd sets.
func Find(path string, getenv func(string) string) (Manager, error) {
	if path != "" {
		return File(path)
	}
	dir := getenv("CREDENTIALS_DIRECTORY")
	if dir == "" {
		return nil, config.Permanent(fmt.Errorf("no encryption key: set key_file in the configuration, or give the service the systemd credential %s", CredentialName))
	}
	// systemd grants a service that does not run as root access by an access control
	// list, whose mask shows as the group's permissions.
	return load(filepath.Join(dir, CredentialName), 0o007)
}

// File reads a key file. It rejects one that the group or others can access.
func File(path string) (Manager, error) { return load(path, 0o077) }

func load(path string, forbidden fs.FileMode) (Manager, error) {
	h, err := read(path, forbidden)
	if err != nil {
		return nil, config.FileError(err)
	}
	m, err := newManager(h)
	if err != nil {
		return nil, config.Permanent(fmt.Errorf("key file %s: %w: restore it from a backup", path, err))
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
		return nil, fmt.Errorf("key file %s has no valid key: restore it from a backup", path)
	}
	return h, nil
}

func openError(path string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("key file: %w: restore the one of the store, or, for a new store, create one with \"server key new %s\"", err, path)
	}
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("key file: %w: give it to the user that the server runs as, with mode 0600", err)
	}
	return fmt.Errorf("key file: %w", err)
}

// NewKey writes a new key to w, in the format of a key file.
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

// NewFile creates a key file of mode 0600 with a new key. It never overwrites a file,
// because what a lost key has sealed is lost, too.
func NewFile(path string) error {
	h, err := newHandle()
	if err != nil {
		return fmt.Errorf("make an encryption key: %w", err)
	}
	// A link fails where a rename would replace.
	err = place(path, h, os.Link)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("key file %s exists and is not replaced: a store may need it; give another path", path)
	}
	return err
}

// AddKey adds a new key to a key file and makes it the primary one. The older keys stay
// for what they have sealed; the store seals its secrets again when it is next opened.
// Concurrent calls, also of several processes, are serialized, so that no added key is
// lost.
func AddKey(path string) error {
	// Replace the file itself, not a link to it.
	file, err := filepath.EvalSymlinks(path)
	if err != nil {
		return openError(path, err)
	}
	// Lock the folder, because the file is replaced.
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
		if err := copyOwner(from, to); err != nil {
			return err
		}
		return os.Rename(from, to)
	})
}

// copyOwner gives a file the owner of another, for root, who may add a key for a server
// that runs as another user.
func copyOwner(path, other string) error {
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

// place writes a complete file beside path and calls put to move it to path.
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
