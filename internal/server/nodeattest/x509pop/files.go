package x509pop

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"

	"github.com/renewd/renewd/internal/config"
)

// maxFile is the largest file of CAs: a few thousand.
const maxFile = 8 << 20

// cas are the trusted CAs of the files.
type cas struct {
	pool  *x509.CertPool
	count int
}

// openFiles loads the PEM files of the trusted CAs. The function that it returns reloads
// files that have changed. Files that cannot be used are logged once, and the previous CAs
// stay trusted.
func openFiles(names []string, log *slog.Logger) (roots func() *x509.CertPool, err error) {
	if len(names) == 0 {
		return nil, errors.New("ca_bundle_files: none is given")
	}
	loadCAs := func() (*cas, error) {
		certs, err := load(names)
		if err != nil {
			return nil, err
		}
		return &cas{pool(certs), len(certs)}, nil
	}
	files := config.Reload(names, loadCAs, func(c *cas, err error) {
		if err != nil {
			log.Error("CA bundle of x509pop not reloaded, the previous one stays in use", "error", err)
		} else {
			log.Info("CA bundle of x509pop reloaded", "certificates", c.count)
		}
	})
	if _, err := files.Get(); err != nil {
		return nil, err
	}
	return func() *x509.CertPool {
		loaded, _ := files.Get() // fails only before the first success
		return loaded.pool
	}, nil
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
			return nil, config.Permanent(fmt.Errorf("ca_bundle_files: %s: %w: give a file with PEM certificates of CAs", name, err))
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
