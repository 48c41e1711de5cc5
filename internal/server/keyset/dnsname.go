package keyset

import (
	"fmt"
	"net/netip"
	"strings"
	"unicode/utf8"

	"golang.org/x/net/idna"
)

// The limits of the DNS names of an X.509-SVID. A certificate with the most and
// longest names has less than 30 KB, so a batch of 500 is below the 16 MiB that agents
// accept.
const (
	MaxDNSNames = 100
	maxDNSName  = 253 // RFC 1035, section 2.3.4, without the trailing dot
	maxLabel    = 63
)

// maxCommonName is ub-common-name of RFC 5280.
const maxCommonName = 64

// DNSNameError says which of several DNS names cannot be signed, and why.
type DNSNameError struct {
	Index   int    // of the name
	Name    string // as given
	Problem string // "is empty"
	Remedy  string // what to do
}

// Error implements error. A long name is truncated.
func (e *DNSNameError) Error() string {
	const shown = 80
	if len(e.Name) > shown {
		return fmt.Sprintf("%.*q... %s; %s", shown, e.Name, e.Problem, e.Remedy)
	}
	return fmt.Sprintf("%q %s; %s", e.Name, e.Problem, e.Remedy)
}

// CheckDNSNames checks the DNS names for an X.509-SVID as a SPIRE server does, and
// returns a [*DNSNameError] about the first that is invalid. Names consist of labels
// as in RFC 1123, section 2.1, international ones in ASCII (xn--...). The first label
// may be a wildcard as a whole. Case does not matter. A duplicate and an IP address
// are invalid.
func CheckDNSNames(names []string) error {
	seen := make(map[string]bool, min(len(names), MaxDNSNames))
	for i, name := range names {
		wrong := func(problem, remedy string) error { return &DNSNameError{i, name, problem, remedy} }
		if i >= MaxDNSNames {
			return wrong("is one name too many", fmt.Sprintf("there may be %d", MaxDNSNames))
		}
		if problem, remedy := checkDNSName(name); problem != "" {
			return wrong(problem, remedy)
		}
		lower := strings.ToLower(name)
		if seen[lower] {
			return wrong("is there twice", "remove one of them")
		}
		seen[lower] = true
	}
	return nil
}

// checkDNSName returns what is wrong with a name and what to do; empty texts if it is
// valid.
func checkDNSName(name string) (problem, remedy string) {
	switch {
	case name == "":
		return "is empty", "remove it"
	case len(name) > maxDNSName:
		return fmt.Sprintf("has %d characters", len(name)), fmt.Sprintf("a DNS name has %d at most", maxDNSName)
	case strings.ContainsFunc(name, func(r rune) bool { return r > 0x7F }): // utf8.RuneError for what is not UTF-8
		ascii, err := idna.Lookup.ToASCII(name)
		if err != nil || ascii == "" || !utf8.ValidString(name) {
			ascii = "xn--..."
		}
		return "is not ASCII", fmt.Sprintf("write an international name in ASCII, as %q", ascii)
	case strings.HasSuffix(name, "."):
		return "ends with a dot", "leave it out"
	}
	if _, err := netip.ParseAddr(name); err == nil {
		return "is an IP address", "give the name that clients connect to"
	}
	rest, wild := strings.CutPrefix(strings.ToLower(name), "*.")
	if strings.Contains(rest, "*") || wild && rest == "" {
		return "has a wildcard that is not the whole first label", "write it as *.example.org"
	}
	last := ""
	for label := range strings.SplitSeq(rest, ".") {
		last = label
		if problem, remedy := checkLabel(label); problem != "" {
			return problem, remedy
		}
	}
	if strings.Trim(last, "0123456789") == "" {
		return "ends in a number, as an IP address does", "give the name that clients connect to"
	}
	// A label with two hyphens in third place must be a valid international name.
	if ascii, err := idna.Lookup.ToASCII(rest); err != nil || ascii != rest {
		return "has a label with -- in third place and is no valid international name", "write it as it is registered"
	}
	return "", ""
}

// checkLabel checks one label in lower case, which is not a wildcard.
func checkLabel(label string) (problem, remedy string) {
	switch {
	case label == "":
		return "has an empty label", "write one dot between two labels and none before the first"
	case len(label) > maxLabel:
		return fmt.Sprintf("has a label of %d characters", len(label)), fmt.Sprintf("a label has %d at most", maxLabel)
	}
	for _, c := range label {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return fmt.Sprintf("has the character %q", c), "a label is made of letters, digits and hyphens"
		}
	}
	if strings.Trim(label, "-") != label {
		return fmt.Sprintf("has the label %q", label), "a label begins and ends with a letter or a digit"
	}
	return "", ""
}

// commonName returns the common name of an X.509-SVID with DNS names: the first of
// them, as from a SPIRE server, for software that reads only the common name. A name
// that is too long for a common name is left out.
func commonName(dnsNames []string) string {
	if len(dnsNames) == 0 || len(dnsNames[0]) > maxCommonName {
		return ""
	}
	return dnsNames[0]
}
