package endpoint

import (
	"crypto/tls"
	"fmt"
	"log/slog"

	"github.com/renewd/renewd/internal/config"
)

// maxFile is the largest file of a certificate or key that is read, in bytes.
const maxFile = 1 << 20

// LoadCertificate loads a certificate chain and its private key from PEM files.
func LoadCertificate(cert, key string) (*tls.Certificate, error) {
	chain, err := config.ReadFile(cert, maxFile)
	if err != nil {
		return nil, fmt.Errorf("bundle_endpoint.cert_file: %w", err)
	}
	private, err := config.ReadFile(key, maxFile)
	if err != nil {
		return nil, fmt.Errorf("bundle_endpoint.key_file: %w", err)
	}
	loaded, err := tls.X509KeyPair(chain, private)
	if err != nil {
		return nil, config.Permanent(fmt.Errorf("%s and %s are no certificate with its key: %w: give the PEM files of the certificate and of the key that it was made for", cert, key, err))
	}
	return &loaded, nil
}

// certFiles loads a certificate from files and reloads it when they are replaced. Files that
// cannot be used, such as a new certificate with the old key, are logged once, and the
// previous certificate stays in use.
func certFiles(cert, key string, log *slog.Logger) *config.Reloaded[tls.Certificate] {
	load := func() (*tls.Certificate, error) {
		return LoadCertificate(cert, key)
	}
	return config.Reload([]string{cert, key}, load, func(loaded *tls.Certificate, err error) {
		if err != nil {
			log.Error("bundle endpoint certificate not reloaded, the previous one stays in use", "error", err)
		} else {
			log.Info("bundle endpoint certificate reloaded", "expires_at", loaded.Leaf.NotAfter)
		}
	})
}
