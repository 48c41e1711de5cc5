package endpoint

import (
	"crypto/tls"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
)

// certFiles loads a certificate from files and reloads it when they are replaced.
type certFiles struct {
	cert, key string
	log       *slog.Logger

	loaded atomic.Pointer[tls.Certificate]
	mu     sync.Mutex
	read   [2]fs.FileInfo // of the files at the last attempt to load them
}

// get returns the certificate, after reloading files that have changed. Files that cannot
// be used, such as a new certificate with the old key, are logged once, and the previous
// certificate stays in use. One handshake at a time checks the files; the others do not
// wait for it.
func (f *certFiles) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	before := f.loaded.Load()
	if before == nil {
		f.mu.Lock()
	} else if !f.mu.TryLock() {
		return before, nil
	}
	defer f.mu.Unlock()
	var now [2]fs.FileInfo
	for i, name := range []string{f.cert, f.key} {
		// A file that is missing, perhaps for a moment, is nil.
		now[i], _ = os.Stat(name)
	}
	if before != nil && same(now[0], f.read[0]) && same(now[1], f.read[1]) {
		return before, nil
	}
	f.read = now
	loaded, err := tls.LoadX509KeyPair(f.cert, f.key)
	switch {
	case err == nil:
		if before != nil {
			f.log.Info("bundle endpoint certificate reloaded", "expires_at", loaded.Leaf.NotAfter)
		}
		f.loaded.Store(&loaded)
	case before == nil:
		return nil, fmt.Errorf("certificate files: %w", err)
	default:
		f.log.Error("bundle endpoint certificate not reloaded, the previous one stays in use", "error", err)
	}
	return f.loaded.Load(), nil
}

func same(a, b fs.FileInfo) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	return os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size()
}
