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
	// news: the agent may be restarted.
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
	a.adoption.adopted, a.adoption.pending = digest(given), digest(given)
	if given != nil {
		bundle.LogLeftOut(a.log, a.cfg.TrustDomain, nil, given.LeftOut())
	}
}

// trustGoesOn says that the server is trusted by the bundle kept. Where it is not
// known what that began with, it is taken to be what the operator gives now.
func (a *Agent) trustGoesOn() {
	adopted, err := a.store.LoadAdopted()
	if err != nil {
		a.log.Error("digest of the trust_bundle_file in use not loaded, a changed file is not noticed", "error", err)
		return
	}
	if adopted == "" {
		given, err := a.given()
		if err != nil {
			return // it is not needed now
		}
		a.adoption.pending = digest(given)
		a.adopt()
		return
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

// adopt notes that the server has answered with the bundle that is in force now.
func (a *Agent) adopt() {
	s := &a.adoption
	s.mu.Lock()
	pending := s.pending
	s.mu.Unlock()
	if pending == "" {
		return
	}
	if err := a.store.SaveAdopted(pending); err != nil {
		a.log.Error("digest of the trust_bundle_file in use not kept", "error", err)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.adopted = pending
	if s.pending == pending {
		s.pending = ""
	}
}
