package renew_test

import (
	"crypto"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/renew"
)

// transitions lists the transitions of an entry in a log, as "from>to reason".
func transitions(log, entryID string) []string {
	line := regexp.MustCompile(`msg="X.509-SVID state changed" spiffe_id=\S+ entry_id=` + entryID + ` from=(\S+) to=(\S+) reason=(\S+)`)
	var out []string
	for _, m := range line.FindAllStringSubmatch(log, -1) {
		out = append(out, m[1]+">"+m[2]+" "+m[3])
	}
	return out
}

// one returns the state of the only entry.
func (r *rig) one() renew.State {
	var found []renew.State
	for s, n := range r.renewer.States() {
		if n > 0 {
			found = append(found, s)
		}
	}
	if len(found) != 1 || r.renewer.States()[found[0]] != 1 {
		r.t.Fatalf("one entry is in the states %v", r.renewer.States())
	}
	return found[0]
}

// The life of one SVID, event by event.
func TestStateTransitions(t *testing.T) {
	refuse := func(string, crypto.PublicKey) (renew.Result, bool) {
		return renew.Result{Err: errors.New("not now")}, true
	}
	half := func(r *rig) { r.sleepUntil(mustItem(r.t, r.cache, entryID(0)).SVID.RenewAt) }
	for _, tt := range []struct {
		name string
		do   func(*rig)
		want []string // after the first fill
		in   renew.State
	}{
		{"nothing happens", func(*rig) {}, nil, renew.StateFresh},
		{"its half-life passes", half, []string{"fresh>due half_life", "due>minting half_life", "minting>fresh renewed"}, renew.StateFresh},
		{"a call is not answered yet", func(r *rig) {
			r.server.set(func() { r.server.latency = time.Minute })
			half(r)
		}, []string{"fresh>due half_life", "due>minting half_life"}, renew.StateMinting},
		{"its authority is tainted", func(r *rig) { r.taint(); synctest.Wait() }, []string{"fresh>stale taint"}, renew.StateStale},
		{"the taint is taken back", func(r *rig) {
			r.taint()
			synctest.Wait()
			r.cache.SetBundle(snapshot(r.t, trusted(r.ca, r.next)...))
			synctest.Wait()
		}, []string{"fresh>stale taint", "stale>fresh not_due"}, renew.StateFresh},
		{"the taint's delay is over", func(r *rig) { r.sleepUntil(r.taint().Add(time.Second)) },
			[]string{"fresh>stale taint", "stale>due taint", "due>minting taint", "minting>fresh renewed"}, renew.StateFresh},
		{"the server lags", func(r *rig) { r.sleepUntil(r.mark()) },
			[]string{"fresh>stale taint", "stale>due taint", "due>minting taint", "minting>backing_off still_tainted"}, renew.StateBackingOff},
		{"the server lags and follows", func(r *rig) {
			r.sleepUntil(r.mark())
			r.server.set(func() { r.server.signer = r.next })
			time.Sleep(retryFirst)
			synctest.Wait()
		}, []string{"fresh>stale taint", "stale>due taint", "due>minting taint", "minting>backing_off still_tainted",
			"backing_off>due taint", "due>minting taint", "minting>fresh renewed"}, renew.StateFresh},
		{"its authority is removed", func(r *rig) {
			r.server.set(func() { r.server.signer = r.next })
			r.cache.SetBundle(snapshot(r.t, trusted(r.next)...))
			synctest.Wait()
		}, []string{"fresh>due authority_removed", "due>minting authority_removed", "minting>fresh renewed"}, renew.StateFresh},
		{"its entry is changed", func(r *rig) {
			changed := *mustItem(r.t, r.cache, entryID(0)).Entry
			changed.Revision++
			changed.X509TTL = time.Hour
			r.cache.Update([]*cache.Entry{&changed}, nil)
			synctest.Wait()
		}, []string{"fresh>due entry_changed", "due>minting entry_changed", "minting>fresh renewed"}, renew.StateFresh},
		{"its entry has another SPIFFE ID and cannot be minted", func(r *rig) {
			changed := *mustItem(r.t, r.cache, entryID(0)).Entry
			changed.Revision++
			changed.SPIFFEID = td.ID()
			r.server.set(func() { r.server.item = refuse })
			r.cache.Update([]*cache.Entry{&changed}, nil)
			synctest.Wait()
			r.server.set(func() { r.server.item, r.server.ids[entryID(0)] = nil, td.ID() })
			time.Sleep(retryFirst)
			synctest.Wait()
		}, []string{"fresh>waiting first", "waiting>minting first", "minting>backing_off failed",
			"backing_off>waiting first", "waiting>minting first", "minting>fresh renewed"}, renew.StateFresh},
		{"the server refuses it", func(r *rig) {
			r.server.set(func() { r.server.item = refuse })
			half(r)
		}, []string{"fresh>due half_life", "due>minting half_life", "minting>backing_off failed"}, renew.StateBackingOff},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var log strings.Builder
			drill(t, 1, func(r *rig) { r.cfg.Log = logTo(&log) }, func(r *rig) {
				tt.do(r)
				want := append([]string{"waiting>minting first", "minting>fresh renewed"}, tt.want...)
				got := transitions(log.String(), entryID(0))
				in := r.one() // whose lock orders the read before what is logged later
				if !slices.Equal(got, want) {
					t.Errorf("transitions %q\nwant %q", got, want)
				}
				if in != tt.in {
					t.Errorf("it is %v, want %v", in, tt.in)
				}
			})
		})
	}
}

