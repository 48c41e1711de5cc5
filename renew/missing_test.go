package renew_test

import (
	"crypto"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/renew"
)

// outcomes counts what it is told.
type outcomes struct {
	mu     sync.Mutex
	failed int // mints
	of     map[renew.Outcome]int
}

func (o *outcomes) Minted(err error, _ time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if err != nil {
		o.failed++
	}
}

func (o *outcomes) Renewed(_ renew.Reason, outcome renew.Outcome) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.of == nil {
		o.of = make(map[renew.Outcome]int)
	}
	o.of[outcome]++
}

// That the server does not mint for an entry that its answers do not name is
// expected: no warning, no failure counted, nothing for others to wait for. When
// it names the entry again, that is minted at once.
func TestMissingEntryIsNoFault(t *testing.T) {
	var log strings.Builder
	var seen outcomes
	drill(t, 3, func(r *rig) {
		r.cfg.Log, r.cfg.Observer = logTo(&log), &seen
		r.server.life = time.Hour
	}, func(r *rig) {
		synctest.Wait()
		if r.cache.Held(r.ca.id) != 3 {
			t.Fatal("not all is held")
		}
		r.cache.SetMissing(true, "entry-0001")
		r.server.set(func() {
			r.server.item = func(id string, _ crypto.PublicKey) (renew.Result, bool) {
				return renew.Result{Err: errors.New("entry not found")}, id == "entry-0001"
			}
		})
		time.Sleep(50 * time.Minute) // its half-life has passed, and that of the others
		synctest.Wait()
		if seen.failed > 0 || seen.of[renew.OutcomeFailed] > 0 || seen.of[renew.OutcomeMissing] == 0 {
			t.Errorf("%d failed mints, outcomes %v; want them missing", seen.failed, seen.of)
		}
		if strings.Contains(log.String(), "level=WARN") {
			t.Errorf("a warning:\n%s", log.String())
		}
		for _, id := range []string{"entry-0000", "entry-0002"} {
			if left := time.Until(mustItem(t, r.cache, id).SVID.NotAfter); left < 25*time.Minute {
				t.Errorf("%s was not renewed beside it: %v left", id, left)
			}
		}
		r.server.set(func() { r.server.item = nil })
		before := mustItem(t, r.cache, "entry-0001").SVID
		r.cache.SetMissing(false, "entry-0001")
		synctest.Wait()
		if mustItem(t, r.cache, "entry-0001").SVID == before {
			t.Error("the entry that is named again still waits")
		}
	})
}
