package endpoint

import (
	"crypto/tls"
	"log/slog"

	"github.com/renewd/renewd/internal/config"
)

// certFiles loads a certificate from files and reloads it when they are replaced. Files that
// cannot be used, such as a new certificate with the old key, are logged once, and the
// previous certificate stays in use.
func certFiles(cert, key string, log *slog.Logger) *config.Reloaded[tls.Certificate] {
	load := func() (*tls.Certificate, error) {
		loaded, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			return nil, err
		}
		return &loaded, nil
	}
	return config.Reload([]string{cert, key}, load, func(loaded *tls.Certificate, err error) {
		if err != nil {
			log.Error("bundle endpoint certificate not reloaded, the previous one stays in use", "error", err)
		} else {
			log.Info("bundle endpoint certificate reloaded", "expires_at", loaded.Leaf.NotAfter)
		}
	})
}
