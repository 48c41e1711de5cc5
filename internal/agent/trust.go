package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"log/slog"
	"slices"
	"sync"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/agent/bootstrap"
)

// operatorTrust tracks which authorities of trust_bundle_file the agent has adopted:
// those of its first trust, and those that were in the file and in the bundle in force
// at the same time, or in the bundle first. The server decides whether an adopted
// authority is trusted, and one that it has removed does not return with the file. Any
// other authority in the file is new. It is trusted when the server cannot be verified
// otherwise, as after the loss of all its keys.
type operatorTrust struct {
	mu      sync.Mutex
	adopted []string // fingerprints; nil: not known, the next file read defines them
	// removed has the authorities that have left the bundle in force since the last
	// comparison with the file.
	removed  []string
	changed  chan struct{} // wakes compareTrust
	verified []string      // IDs in the last log line about the verified server
}

// fingerprints returns the hashes of the X.509 authorities' certificates. Two
// certificates for one key have different fingerprints.
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

// configuredTrust returns the bundle that the operator configures, nil for an insecure
// bootstrap and for a source that is not a file.
func (a *Agent) configuredTrust() (*bundle.Bundle, error) {
	if a.cfg.TrustBundleFile == "" {
		return a.cfg.TrustBundle, nil
	}
	return a.source().Fetch(context.Background(), bootstrap.Request{})
}

// beginTrust adopts the authorities that the operator configures. Only New calls it.
func (a *Agent) beginTrust(given *bundle.Bundle) {
	a.operatorTrust.adopted = fingerprints(given)
	if given != nil {
		bundle.LogLeftOut(a.log, a.cfg.TrustDomain, nil, given.LeftOut())
	}
}

// resumeTrust continues with the stored bundle and the authorities adopted with it. If
// those are not known, it adopts the ones that the operator configures now.
func (a *Agent) resumeTrust(stored *bundle.Bundle, adopted []string) {
	a.operatorTrust.adopted = adopted
	given, err := a.configuredTrust()
	if err != nil {
		return // the file is not needed now
	}
	a.compareTrustLocked(given) // not shared yet
	if adopted == nil {
		a.store.SaveBundle(stored, a.operatorTrust.adopted)
	}
}

// newOperatorTrust returns the authorities of trust_bundle_file that are new, nil when
// there are none, and a function to call when they have verified the server.
func (a *Agent) newOperatorTrust() (trust *bundle.Bundle, verified func()) {
	given, err := a.configuredTrust()
	s := &a.operatorTrust
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		a.lines.Note(slog.LevelWarn, "trust_bundle_file not loaded", err.Error(), "error", err)
		return nil, nil
	}
	if given == nil {
		return nil, nil
	}
	a.compareTrustLocked(given)
	var content bundle.Content
	var ids []string
	for i, f := range fingerprints(given) {
		if x := given.X509()[i]; !slices.Contains(s.adopted, f) {
			content.X509, ids = append(content.X509, x), append(ids, x.ID)
		}
	}
	trust, err = bundle.New(a.cfg.TrustDomain, content)
	if err != nil {
		return nil, nil // no new authority
	}
	return trust, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if slices.Equal(s.verified, ids) {
			return
		}
		s.verified = ids
		a.log.Warn("server verified with the changed trust_bundle_file, the bundle in force lacks its authority", "authority_ids", ids)
		bundle.LogLeftOut(a.log, a.cfg.TrustDomain, nil, given.LeftOut())
	}
}

// compareTrustLocked updates the adopted authorities from the file's and the bundle in
// force. It needs operatorTrust.mu.
func (a *Agent) compareTrustLocked(given *bundle.Bundle) {
	s := &a.operatorTrust
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
	if a.applied.Load() != nil { // otherwise saved with the first bundle
		a.store.SaveBundle(a.trust(), now)
	}
}

// saveBundle stores the bundle that has replaced prev, and wakes compareTrust.
func (a *Agent) saveBundle(prev, current *bundle.Bundle) {
	s := &a.operatorTrust
	s.mu.Lock()
	defer s.mu.Unlock()
	now := fingerprints(current)
	for _, f := range fingerprints(prev) {
		if !slices.Contains(now, f) {
			s.removed = append(s.removed, f)
		}
	}
	a.store.SaveBundle(current, s.adopted)
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

// compareTrust compares the operator's file with the bundle in force after each change
// of the bundle, until ctx is done. It has its own goroutine, because reading the file
// may block.
func (a *Agent) compareTrust(ctx context.Context) {
	s := &a.operatorTrust
	if a.cfg.TrustSource != nil {
		return // there is no file
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.changed:
		}
		given, err := a.configuredTrust()
		if err != nil {
			continue // until the next change
		}
		s.mu.Lock()
		a.compareTrustLocked(given)
		s.mu.Unlock()
	}
}
