// Package endpoint publishes a trust domain's keys to relying parties, over
// HTTPS: the trust bundle as a SPIFFE bundle endpoint (SPIFFE Federation,
// section 5) at / and /bundle, and the keys of JWT-SVIDs as a plain JWK set
// (RFC 7517) at /keys, for verifiers without SPIFFE support.
//
// It supports both profiles of the specification. With https_spiffe the endpoint
// has an X.509-SVID of the trust domain. A relying party needs an initial bundle
// from elsewhere and verifies each later one with the last. With https_web the
// endpoint has a certificate of a CA that its clients trust.
//
// Everything published is public. Clients are anonymous, cannot change anything,
// and can use a bounded amount of the server's resources.
package endpoint

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/listen"
	"github.com/renewd/renewd/internal/server/keyset"
)

// Config configures a [Server]. TrustDomain, Bundle and the fields of a profile are required.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	// Bundle returns the published bundle. It should return the same pointer until the
	// bundle changes, because each pointer is rendered once.
	Bundle func() *keyset.Bundle
	// RefreshHint tells relying parties how often to ask, in whole seconds. It is
	// also how long an HTTP cache may keep an answer. No hint when zero.
	RefreshHint time.Duration

	// Certificate returns the server's X.509-SVID, for profile https_spiffe.
	Certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	// CertFile and KeyFile are PEM files, for profile https_web. They are reloaded when
	// they change. [Server.Reload] replaces them, and RefreshHint.
	CertFile, KeyFile string

	// Connections bounds the connections together with those of other listeners; each
	// Serve has its own bound when nil.
	Connections *listen.Pool

	Log *slog.Logger // discards when nil
}

// Server serves relying parties. Its methods are safe for concurrent use.
type Server struct {
	config   Config
	reloaded atomic.Pointer[reloaded]
	rendered atomic.Pointer[documents]
}

// reloaded is what [Server.Reload] replaces. It is immutable.
type reloaded struct {
	certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	hint        time.Duration
}

// New returns a Server. It fails if the certificate files cannot be loaded.
func New(c Config) (*Server, error) {
	c.Log = cmp.Or(c.Log, slog.New(slog.DiscardHandler))
	c.Connections = cmp.Or(c.Connections, listen.NewPool())
	s := &Server{config: c}
	apply, err := s.Reload(c.CertFile, c.KeyFile, c.RefreshHint)
	if err != nil {
		return nil, err
	}
	apply()
	return s, nil
}

// Reload loads the certificate from files, none with profile https_spiffe, and returns the
// function that makes it and the refresh hint those of new connections and answers. Nothing
// has changed if it returns an error.
func (s *Server) Reload(certFile, keyFile string, hint time.Duration) (apply func(), err error) {
	r := &reloaded{certificate: s.config.Certificate, hint: hint}
	if certFile != "" {
		files := certFiles(certFile, keyFile, s.config.Log)
		if _, err := files.Get(); err != nil {
			return nil, fmt.Errorf("certificate files: %w", err)
		}
		r.certificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return files.Get() }
	}
	return func() { s.reloaded.Store(r) }, nil
}

// RefreshHint returns the present hint; 0 for none.
func (s *Server) RefreshHint() time.Duration { return s.reloaded.Load().hint }

// Serve serves on lis, which it closes, until ctx ends or lis fails, as [listen.ServeHTTP]
// does.
func (s *Server) Serve(ctx context.Context, lis net.Listener) error {
	certificate := func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
		return s.reloaded.Load().certificate(hello)
	}
	srv := &http.Server{
		Handler:           s.handler(),
		TLSConfig:         &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: certificate},
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       5 * time.Second,
		WriteTimeout:      10 * time.Second,
		IdleTimeout:       30 * time.Second,
		MaxHeaderBytes:    8 << 10,
		// At debug level: anonymous clients cause failed handshakes.
		ErrorLog: slog.NewLogLogger(s.config.Log.Handler(), slog.LevelDebug),
	}
	return listen.ServeHTTP(ctx, s.config.Connections, lis, srv, func(l net.Listener) error {
		return fmt.Errorf("serve the bundle endpoint: %w", srv.ServeTLS(l, "", ""))
	})
}

func (s *Server) handler() http.Handler {
	mux := http.NewServeMux()
	bundle := s.answer("application/json", func(d *documents) document { return d.bundle })
	mux.Handle("GET /{$}", bundle)
	mux.Handle("GET /bundle", bundle)
	mux.Handle("GET /keys", s.answer("application/jwk-set+json", func(d *documents) document { return d.keys }))
	return mux
}

// answer returns a handler that serves one of the documents with caching headers.
func (s *Server) answer(contentType string, choose func(*documents) document) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		docs, err := s.documents()
		if err != nil {
			s.config.Log.Error("bundle not published at the bundle endpoint", "error", err)
			w.Header().Set("Cache-Control", "no-store")
			http.Error(w, "the bundle is not available", http.StatusInternalServerError)
			return
		}
		caching := "no-cache"
		if docs.hint > 0 {
			caching = "public, max-age=" + strconv.Itoa(int(docs.hint/time.Second))
		}
		d := choose(docs)
		w.Header().Set("Content-Type", contentType)
		w.Header().Set("Cache-Control", caching)
		w.Header().Set("ETag", d.tag)
		w.Header().Set("X-Content-Type-Options", "nosniff")
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(d.body))
	})
}
