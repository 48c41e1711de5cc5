package agent_test

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"

	"github.com/renewd/renewd/internal/server/keyset"
)

// signWith signs a copy of leaf with a stored keyset in any state. change may edit the
// copy.
func signWith(by *keyset.Record, leaf *x509.Certificate, change func(*x509.Certificate)) []byte {
	ca, err := x509.ParseCertificate(by.CA)
	if err != nil {
		panic(err)
	}
	key, err := x509.ParsePKCS8PrivateKey(by.CAKey)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serials.Add(1)), URIs: leaf.URIs, KeyUsage: leaf.KeyUsage, ExtKeyUsage: leaf.ExtKeyUsage,
		NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter, PublicKey: leaf.PublicKey,
	}
	if change != nil {
		change(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca, template.PublicKey, key.(crypto.Signer))
	if err != nil {
		panic(err)
	}
	return der
}

func pemCert(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func pemKey(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}
