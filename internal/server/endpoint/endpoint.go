// Package endpoint publishes a trust domain's keys to relying parties, over
// HTTPS: the trust bundle as a SPIFFE bundle endpoint (SPIFFE Federation,
// section 5) at / and /bundle, and the keys of JWT-SVIDs as a plain JWK set
// (RFC 7517) at /keys, for verifiers that know nothing of SPIFFE.
//
// There are the two profiles of the specification. With https_spiffe the
// endpoint proves itself with an X.509-SVID of the trust domain; a relying party
// needs the bundle once, from elsewhere, and follows from there. With
// https_web it has a certificate that its clients' usual roots vouch for.
//
// Everything published is public. There is nothing to be changed here, nobody
// is asked who they are, and what a client can make the server hold is bounded.
package endpoint

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
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

// shutdownTimeout is how long requests in flight may take once Serve ends.
const shutdownTimeout = 3 * time.Second

// Config is what a [Server] needs. TrustDomain, Bundle and one of the profiles
// are required.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	// Bundle returns what is published now. While that is the same it should
	// return the same pointer: each is rendered once.
	Bundle func() *keyset.Bundle
	// RefreshHint tells relying parties how often to ask, in whole seconds. It is
	// also how long a cache on the way may keep an answer. No hint when zero.
	RefreshHint time.Duration

	// Certificate gives the server's own X.509-SVID, for profile https_spiffe.
	Certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	// CertFile and KeyFile are PEM files, for profile https_web. They are read
	// anew when they change, so that a renewed certificate needs no restart.
	CertFile, KeyFile string

	// Connections is where the connections of every Serve count, too; each has a
	// bound of its own when nil.
	Connections *listen.Pool

	Log *slog.Logger // discards when nil
}

// Server answers relying parties. Its methods are safe for concurrent use.
type Server struct {
	config   Config
	tls      *tls.Config
	rendered atomic.Pointer[documents]
}

// New makes a Server. It fails when the configuration is incomplete or the
// certificate files cannot be used.
func New(c Config) (*Server, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Connections == nil {
		c.Connections = listen.NewPool()
	}
	s := &Server{config: c, tls: &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: c.Certificate}}
	web := c.CertFile != "" || c.KeyFile != ""
	switch {
	case c.TrustDomain.IsZero() || c.Bundle == nil:
		return nil, errors.New("no trust domain or no bundle")
	case c.RefreshHint < 0 || c.RefreshHint%time.Second != 0:
		return nil, fmt.Errorf("refresh hint %v is not in whole seconds", c.RefreshHint)
	case web == (c.Certificate != nil):
		return nil, errors.New("needs either its own SVID or certificate files")
	case web:
		files := &certFiles{cert: c.CertFile, key: c.KeyFile, log: c.Log}
		if _, err := files.get(nil); err != nil {
			return nil, err
		}
		s.tls.GetCertificate = files.get
	}
	return s, nil
}

// Serve answers on lis, which it closes, until ctx ends; then it lets requests in
// flight finish for a short time and returns nil. Any other end is an error.
func (s *Server) Serve(ctx context.Context, lis net.Listener) error {
	limited := s.config.Connections.Listen(lis, listen.HTTP, nil)
	srv := &http.Server{
		Handler:           s.handler(),
		ConnState:         limited.ConnState,
		TLSConfig:         s.tls,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       5 * time.Second,
		WriteTimeout:      10 * time.Second,
		IdleTimeout:       30 * time.Second,
		MaxHeaderBytes:    8 << 10,
		// Handshakes that fail are the clients' affair.
		ErrorLog: slog.NewLogLogger(s.config.Log.Handler(), slog.LevelDebug),
	}
	done := make(chan error, 1)
	go func() { done <- srv.ServeTLS(limited, "", "") }()
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
		defer cancel()
		if srv.Shutdown(stop) != nil {
			_ = srv.Close() // cut off what did not finish; Shutdown has closed the listener
		}
		err = <-done
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serve the bundle endpoint: %w", err)
}

func (s *Server) handler() http.Handler {
	mux := http.NewServeMux()
	bundle := s.answer("application/json", func(d *documents) document { return d.bundle })
	mux.Handle("GET /{$}", bundle)
	mux.Handle("GET /bundle", bundle)
	mux.Handle("GET /keys", s.answer("application/jwk-set+json", func(d *documents) document { return d.keys }))
	return mux
}

// answer serves one of the documents, GET and HEAD, with the means of caching it.
func (s *Server) answer(contentType string, choose func(*documents) document) http.Handler {
	caching := "no-cache"
	if s.config.RefreshHint > 0 {
		caching = "public, max-age=" + strconv.Itoa(int(s.config.RefreshHint/time.Second))
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		docs, err := s.documents()
		if err != nil {
			s.config.Log.Error("bundle endpoint: the bundle cannot be published", "error", err)
			w.Header().Set("Cache-Control", "no-store")
			http.Error(w, "the bundle is not available", http.StatusInternalServerError)
			return
		}
		d := choose(docs)
		w.Header().Set("Content-Type", contentType)
		w.Header().Set("Cache-Control", caching)
		w.Header().Set("ETag", d.tag)
		w.Header().Set("X-Content-Type-Options", "nosniff")
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(d.body))
	})
}
