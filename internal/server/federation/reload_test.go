package federation_test

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/server/federation"
)

// reload replaces the endpoints of the running follower.
func (w *world) reload(endpoints ...federation.Endpoint) {
	w.t.Helper()
	apply, err := w.follower.Reload(endpoints)
	w.check(err)
	apply()
	synctest.Wait()
}

// TestReload: an endpoint is added, changed and removed while the others are followed as
// before.
func TestReload(t *testing.T) {
	inWorld(t, func(w *world) {
		p, third := w.domain(partner), w.domain(spiffeid.RequireTrustDomainFromString("third.example"))
		p.hint, third.hint = time.Hour, time.Hour
		p.up()
		third.up()
		w.start(p.follow())
		w.observed()
		follow := p.follow() // another file with the same authorities
		w.reload(p.follow(), third.follow())
		w.holds(partner, p.certificates()...)
		w.holds(third.td, third.certificates()...)
		if !w.follower.Follows(third.td) || w.follower.Refreshed()[third.td].IsZero() {
			w.t.Error("the new endpoint is not followed")
		}

		// It moves: the bundle held verifies the new place, although the file is older.
		next, err := p.Prepare(w.t.Context())
		w.check(err)
		time.Sleep(2 * time.Hour)
		w.check(p.Activate(w.t.Context(), next.ID))
		p.down()
		w.observed()
		w.reload(follow, third.follow())
		w.holds(partner, p.certificates()...)
		if got := w.observed(); got != "failed" {
			w.t.Errorf("outcomes at the place that is gone: %q", got)
		}
		p.up()
		follow.URL += "?again"
		w.reload(follow, third.follow())
		w.holds(partner, p.certificates()...)
		if got := w.observed(); got != "unchanged" {
			w.t.Errorf("outcomes at the new place: %q", got)
		}

		// What does not change is not fetched again.
		w.reload(follow, third.follow())
		w.reload(follow)
		if got := w.observed(); got != "" {
			w.t.Errorf("outcomes without a change: %q", got)
		}

		// A removed endpoint is withdrawn, in the store, too.
		w.holds(third.td)
		if w.follower.Follows(third.td) || len(w.storage.records) != 1 || w.storage.records[0].TrustDomain != partner {
			w.t.Errorf("stored are %v", w.storage.records)
		}
		w.reload()
		w.holds(partner)
		if n := len(w.storage.records); n != 0 {
			w.t.Errorf("%d records are left", n)
		}
		w.mu.Lock()
		w.dials = nil
		w.mu.Unlock()
		time.Sleep(24 * time.Hour)
		if len(w.dials) > 0 {
			w.t.Errorf("removed endpoints are asked: %v", w.dials)
		}
	})
}

// TestReloadFile: a file with other authorities takes precedence at once. One that cannot be
// used changes nothing, of any endpoint.
func TestReloadFile(t *testing.T) {
	inWorld(t, func(w *world) {
		p := w.domain(partner)
		p.hint = time.Hour
		p.up()
		follow := p.follow()
		w.start(follow)
		p.down()
		p.rotate()
		w.check(writeFile(follow.BundleFile, p.Bundle().PEM()))
		w.reload(follow)
		w.holds(partner, p.certificates()...)
		p.up()
		w.reload(follow)
		time.Sleep(time.Minute)
		w.holds(partner, p.certificates()...)
		if got := w.observed(); !strings.HasSuffix(got, "applied") {
			w.t.Errorf("outcomes %q", got)
		}

		missing := follow
		missing.BundleFile += ".missing"
		third := w.domain(spiffeid.RequireTrustDomainFromString("third.example"))
		_, err := w.follower.Reload([]federation.Endpoint{missing, third.follow()})
		if err == nil || !strings.Contains(err.Error(), "federation.partner.example.bundle_file cannot be used: open ") {
			w.t.Errorf("a missing file: %v", err)
		}
		synctest.Wait()
		w.holds(partner, p.certificates()...)
		if w.follower.Follows(third.td) {
			w.t.Error("part of the endpoints was applied")
		}
	})
}
