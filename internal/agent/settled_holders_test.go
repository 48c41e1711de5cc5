package agent_test

import (
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/metrics"
)

// check compares the settled authorities with the SVIDs in use.
func (h *settledHistory) check() {
	w := h.w
	synctest.Wait()
	state := w.agent.State()
	var uses map[string]string
	for _, k := range h.tainted {
		a, _ := authorityOf(state, metrics.TypeX509, k.X509AuthorityID)
		if !settled(a) {
			continue
		}
		h.settledCount++
		if uses == nil {
			uses = h.uses()
		}
		if who := uses[k.X509AuthorityID]; who != "" {
			w.t.Fatalf("after %v: authority %s is settled, but a valid SVID of it is with %s", h.past, k.X509AuthorityID, who)
		}
		if h.signs(k) {
			w.t.Fatalf("after %v: authority %s is settled, but an SVID of it that was requested before is in flight", h.past, k.X509AuthorityID)
		}
	}
}

// signs reports whether SVIDs of k are in flight that the agent requested before it had the
// taint.
func (h *settledHistory) signs(k keyset.Keyset) bool {
	_, since := h.w.agent.Bundle().State(k.X509AuthorityID)
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	for asked, by := range h.w.signing {
		if by == k.ID && asked.at.Before(since) {
			return true
		}
	}
	return false
}

// uses returns who has a valid SVID, by authority.
func (h *settledHistory) uses() map[string]string {
	w, now, out := h.w, time.Now(), make(map[string]string)
	has := func(u *update, who string, args ...any) {
		for authority, end := range u.ends {
			if end.After(now) {
				out[authority] = fmt.Sprintf(who, args...)
			}
		}
	}
	for _, p := range h.workloads {
		if p.asked != nil {
			has(p.asked, "workload %d, which has called", p.name.PID)
		}
		for _, c := range p.clients {
			if last, ok := c.stream.last(); ok {
				has(&last, "workload %d (stopped: %v, back: %v)", p.name.PID, p.stopped(), c.back)
			} else if c.has != nil {
				has(c.has, "workload %d (stopped: %v, back: %v)", p.name.PID, p.stopped(), c.back)
			}
		}
	}
	keeps := func(c certificate, where string) {
		if c.notAfter.After(now) {
			out[c.authority] = where
		}
	}
	for i := range entryLifetimes {
		for _, id := range w.agent.Cache().Match([]cache.Selector{{Type: "test", Value: fmt.Sprint(i)}}).Identities {
			keeps(h.certificate(id.SVID.Leaf, func() []byte { return id.SVID.Leaf }), "the cache for "+id.Entry.ID)
		}
	}
	if raw, err := os.ReadFile(filepath.Join(w.cfg.DataDir, "identity.json")); err == nil {
		keeps(h.certificate(raw, func() []byte {
			var identity struct{ Chain [][]byte }
			w.check(json.Unmarshal(raw, &identity))
			return identity.Chain[0]
		}), "the agent, in data_dir")
	}
	if h.noRuntimeDir {
		return out
	}
	kept, err := filepath.Glob(filepath.Join(w.cfg.RuntimeDir, "*.json"))
	w.check(err)
	hidden, err := filepath.Glob(filepath.Join(w.hiddenRuntimeDir(), "*.json"))
	w.check(err)
	for _, file := range append(kept, hidden...) {
		raw, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		keeps(h.certificate(raw, func() []byte {
			var record struct{ SVID struct{ Leaf []byte } }
			w.check(json.Unmarshal(raw, &record))
			return record.SVID.Leaf
		}), file)
	}
	return out
}

// certificate is the part of a certificate that the test uses.
type certificate struct {
	authority string
	notAfter  time.Time
}

// certificate returns the certificate that der finds in raw.
func (h *settledHistory) certificate(raw []byte, der func() []byte) certificate {
	c, known := h.certs[string(raw)]
	if !known {
		cert, err := x509.ParseCertificate(der())
		h.w.check(err)
		c = certificate{hex.EncodeToString(cert.AuthorityKeyId), cert.NotAfter}
		h.certs[string(raw)] = c
	}
	return c
}
