package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"sync"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/agent/upstream"
)

// adoption remembers which authorities of trust_bundle_file are no news: those that
// the trust began with, and those that were in the bundle in force while the file
// had them, or later. Whether such an authority is trusted is for the server to say,
// and one that it has removed does not come back with the file. Any other is the
// operator's word. It counts when the server cannot be verified otherwise, as after
// the loss of all its keys.
type adoption struct {
	mu      sync.Mutex
	adopted []string // fingerprints; nil: not known, the next file that is read says them
	// removed are those that have left the bundle in force since the file was
	// compared with it.
	removed  []string
	compare  chan struct{} // wakes followTrust
	verified []string      // what the log has said that the server was verified with
	trouble  string        // what was logged of a file that cannot be read
}

// fingerprints names X.509 authorities by their certificates: one that is signed
// anew for the key of another is another.
func fingerprints(b *bundle.Bundle) []string {
	out := []string{}
	if b == nil {
		return out
	}
	for _, x := range b.X509() {
		sum := sha256.Sum256(x.Certificate.Raw)
		out = append(out, hex.EncodeToString(sum[:]))
	}
	return out
}

// given is what the operator says to trust the server by; nil for an insecure
// bootstrap.
func (a *Agent) given() (*bundle.Bundle, error) {
	if a.cfg.TrustBundleFile == "" {
		return a.cfg.TrustBundle, nil
	}
	return upstream.LoadTrustBundle(a.cfg.TrustBundleFile, a.cfg.TrustDomain)
}

// trustBegins says that the server is trusted by what the operator gives.
func (a *Agent) trustBegins(given *bundle.Bundle) {
	a.adoption.adopted = fingerprints(given)
	if given != nil {
		bundle.LogLeftOut(a.log, a.cfg.TrustDomain, nil, given.LeftOut())
	}
}

// trustGoesOn says that the server is trusted by the bundle kept. Where it is not
// known what that began with, it is taken to be what the operator gives now.
func (a *Agent) trustGoesOn(kept *bundle.Bundle, adopted []string) {
	a.adoption.adopted = adopted
	given, err := a.given()
	if err != nil {
		return // it is not needed now
	}
	a.compareTrust(given)
	if adopted == nil {
		a.store.SaveBundle(kept, a.adoption.adopted)
	}
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
	if given == nil {
		return nil, nil
	}
	a.compareTrust(given)
	var news bundle.Content
	var ids []string
	for i, f := range fingerprints(given) {
		if x := given.X509()[i]; !slices.Contains(s.adopted, f) {
			news.X509, ids = append(news.X509, x), append(ids, x.ID)
		}
	}
	trust, err = bundle.New(a.cfg.TrustDomain, news)
	if err != nil {
		return nil, nil // there is none
	}
	return trust, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if slices.Equal(s.verified, ids) {
			return
		}
		s.verified = ids
		a.log.Warn("server verified with the changed trust_bundle_file, the bundle in force does not have its authority", "authorities", ids)
		bundle.LogLeftOut(a.log, a.cfg.TrustDomain, nil, given.LeftOut())
	}
}

// compareTrust finds out which authorities of what the operator gives are no news. It
// is for the holder of adoption.mu.
func (a *Agent) compareTrust(given *bundle.Bundle) {
	s := &a.adoption
	known := slices.Concat(s.adopted, s.removed, fingerprints(a.trust()))
	s.removed = nil
	now := fingerprints(given)
	if s.adopted != nil {
		now = slices.DeleteFunc(now, func(f string) bool { return !slices.Contains(known, f) })
	}
	if s.adopted != nil && slices.Equal(now, s.adopted) {
		return
	}
	s.adopted = now
	if a.applied.Load() != nil { // else with the first bundle
		a.store.SaveBundle(a.trust(), now)
	}
}

// keepOwn keeps the own bundle that has come into force in place of prev, and has
// the operator's file be compared with the two.
func (a *Agent) keepOwn(prev, own *bundle.Bundle) {
	s := &a.adoption
	s.mu.Lock()
	defer s.mu.Unlock()
	in := fingerprints(own)
	for _, f := range fingerprints(prev) {
		if !slices.Contains(in, f) {
			s.removed = append(s.removed, f)
		}
	}
	a.store.SaveBundle(own, s.adopted)
	select {
	case s.compare <- struct{}{}:
	default:
	}
}

// followTrust compares the operator's file with the bundle in force, whenever that
// has changed, until ctx is done. Nothing else waits for the disk that the file is on.
func (a *Agent) followTrust(ctx context.Context) {
	s := &a.adoption
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.compare:
		}
		given, err := a.given()
		if err != nil {
			continue // with the next change
		}
		s.mu.Lock()
		a.compareTrust(given)
		s.mu.Unlock()
	}
}
