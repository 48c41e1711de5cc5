package x509pop

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/renewd/renewd/internal/config"
)

// maxFile is the largest file of CAs: a few thousand.
const maxFile = 8 << 20

// files are the PEM files of the trusted CAs. They are reloaded when they change.
type files struct {
	names []string
	log   *slog.Logger

	loaded atomic.Pointer[x509.CertPool]
	mu     sync.Mutex
	read   []fs.FileInfo // at the last attempt to load them
}

// openFiles loads the files.
func openFiles(names []string, log *slog.Logger) (*files, error) {
	if len(names) == 0 {
		return nil, errors.New("ca_bundle_files: none is given")
	}
	f := &files{names: names, log: log}
	f.read = f.stat()
	certs, err := load(names)
	if err != nil {
		return nil, err
	}
	f.loaded.Store(pool(certs))
	return f, nil
}

// pool returns the trusted CAs, after reloading files that have changed. Files that cannot
// be used are logged once, and the previous CAs stay trusted. One attestation at a time
// checks the files; the others do not wait for it.
func (f *files) pool() *x509.CertPool {
	if !f.mu.TryLock() {
		return f.loaded.Load()
	}
	defer f.mu.Unlock()
	now := f.stat()
	if slices.EqualFunc(now, f.read, same) {
		return f.loaded.Load()
	}
	f.read = now
	certs, err := load(f.names)
	if err != nil {
		f.log.Error("CA bundle of x509pop not reloaded, the previous one stays in use", "error", err)
		return f.loaded.Load()
	}
	f.log.Info("CA bundle of x509pop reloaded", "certificates", len(certs))
	f.loaded.Store(pool(certs))
	return f.loaded.Load()
}

// stat describes the files; one that is missing, perhaps for a moment, is nil.
func (f *files) stat() []fs.FileInfo {
	out := make([]fs.FileInfo, len(f.names))
	for i, name := range f.names {
		out[i], _ = os.Stat(name)
	}
	return out
}

func same(a, b fs.FileInfo) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	return os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size()
}

// load reads the certificates of all files.
func load(names []string) (all []*x509.Certificate, err error) {
	for _, name := range names {
		data, err := config.ReadFile(name, maxFile)
		if err != nil {
			return nil, fmt.Errorf("ca_bundle_files: %w", err)
		}
		certs, err := parsePEM(data)
		if err != nil {
			return nil, fmt.Errorf("ca_bundle_files: %s: %w: give a file with PEM certificates of CAs", name, err)
		}
		all = append(all, certs...)
	}
	return all, nil
}

func parsePEM(data []byte) (certs []*x509.Certificate, err error) {
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("has a PEM block of type %q", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, errors.New("has no certificate")
	}
	return certs, nil
}
