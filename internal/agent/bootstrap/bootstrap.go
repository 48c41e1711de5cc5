// Package bootstrap reads the trust bundle that the operator publishes for a node's first
// connection to the server: from a file, an https URL, or a local publisher on a Unix
// socket.
//
// A bundle is a PEM file or in SPIFFE's format (SPIFFE Trust Domain and Bundle, section
// 4), which its first character tells. Its authorities are never tainted.
package bootstrap

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/config"
)

// maxBytes is the largest bundle accepted, in bytes. An authority takes 1 to 2 KiB.
const maxBytes = 8 << 20

// Request says why and how often a source has been asked. A local publisher receives it.
type Request struct {
	// Rebootstrap is set when the agent has a bundle, which no longer verifies the
	// server.
	Rebootstrap bool
	// Attempt counts the requests of one series, from 1.
	Attempt int
	// Since is when the series began.
	Since time.Time
}

// File is a file with the bundle. It must not be empty.
type File struct {
	Path        string
	TrustDomain spiffeid.TrustDomain
}

// Fetch reads the file. Its errors passed [config.FileError].
func (f File) Fetch(context.Context, Request) (*bundle.Bundle, error) {
	data, err := config.ReadFile(f.Path, maxBytes)
	if err != nil {
		return nil, err
	}
	b, err := parse(data, f.TrustDomain)
	if err != nil {
		return nil, config.Permanent(fmt.Errorf("%s %w", f.Path, err))
	}
	return b, nil
}

// read reads and parses the answer of a URL. Its errors continue a sentence that begins
// with the bundle's place.
func read(r io.Reader, td spiffeid.TrustDomain) (*bundle.Bundle, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxBytes+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("cannot be read: %w", err)
	case len(data) > maxBytes:
		return nil, fmt.Errorf("is larger than %d bytes", maxBytes)
	}
	return parse(data, td)
}

// writeAgain is the remedy for a bundle that cannot be used.
const writeAgain = `write it again with "server bundle" or "spire-server bundle show"`

// parse parses a bundle of a trust domain. Its errors continue a sentence that begins with
// the bundle's place.
func parse(data []byte, td spiffeid.TrustDomain) (*bundle.Bundle, error) {
	if len(data) == 0 {
		return nil, errors.New("is empty: " + writeAgain)
	}
	if _, err := x509.ParseCertificates(data); err == nil {
		return nil, errors.New("has certificates in DER: convert them to PEM (openssl x509 -inform der), or " + writeAgain)
	}
	doc, err := bundle.Read(data)
	if err != nil {
		return nil, fmt.Errorf("is not a trust bundle: %w: %s", err, writeAgain)
	}
	if other := trustDomainOf(doc); other != "" && other != td.Name() {
		return nil, fmt.Errorf("is the trust bundle of %q, and trust_domain is %q: give that of the server, or correct trust_domain", other, td.Name())
	}
	b, err := bundle.New(td, doc.Content)
	if err != nil {
		return nil, fmt.Errorf("is not a trust bundle: %w: %s", err, writeAgain)
	}
	return b, nil
}

// trustDomainOf returns the trust domain in the SPIFFE IDs of a bundle's authorities; ""
// if they have none, as those of other CAs, or several.
func trustDomainOf(doc *bundle.Document) string {
	found := ""
	for _, a := range doc.X509 {
		for _, uri := range a.Certificate.URIs {
			if uri.Scheme != "spiffe" || found != "" && uri.Host != found {
				return ""
			}
			found = uri.Host
		}
	}
	return found
}
