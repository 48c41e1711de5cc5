package config

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxTrustDomain is the longest name of a trust domain, in bytes (SPIFFE-ID, section 2.3).
const maxTrustDomain = 255

// CheckTrustDomain returns what is wrong with the name of a trust domain, and the remedy;
// nil if every SPIFFE program can use the name and every certificate can have it. The
// error continues a sentence that begins with the name.
//
// [spiffeid.TrustDomainFromString] accepts more: a SPIFFE ID, of which it takes the trust
// domain, names of any length, and empty labels, with which crypto/x509 reads no certificate.
func CheckTrustDomain(name string) error {
	what := trustDomainProblem(name)
	if what == "" {
		return nil
	}
	remedy := "write it like example.org"
	if meant := bareTrustDomain(name); meant != name && trustDomainProblem(meant) == "" {
		remedy = "write " + meant
	}
	return errors.New(what + "; " + remedy)
}

// trustDomainProblem returns "" for a valid name.
func trustDomainProblem(name string) string {
	switch {
	case name == "":
		return "is empty"
	case strings.Contains(name, "://"):
		return "is a SPIFFE ID or another URL, not the name of a trust domain"
	case strings.Contains(name, "/"):
		return "has a path, which is not part of a trust domain"
	case strings.Contains(name, ":"):
		return "has a port, which is not part of a trust domain"
	case len(name) > maxTrustDomain:
		return fmt.Sprintf("has %d bytes, and a trust domain has at most %d", len(name), maxTrustDomain)
	case name != strings.ToLower(name):
		return "has upper-case letters, which a trust domain cannot have"
	case strings.Contains("."+name+".", ".."):
		return "has an empty label, which no certificate can have"
	}
	if _, err := spiffeid.TrustDomainFromString(name); err != nil {
		return "has a character that a trust domain cannot have; only a to z, 0 to 9, dots, - and _ are allowed"
	}
	return ""
}

// bareTrustDomain drops from a name what is around that of a trust domain.
func bareTrustDomain(name string) string {
	if _, after, ok := strings.Cut(name, "://"); ok {
		name = after
	}
	name, _, _ = strings.Cut(name, "/")
	name, _, _ = strings.Cut(name, ":")
	return strings.ToLower(strings.Trim(name, "."))
}
