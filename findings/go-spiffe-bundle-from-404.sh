#!/usr/bin/env bash
# go-spiffe takes a bundle from an answer with the status 404 or 500.
#
# Seen with   go-spiffe v2.9.0
# Behaviour   federation.FetchBundle and WatchBundle read the body of an answer without a look at its
#             HTTP status. A body that is a bundle document is followed, an empty one too.
# Operators   A gateway before a bundle endpoint that puts a JSON document with an empty list of
#             "keys" into its error pages withdraws all trust while the endpoint is away.
#             Let error pages of that host be text.
# renewd      follows an answer with status 200 alone (internal/server/federation).
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
