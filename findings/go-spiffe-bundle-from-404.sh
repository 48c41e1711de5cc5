#!/usr/bin/env bash
# go-spiffe accepts a bundle from an answer with the status 404 or 500.
#
# Seen with   go-spiffe v2.9.0
# Behaviour   federation.FetchBundle and WatchBundle read the body of an answer and ignore its HTTP
#             status. They accept every body that is a bundle document, also one without keys.
# Operators   If a gateway's error pages are JSON with an empty list of "keys", an outage of the
#             bundle endpoint withdraws all trust. Let that host use error pages in text.
# renewd      accepts only answers with status 200 (internal/server/federation).
#
# Output seen
#   status 200: a bundle of 0 authorities
#   status 404: a bundle of 0 authorities
#   status 500: a bundle of 0 authorities
source "$(dirname "$0")/lib.sh"
go_module github.com/spiffe/go-spiffe/v2@v2.9.0
cat >main.go <<'GO'
package main

import (
	"context"
	"crypto/x509"
	"fmt"
	"net/http"
	"net/http/httptest"

	"github.com/spiffe/go-spiffe/v2/federation"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func main() {
	for _, code := range []int{200, 404, 500} {
		srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(code)
			w.Write([]byte(`{"keys":[]}`))
		}))
		roots := x509.NewCertPool()
		roots.AddCert(srv.Certificate())
		b, err := federation.FetchBundle(context.Background(), spiffeid.RequireTrustDomainFromString("example.org"), srv.URL, federation.WithWebPKIRoots(roots))
		if err != nil {
			fmt.Printf("status %d: %v\n", code, err)
		} else {
			fmt.Printf("status %d: a bundle of %d authorities\n", code, len(b.X509Authorities())+len(b.JWTAuthorities()))
		}
		srv.Close()
	}
}
GO
go run . >seen
expect <<'SEEN'
status 200: a bundle of 0 authorities
status 404: a bundle of 0 authorities
status 500: a bundle of 0 authorities
SEEN
