package agent

import (
	"sync"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/upstream"
)

// adoption remembers what the operator had given when the trust that is in force
// began: that is no news any more, however the server's keys have changed since,
// and an authority that the server has removed does not come back with it.
// Anything else in trust_bundle_file is the operator's word. It counts when the
// server cannot be verified otherwise, as after the loss of all its keys.
type adoption struct {
	mu      sync.Mutex
	adopted string // digest; empty: not known
	// pending is the digest of what the server was verified with, to be adopted
	// with the bundle that it answers with. Before that the file has to stay
	// news.
	pending string
	trouble string // what was logged of a file that cannot be read
}

// insecurely is the digest of what an insecure bootstrap was given.
const insecurely = "none"

// given is what the operator says to trust the server by; nil for an insecure
// bootstrap.
func (a *Agent) given() (*bundle.Bundle, error) {
	if a.cfg.TrustBundleFile == "" {
		return a.cfg.TrustBundle, nil
	}
	return upstream.LoadTrustBundle(a.cfg.TrustBundleFile, a.cfg.TrustDomain)
}

func digest(given *bundle.Bundle) string {
	if given == nil {
		return insecurely
	}
	return given.Digest()
}

// trustBegins says that the server is trusted by what the operator gives.
func (a *Agent) trustBegins(given *bundle.Bundle) {
	a.adoption.adopted = digest(given)
	if given != nil {
		bundle.LogLeftOut(a.log, a.cfg.TrustDomain, nil, given.LeftOut())
	}
}

// trustGoesOn says that the server is trusted by the bundle kept. Where it is not
// known what that began with, it is taken to be what the operator gives now.
func (a *Agent) trustGoesOn(kept *bundle.Bundle, adopted string) {
	if adopted == "" {
		given, err := a.given()
		if err != nil {
			return // it is not needed now
		}
		adopted = digest(given)
		a.store.SaveBundle(kept, adopted)
	}
	a.adoption.adopted = adopted
}

// operator is the Operator of the connection to the server.
func (a *Agent) operator() (trust *bundle.Bundle, verified func()) {
	given, err := a.given()
	s := &a.adoption
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		if text := err.Error(); text != s.trouble {
			s.trouble = text
			a.log.Warn("trust_bundle_file not loaded", "error", err)
		}
		return nil, nil
	}
	if given == nil || s.adopted == "" || digest(given) == s.adopted {
		return nil, nil
	}
	return given, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.pending == digest(given) {
			return
		}
		s.pending = digest(given)
		var ids []string
		for _, x := range given.X509() {
			ids = append(ids, x.ID)
		}
		a.log.Warn("server verified with the changed trust_bundle_file, the bundle in force does not have its authority", "authorities", ids)
		bundle.LogLeftOut(a.log, a.cfg.TrustDomain, nil, given.LeftOut())
	}
}

// adopt returns the digest to be kept with the bundle that has just come into
// force. answered says that it is the server's answer: what the server was
// verified with is adopted then.
func (a *Agent) adopt(answered bool) string {
	s := &a.adoption
	s.mu.Lock()
	defer s.mu.Unlock()
	if answered && s.pending != "" {
		s.adopted, s.pending = s.pending, ""
	}
	return s.adopted
}
