package keyset_test

import (
	"crypto/x509"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/test/memory"
)

var (
	label63 = strings.Repeat("a", 63)
	name253 = strings.Join([]string{label63, label63, label63, label63[:61]}, ".")
)

func TestCheckDNSNames(t *testing.T) {
	t.Parallel()
	hundred := make([]string, 100)
	for i := range hundred {
		hundred[i] = fmt.Sprintf("n%d.example.org", i)
	}
	for _, names := range [][]string{
		nil, {}, {"localhost"}, {"web.example.org", "example.org"}, {"WEB.Example.org"}, {"*.example.org", "web.example.org"}, {"*.local"},
		{"a-b.c-d"}, {"0.1a"}, {"a0.z9"}, {"10-0-0-1.ns.pod"}, {"xn--bcher-kva.example"}, {name253}, {"*." + name253[2:]}, hundred,
	} {
		if err := keyset.CheckDNSNames(names); err != nil {
			t.Errorf("%.100q: %v", names, err)
		}
	}
	for name, want := range map[string]string{
		"":                            "is empty; ",
		".":                           "ends with a dot; leave it out",
		"..":                          "ends with a dot; ",
		"web.example.org.":            "ends with a dot; ",
		".example.org":                "has an empty label; ",
		"web..example.org":            "has an empty label; ",
		"*":                           "has a wildcard that is not the whole first label; write it as *.example.org",
		"*.":                          "ends with a dot; ",
		"**.example.org":              "has a wildcard ",
		"*.*.example.org":             "has a wildcard ",
		"*web.example.org":            "has a wildcard ",
		"web.*.org":                   "has a wildcard ",
		"*..org":                      "has an empty label; ",
		"192.0.2.1":                   "is an IP address; give the name that clients connect to",
		"2001:db8::1":                 "is an IP address; ",
		"::1%eth0":                    "is an IP address; ",
		"[::1]":                       `has the character '['; `,
		"192.0.2.01":                  "ends in a number, as an IP address does; ",
		"*.0.2.1":                     "ends in a number, ",
		"1":                           "ends in a number, ",
		"a_b.example.org":             `has the character '_'; a label is made of letters, digits and hyphens`,
		" web.example.org":            `has the character ' '; `,
		"web.example.org\n":           `has the character '\n'; `,
		"web\x00.example.org":         `has the character '\x00'; `,
		"spiffe://example.org/web":    `has the character ':'; `,
		"web`.example.org":            "has the character '`'; ",
		"web{.example.org":            `has the character '{'; `,
		"web/.example.org":            `has the character '/'; `,
		"web.example.org:443":         `has the character ':'; `,
		"-web.example.org":            `has the label "-web"; a label begins and ends with a letter or a digit`,
		"web-.example.org":            `has the label "web-"; `,
		"-":                           `has the label "-"; `,
		"bücher.example":              `is not ASCII; write an international name in ASCII, as "xn--bcher-kva.example"`,
		"\u212aube.example":           `is not ASCII; `, // the Kelvin sign, which is a k in lower case
		"web\u3002example":            `is not ASCII; `, // a dot in Japanese
		"b\u00fc_cher.example":        `is not ASCII; write an international name in ASCII, as "xn--..."`,
		"web\x7f.example.org":         `has the character '\x7f'; `,
		"web\xff.example":             `is not ASCII; write an international name in ASCII, as "xn--..."`,
		"xn--.example":                `has the label "xn--"; `,
		"xn--a.example":               "has a label with -- in third place and is no valid international name; ",
		"ab--c.example":               "has a label with -- ",
		label63 + "a.example":         "has a label of 64 characters; a label has 63 at most",
		name253 + "a":                 "has 254 characters; a DNS name has 253 at most",
		strings.Repeat("x", 1<<20):    "has 1048576 characters; ",
		"*." + strings.Repeat("*", 9): "has a wildcard ",
	} {
		err := keyset.CheckDNSNames([]string{"first.example.org", name})
		e, ok := errors.AsType[*keyset.DNSNameError](err)
		if !ok || e.Index != 1 || e.Name != name || !strings.HasPrefix(e.Problem+"; "+e.Remedy, want) || e.Remedy == "" {
			t.Errorf("%.100q: %v, want %s", name, err, want)
		}
		if err != nil && len(err.Error()) > 600 {
			t.Errorf("%.100q: the error has %d bytes", name, len(err.Error()))
		}
	}
	for want, names := range map[string][]string{
		`"a.org" is there twice; remove one of them`:                      {"a.org", "b.org", "a.org"},
		`"A.org" is there twice; remove one of them`:                      {"a.org", "A.org"},
		`"one.more" is one name too many; there may be 100`:               append(slices.Clone(hundred), "one.more"),
		`"n0.example.org" is one name too many; there may be 100`:         slices.Repeat(hundred, 10_000),
		`"` + label63 + `aaaaaaaaaaaaaaaaa" has a label of 80`:            {strings.Repeat("a", 80)},
		`"` + label63 + `aaaaaaaaaaaaaaaaa"... has 300 characters; a DNS`: {strings.Repeat("a", 300)},
	} {
		if err := keyset.CheckDNSNames(names); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

// A certificate with DNS names is an X.509-SVID, and is accepted by a TLS client
// without SPIFFE for each of the names.
func TestSignX509WithDNSNames(t *testing.T) {
	t.Parallel()
	d := open(t, keyset.Config{})
	for name, tt := range map[string]struct {
		names []string
		cn    string
	}{
		"none":              {nil, ""},
		"in their order":    {[]string{"web.example.org", "*.apps.example.org", "a"}, "web.example.org"},
		"a wildcard first":  {[]string{"*.apps.example.org"}, "*.apps.example.org"},
		"a long name first": {[]string{label63 + ".a", "a"}, ""},
		"a name of 64":      {[]string{label63[:62] + ".a"}, label63[:62] + ".a"},
	} {
		svid, err := d.SignX509(workload, newKey(t).Public(), 0, tt.names...)
		if err != nil {
			t.Fatal(err)
		}
		cert := parse(t, svid.DER)
		if !slices.Equal(cert.DNSNames, tt.names) || cert.Subject.CommonName != tt.cn || len(cert.IPAddresses)+len(cert.EmailAddresses) > 0 {
			t.Errorf("%s: DNS names %q, common name %q", name, cert.DNSNames, cert.Subject.CommonName)
		}
		authorities := x509bundle.FromX509Authorities(td, d.Bundle().Certificates())
		if id, _, err := x509svid.Verify([]*x509.Certificate{cert}, authorities); err != nil || id != workload {
			t.Errorf("%s: verified %v, %v", name, id, err)
		}
		pool := x509.NewCertPool()
		pool.AddCert(d.Bundle().X509[0].Certificate)
		for _, dns := range tt.names {
			host := strings.Replace(dns, "*", "any", 1)
			if _, err := cert.Verify(x509.VerifyOptions{Roots: pool, DNSName: host}); err != nil {
				t.Errorf("%s: %s: %v", name, host, err)
			}
		}
		if _, err := cert.Verify(x509.VerifyOptions{Roots: pool, DNSName: "other.example.org"}); err == nil {
			t.Errorf("%s: verifies as any host", name)
		}
	}
}

// A batch of SVIDs with the most and longest names, and all else as long as possible,
// fits the largest answer that agents accept.
func TestLargestSVIDs(t *testing.T) {
	t.Parallel()
	names := make([]string, keyset.MaxDNSNames)
	for i := range names {
		names[i] = fmt.Sprintf("%03d", i) + name253[3:]
	}
	if err := keyset.CheckDNSNames(names); err != nil {
		t.Fatal(err)
	}
	svid, err := open(t, keyset.Config{}).SignX509(workload, newKey(t).Public(), 0, names...)
	if err != nil {
		t.Fatal(err)
	}
	// 2 KiB of a SPIFFE ID and 1 KiB of an RSA key of 8192 bits.
	if n := len(svid.DER) + 3<<10; n > 30_000 || 500*n > 16<<20 {
		t.Errorf("an X.509-SVID may have %d bytes", n)
	}
}

var label = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// FuzzCheckDNSNames: accepted names are well-formed, and a TLS client accepts a
// certificate for them.
func FuzzCheckDNSNames(f *testing.F) {
	for _, seed := range []string{
		"web.example.org", "*.example.org", "xn--bcher-kva.example", "10-0-0-1.pod", "1.2.3.4", "WEB", "*", "*.", ".", "a..b", "a\x00b", "\u212a", name253, "-a", "a.0x1", "xn--a",
	} {
		f.Add(seed)
	}
	d, err := keyset.Open(f.Context(), keyset.Config{TrustDomain: td, Storage: new(memory.Keysets)})
	if err != nil {
		f.Fatal(err)
	}
	key := newKey(f).Public()
	f.Fuzz(func(t *testing.T, name string) {
		err := keyset.CheckDNSNames([]string{name})
		if err != nil {
			if len(err.Error()) > 1000 {
				t.Fatalf("the error has %d bytes", len(err.Error()))
			}
			return
		}
		lower := strings.ToLower(name)
		labels := strings.Split(strings.TrimPrefix(lower, "*."), ".")
		for _, l := range labels {
			if len(name) > 253 || !label.MatchString(l) {
				t.Fatalf("accepted %q", name)
			}
		}
		if _, err := strconv.Atoi(labels[len(labels)-1]); err == nil {
			t.Fatalf("accepted %q, which may be an address", name)
		}
		if keyset.CheckDNSNames([]string{lower}) != nil || keyset.CheckDNSNames([]string{name, lower}) == nil {
			t.Fatalf("%q depends on upper and lower case", name)
		}
		svid, err := d.SignX509(workload, key, 0, lower)
		if err != nil {
			t.Fatalf("accepted %q, but did not sign it: %v", name, err)
		}
		cert := parse(t, svid.DER)
		if !slices.Equal(cert.DNSNames, []string{lower}) || len(cert.URIs) != 1 || cert.URIs[0].String() != workload.String() {
			t.Fatalf("signed %q and %v", cert.DNSNames, cert.URIs)
		}
		host := strings.Replace(lower, "*", "any", 1)
		if err := cert.VerifyHostname(host); err != nil && len(host) <= 253 {
			t.Fatalf("a client that connects to %q refuses it: %v", host, err)
		}
	})
}
