#!/usr/bin/env bash
# In FIPS-only mode Tink rejects AES-GCM, which is approved, and accepts AES-GCM-SIV, which is not.
#
# Seen with   tink-go v2.9.0, Go 1.26.8
# Behaviour   With GODEBUG=fips140=only Tink cannot create the AEAD primitive of an AES256-GCM keyset:
#             Go allows AES-GCM only if Go chooses the nonce, but Tink chooses it. The error mentions
#             neither FIPS nor the nonce. AES-CTR-HMAC works, and so does AES-GCM-SIV, which Tink
#             builds from single AES blocks, which Go does not check.
# Operators   After a switch to this mode a program cannot open files that it encrypted with the usual
#             key template. A template that works is not necessarily approved.
# renewd      seals with AES256-GCM (internal/server/seal): its server needs fips140=on or off, not only.
#
# Output seen
#   fips140=off   AES256_GCM      works
#   fips140=off   AES256_GCM_SIV  works
#   fips140=off   AES256_CTR_HMAC works
#   fips140=only  AES256_GCM      aesgcm.NewAEAD: failed to create cipher.AEAD
#   fips140=only  AES256_GCM_SIV  works
#   fips140=only  AES256_CTR_HMAC works
source "$(dirname "$0")/lib.sh"
go_module github.com/tink-crypto/tink-go/v2@v2.9.0
cat >main.go <<'GO'
package main

import (
	"fmt"
	"os"

	"github.com/tink-crypto/tink-go/v2/aead"
	"github.com/tink-crypto/tink-go/v2/keyset"
	tinkpb "github.com/tink-crypto/tink-go/v2/proto/tink_go_proto"
)

func main() {
	for _, kind := range []struct {
		name     string
		template func() *tinkpb.KeyTemplate
	}{
		{"AES256_GCM", aead.AES256GCMKeyTemplate},
		{"AES256_GCM_SIV", aead.AES256GCMSIVKeyTemplate},
		{"AES256_CTR_HMAC", aead.AES256CTRHMACSHA256KeyTemplate},
	} {
		outcome := "works"
		if err := seal(kind.template()); err != nil {
			outcome = err.Error()
		}
		fmt.Printf("%-13s %-15s %s\n", os.Getenv("GODEBUG"), kind.name, outcome)
	}
}

func seal(template *tinkpb.KeyTemplate) error {
	handle, err := keyset.NewHandle(template)
	if err != nil {
		return err
	}
	primitive, err := aead.New(handle)
	if err != nil {
		return err
	}
	sealed, err := primitive.Encrypt([]byte("content"), nil)
	if err != nil {
		return err
	}
	_, err = primitive.Decrypt(sealed, nil)
	return err
}
GO
go build -o try .
{ GODEBUG=fips140=off ./try; GODEBUG=fips140=only ./try; } >seen
expect <<'SEEN'
fips140=off   AES256_GCM      works
fips140=off   AES256_GCM_SIV  works
fips140=off   AES256_CTR_HMAC works
fips140=only  AES256_GCM      aesgcm.NewAEAD: failed to create cipher.AEAD
fips140=only  AES256_GCM_SIV  works
fips140=only  AES256_CTR_HMAC works
SEEN
