#!/usr/bin/env bash
# go-spiffe accepts trust domain names that Go rejects in certificates.
#
# Seen with   go-spiffe v2.9.0, Go 1.26
# Behaviour   spiffeid.TrustDomainFromString accepts a trailing dot, a leading dot and two
#             consecutive dots. x509.CreateCertificate signs a certificate with such a SPIFFE
#             ID, and x509.ParseCertificate rejects it.
# Operators   A mistyped trust domain passes every check of a configuration. The first SVID fails at
#             the relying party, with an error about a domain.
# renewd      rejects such a trust_domain in the configuration (internal/config), before it signs
#             anything.
#
# Output seen
#   example.org: accepted, signed, read
#   example.org.: accepted, signed, x509: cannot parse URI "spiffe://example.org./web": invalid domain
#   .example.org: accepted, signed, x509: cannot parse URI "spiffe://.example.org/web": invalid domain
#   example..org: accepted, signed, x509: cannot parse URI "spiffe://example..org/web": invalid domain
source "$(dirname "$0")/lib.sh"
go_module github.com/spiffe/go-spiffe/v2@v2.9.0
cat >main.go <<'GO'
package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"math/big"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func main() {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	for _, name := range []string{"example.org", "example.org.", ".example.org", "example..org"} {
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			fmt.Printf("%s: spiffeid: %v\n", name, err)
			continue
		}
		id := spiffeid.RequireFromPath(td, "/web")
		template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), URIs: []*url.URL{id.URL()}}
		der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
		if err != nil {
			fmt.Printf("%s: accepted, %v\n", name, err)
			continue
		}
		read := "read"
		if _, err := x509.ParseCertificate(der); err != nil {
			read = err.Error()
		}
		fmt.Printf("%s: accepted, signed, %s\n", name, read)
	}
}
GO
go run . >seen
expect <<'SEEN'
example.org: accepted, signed, read
example.org.: accepted, signed, x509: cannot parse URI "spiffe://example.org./web": invalid domain
.example.org: accepted, signed, x509: cannot parse URI "spiffe://.example.org/web": invalid domain
example..org: accepted, signed, x509: cannot parse URI "spiffe://example..org/web": invalid domain
SEEN
