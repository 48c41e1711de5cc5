package config

import (
	"regexp"
	"slices"
	"strings"
)

// Kubernetes sets variables in every container for each Service of its namespace, named
// after the Service, such as RENEWD_SERVER_PORT=tcp://10.0.0.1:8081 for one called
// renewd-server (Kubernetes, "Environment variables" of Services). They are no mistake.
var (
	serviceLink = regexp.MustCompile(`_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_[0-9]+_(TCP|UDP|SCTP)(_PROTO|_PORT|_ADDR)?)$`)
	serviceURL  = regexp.MustCompile(`^(tcp|udp|sctp)://`)
)

func isServiceLink(name, value string) bool {
	return serviceLink.MatchString(name) || strings.HasSuffix(name, "_PORT") && serviceURL.MatchString(value)
}

// UnknownVariables returns a problem for each variable of an environment, NAME=VALUE each,
// that begins with [Schema.Env] and belongs to no field, in the order of their names. They
// set nothing. The problems have no values, which may be secrets.
func (s *Schema[C]) UnknownVariables(environ []string) []Problem {
	var names []string
	for i := range s.Fields {
		if name := s.Variable(&s.Fields[i]); name != "" {
			names = append(names, name)
		}
	}
	var out []Problem
	for _, pair := range slices.Sorted(slices.Values(environ)) {
		name, value, _ := strings.Cut(pair, "=")
		if !strings.HasPrefix(name, s.Env) || value == "" || slices.Contains(names, name) || isServiceLink(name, value) {
			continue
		}
		meant := s.nearest(name, names)
		others := func(other string) bool {
			return name == other || strings.HasSuffix(other, "_") && strings.HasPrefix(name, other)
		}
		switch {
		case meant != "":
			out = append(out, Problem{Where: name, What: "is not the variable of a field", Remedy: "did you mean " + meant + "?"})
		case !slices.ContainsFunc(s.Others, others):
			out = append(out, Problem{Where: name, What: "is not the variable of a field", Remedy: "unset it; \"" + s.Help + "\" lists the variables"})
		}
	}
	return out
}

// nearest returns the variable that a name is taken for; "" if none is near.
func (s *Schema[C]) nearest(name string, names []string) string {
	best, least := "", 4
	for _, known := range names {
		if d := distance(name, known); d < least {
			best, least = known, d
		}
	}
	if best != "" {
		return best
	}
	// The last part of the name of a field, without its sections.
	last := strings.TrimPrefix(name, s.Env)
	for _, known := range names {
		if len(last) > 3 && strings.HasSuffix(known, "_"+last) {
			return known
		}
	}
	return ""
}
