package federation

import (
	"errors"
	"fmt"
	"net/url"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// EndpointError describes an invalid field of an [Endpoint]. Field is its name in the
// configuration file, below federation.TRUSTDOMAIN.
type EndpointError struct {
	TrustDomain            spiffeid.TrustDomain
	Field, Problem, Remedy string
}

// Error implements error.
func (e *EndpointError) Error() string {
	return fmt.Sprintf("federation.%s.%s %s: %s", e.TrustDomain.Name(), e.Field, e.Problem, e.Remedy)
}

// Check reports every invalid field of the endpoints of a server in the trust domain own,
// each as an [EndpointError].
func Check(own spiffeid.TrustDomain, endpoints []Endpoint) error {
	var errs []error
	byName := make(map[spiffeid.TrustDomain]Endpoint)
	for _, e := range endpoints {
		if _, dup := byName[e.TrustDomain]; dup {
			errs = append(errs, &EndpointError{e.TrustDomain, "endpoint_url", "is given twice", "keep one of the two"})
		}
		byName[e.TrustDomain] = e
	}
	for _, e := range endpoints {
		bad := func(field, problem, remedy string) {
			errs = append(errs, &EndpointError{e.TrustDomain, field, problem, remedy})
		}
		if e.TrustDomain == own {
			bad("endpoint_url", "is of the server's own trust domain", "remove it: its bundle is the server's own")
			continue
		}
		if e.URL == "" {
			bad("endpoint_url", "is not set", "give the https URL of its bundle endpoint")
		} else if problem := badURL(e.URL); problem != "" {
			bad("endpoint_url", problem, "write it as https://host:port/path")
		}
		self := e.ID.TrustDomain() == e.TrustDomain
		switch {
		case e.Profile == "":
			bad("profile", "is not set", "ask the endpoint's operator and use "+ProfileSPIFFE+" or "+ProfileWeb)
		case e.Profile == ProfileWeb && !e.ID.IsZero():
			bad("endpoint_spiffe_id", "is not used with profile "+ProfileWeb, "remove it or set profile: "+ProfileSPIFFE)
		case e.Profile == ProfileWeb:
		case e.Profile != ProfileSPIFFE:
			bad("profile", "is not a profile", "use "+ProfileSPIFFE+" or "+ProfileWeb)
		case e.ID.IsZero():
			bad("endpoint_spiffe_id", "is not set and profile "+ProfileSPIFFE+" needs it", "give the SPIFFE ID of the endpoint, such as spiffe://"+e.TrustDomain.Name()+"/spire/server")
		case self && e.BundleFile == "":
			bad("bundle_file", "is not set, and the endpoint is in this trust domain itself", "give a file with its bundle to verify the first connection")
		case !self && !verifiable(own, e, byName):
			bad("endpoint_spiffe_id", "is in a trust domain whose bundle is not available", "configure "+e.ID.TrustDomain().Name()+", too, under federation, or give a bundle_file there")
		}
	}
	return errors.Join(errs...)
}

// badURL returns why a URL cannot be that of a bundle endpoint (SPIFFE Federation,
// sections 5.2.1.1 and 5.2.2.1); empty if it can.
func badURL(text string) string {
	u, err := url.Parse(text)
	switch {
	case err != nil:
		return "is not a URL"
	case u.Scheme != "https":
		return "is not an https URL"
	case u.User != nil:
		return "has a user in it"
	case u.Hostname() == "":
		return "has no host"
	}
	return ""
}

// verifiable reports whether an endpoint can be verified: the bundle of its trust domain
// is known, or the endpoint of that trust domain is verifiable.
func verifiable(own spiffeid.TrustDomain, e Endpoint, byName map[spiffeid.TrustDomain]Endpoint) bool {
	for range len(byName) + 1 {
		td := e.ID.TrustDomain()
		next, ok := byName[td]
		switch {
		case td == own:
			return true
		case !ok:
			return false
		case next.BundleFile != "" || next.Profile == ProfileWeb:
			return true
		}
		e = next
	}
	return false // a cycle
}
