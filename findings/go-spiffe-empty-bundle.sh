#!/usr/bin/env bash
# go-spiffe writes a bundle without keys in a form that go-spiffe rejects.
#
# Seen with   go-spiffe v2.9.0
# Behaviour   spiffebundle.Marshal writes "keys":null for a bundle without authorities.
#             spiffebundle.Parse rejects that, and accepts "keys":[].
# Operators   A trust domain that withdraws all its keys publishes an empty list (SPIFFE Trust
#             Domain and Bundle, 4.1.3). If both sides use this library, the relying parties
#             do not see the withdrawal: each refresh fails, and the old keys stay trusted.
# renewd      accepts an empty list as a withdrawal, and writes empty bundles as "keys":[]
#             (internal/server/federation).
#
# Output seen
#   marshal: {"keys":null}
#   parse "keys":null: spiffebundle: no authorities found
#   parse "keys":[]: 0 authorities
source "$(dirname "$0")/lib.sh"
go_module github.com/spiffe/go-spiffe/v2@v2.9.0
cat >main.go <<'GO'
package main

import (
	"fmt"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func parse(keys string, doc []byte) {
	b, err := spiffebundle.Parse(td, doc)
	if err != nil {
		fmt.Printf("parse \"keys\":%s: %v\n", keys, err)
		return
	}
	fmt.Printf("parse \"keys\":%s: %d authorities\n", keys, len(b.X509Authorities())+len(b.JWTAuthorities()))
}

func main() {
	doc, err := spiffebundle.New(td).Marshal()
	if err != nil {
		panic(err)
	}
	fmt.Printf("marshal: %s\n", doc)
	parse("null", doc)
	parse("[]", []byte(`{"keys":[]}`))
}
GO
go run . >seen
expect <<'SEEN'
marshal: {"keys":null}
parse "keys":null: spiffebundle: no authorities found
parse "keys":[]: 0 authorities
SEEN
