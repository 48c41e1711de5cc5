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

// outcomes counts mints and renewals by outcome.
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

// A failed mint of an entry that the server does not list is expected: it is neither
// logged as a warning nor counted as a failure, and delays no other entry. When the
// server lists the entry again, it is minted at once.
func TestMissingEntryIsNoFailure(t *testing.T) {
	var log strings.Builder
	var seen outcomes
	drill(t, 3, func(r *rig) {
		r.cfg.Log, r.cfg.Observer = logTo(&log), &seen
		r.server.life = time.Hour
	}, func(r *rig) {
		synctest.Wait()
		if r.cache.Held(r.ca.id) != 3 {
			t.Fatal("not all SVIDs are held")
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
			t.Error("the entry that is listed again still waits")
		}
	})
}
