// Package bootstrap reads the trust bundle that the operator publishes for a node's first
// connection to the server: from a file, an https URL, or a local publisher on a Unix
// socket.
//
// A bundle is a PEM file or in SPIFFE's format (SPIFFE Trust Domain and Bundle, section
// 4), which its first character tells. Its authorities are never tainted.
package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
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

// Fetch reads the file.
func (f File) Fetch(context.Context, Request) (*bundle.Bundle, error) {
	file, err := os.Open(f.Path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	b, err := read(file, f.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("%s %w", f.Path, err)
	}
	return b, nil
}

// read reads and parses a bundle. Its errors continue a sentence that begins with the
// bundle's place.
func read(r io.Reader, td spiffeid.TrustDomain) (*bundle.Bundle, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxBytes+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("cannot be read: %w", err)
	case len(b) > maxBytes:
		return nil, fmt.Errorf("is larger than %d bytes", maxBytes)
	case len(b) == 0:
		return nil, errors.New(`is empty: write it again with "server bundle" or "spire-server bundle show"`)
	}
	doc, err := bundle.Read(b)
	if err != nil {
		return nil, fmt.Errorf("is not a trust bundle: %w", err)
	}
	out, err := bundle.New(td, doc.Content)
	if err != nil {
		return nil, fmt.Errorf("is not a trust bundle: %w", err)
	}
	return out, nil
}
