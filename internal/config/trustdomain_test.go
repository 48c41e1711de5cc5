package config_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"net/url"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/config"
)

func TestCheckTrustDomain(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("a.", 127) + "b" // 255 bytes
	for _, name := range []string{"example.org", "prod", "10.0.0.1", "a_b-c.d", long} {
		if err := config.CheckTrustDomain(name); err != nil {
			t.Errorf("%q %v", name, err)
		}
	}
	for _, tt := range []struct{ name, want string }{
		{"", "is empty; write it like example.org"},
		{"spiffe://example.org", "is a SPIFFE ID or another URL, not the name of a trust domain; write example.org"},
		{"SPIFFE://Example.org/web", "is a SPIFFE ID or another URL, not the name of a trust domain; write example.org"},
		{"https://", "is a SPIFFE ID or another URL, not the name of a trust domain; write it like example.org"},
		{"example.org/web", "has a path, which is not part of a trust domain; write example.org"},
		{"example.org:8081", "has a port, which is not part of a trust domain; write example.org"},
		{"Example.org", "has upper-case letters, which a trust domain cannot have; write example.org"},
		{"example.org.", "has an empty label, which no certificate can have; write example.org"},
		{".example.org", "has an empty label, which no certificate can have; write example.org"},
		{"example..org", "has an empty label, which no certificate can have; write it like example.org"},
		{".", "has an empty label, which no certificate can have; write it like example.org"},
		{long + "c", "has 256 bytes, and a trust domain has at most 255; write it like example.org"},
		{"example org", "has a character that a trust domain cannot have; only a to z, 0 to 9, dots, - and _ are allowed; write it like example.org"},
		{"exämple.org", "has a character that a trust domain cannot have; only a to z, 0 to 9, dots, - and _ are allowed; write it like example.org"},
	} {
		if err := config.CheckTrustDomain(tt.name); err == nil || err.Error() != tt.want {
			t.Errorf("%q %v\nwant %s", tt.name, err, tt.want)
		}
	}
}

// FuzzCheckTrustDomain: a name that passes is that of a trust domain as it is written, and
// a certificate can have it.
func FuzzCheckTrustDomain(f *testing.F) {
	for _, name := range []string{"example.org", "spiffe://example.org", ".a", "a.", "a..b", "-", "_", "1.2.3.4", "[::1]", "a%2e", strings.Repeat("a", 64), strings.Repeat("a.", 128)} {
		f.Add(name)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if err := config.CheckTrustDomain(name); err != nil {
			if !strings.Contains(err.Error(), "; write ") {
				t.Errorf("%q %v: no remedy", name, err)
			}
			return
		}
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil || td.Name() != name {
			t.Fatalf("%q was accepted: %q, %v", name, td.Name(), err)
		}
		cert := &x509.Certificate{SerialNumber: big.NewInt(1), URIs: []*url.URL{td.ID().URL()}}
		der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
		if err != nil {
			t.Fatalf("%q was accepted: %v", name, err)
		}
		if _, err := x509.ParseCertificate(der); err != nil {
			t.Fatalf("%q was accepted: %v", name, err)
		}
	})
}
