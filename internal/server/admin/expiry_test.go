package admin_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/operator/renewd"
	"github.com/renewd/renewd/internal/operator/runbook"
)

// TestWaitForExpiry: a wait for a silent agent or for JWT-SVIDs shows the expected end, which
// is never in the past.
func TestWaitForExpiry(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, w *world, r *remote, c *renewd.Client) {
		d := w.only()
		check(t, d.ledger.RecordJWT(t.Context(), d.keysets.Active().JWTKeyID, time.Now().Add(10*time.Minute)))
		old := d.tainted(t)
		for _, what := range []runbook.Scope{runbook.JWT, runbook.X509} {
			b := r.as(t, w, boss).Backend("", "")
			first, err := runbook.Wait(t.Context(), b, old.ID, runbook.WaitOptions{For: what, Timeout: time.Second})
			if _, ok := errors.AsType[*runbook.NotSafeError](err); !ok {
				t.Fatalf("%s: %v", what, err)
			}
			var out bytes.Buffer
			_, err = runbook.Wait(t.Context(), b, old.ID, runbook.WaitOptions{For: what, Progress: &runbook.Screen{W: &out}})
			check(t, err)
			for line := range strings.Lines(out.String()) {
				if strings.Contains(line, " in 0s") || strings.Contains(line, "not known") {
					t.Errorf("%s: %s", what, line)
					break
				}
			}
			if end := time.Now(); what == runbook.X509 && first.Estimated.Before(end) {
				t.Errorf("estimated %v, ended %v", first.Estimated, end)
			}
		}
	})
}