// retryFirst is more than the first pause of an item.
const retryFirst = 3 * time.Second

// An SVID that expires in an outage is counted as expired at that moment, and as
// fresh when the server has recovered.
func TestStateExpired(t *testing.T) {
	for name, fail := range map[string]func(*rig){
		"the server does not answer": func(r *rig) { r.server.down = errors.New("connection refused") },
		"the server refuses it": func(r *rig) {
			r.server.item = func(string, crypto.PublicKey) (renew.Result, bool) {
				return renew.Result{Err: errors.New("not now")}, true
			}
		},
		"calls hang": func(r *rig) { r.server.latency = 30 * time.Hour },
	} {
		t.Run(name, func(t *testing.T) {
			drill(t, 3, nil, func(r *rig) {
				r.server.set(func() { fail(r) })
				end := mustItem(t, r.cache, entryID(0)).SVID.NotAfter
				for i := range 3 {
					if e := mustItem(t, r.cache, entryID(i)).SVID.NotAfter; e.After(end) {
						end = e
					}
				}
				r.sleepUntil(end.Add(-time.Second))
				if n := r.renewer.States()[renew.StateExpired]; n != 0 {
					t.Errorf("%d of 3 SVIDs count as expired a second before", n)
				}
				r.sleepUntil(end)
				if n := r.renewer.States(); n[renew.StateExpired]+n[renew.StateMinting] != 3 {
					t.Errorf("after their end 3 SVIDs are in the states %v", n)
				}
				if name == "calls hang" {
					return
				}
				r.server.set(func() { r.server.down, r.server.item = nil, nil })
				time.Sleep(2 * time.Minute)
				synctest.Wait()
				if n := r.renewer.States(); n[renew.StateFresh] != 3 {
					t.Errorf("after the recovery 3 SVIDs are in the states %v", n)
				}
			})
		})
	}
}

// Whatever happens, each entry is counted once, and no longer when it is deleted.
func TestStatesCountEachEntryOnce(t *testing.T) {
	const n = 200
	drill(t, n, nil, func(r *rig) {
		check := func(when string, total int, want map[renew.State]int) {
			t.Helper()
			got, sum := r.renewer.States(), 0
			for _, s := range renew.States {
				sum += got[s]
			}
			if sum != total || len(got) != len(renew.States) {
				t.Errorf("%s: %d entries are counted in %v, want %d", when, sum, got, total)
			}
			for s, k := range want {
				if got[s] != k {
					t.Errorf("%s: %d SVIDs are %v, want %d: %v", when, got[s], s, k, got)
				}
			}
		}
		check("at first", n, map[renew.State]int{renew.StateFresh: n})
		begin := r.taint()
		r.sleepUntil(begin.Add(-time.Nanosecond))
		check("before the wave", n, map[renew.State]int{renew.StateStale: n})
		for i := range 10 {
			r.sleepUntil(begin.Add(time.Duration(i)*time.Second + 10*time.Millisecond))
			check(fmt.Sprint("second ", i), n, map[renew.State]int{renew.StateStale: 0, renew.StateFresh: i*20 + 1})
		}
		r.sleepUntil(begin.Add(11 * time.Second))
		check("after the wave", n, map[renew.State]int{renew.StateFresh: n})
		r.server.set(func() { r.server.latency = time.Second })
		changed := *mustItem(t, r.cache, entryID(0)).Entry
		changed.Revision++
		changed.X509TTL = time.Hour
		r.cache.Update([]*cache.Entry{&changed}, nil)
		synctest.Wait()
		check("while one is minted", n, map[renew.State]int{renew.StateMinting: 1})
		r.cache.Update(nil, []string{entryID(0), entryID(1)})
		synctest.Wait()
		check("after two were deleted", n-2, map[renew.State]int{renew.StateFresh: n - 2, renew.StateMinting: 0})
		time.Sleep(2 * time.Second)
		synctest.Wait()
		check("after the answer", n-2, map[renew.State]int{renew.StateFresh: n - 2})
	})
}
