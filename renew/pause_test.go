package renew_test

import (
	"context"
	"crypto"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/renew"
)

// SVIDs in flight may come from a tainted authority if their calls began before this node
// learned of that taint. Those of the wave began after it.
func TestInFlightCountsCallsFromBeforeTheTaint(t *testing.T) {
	drill(t, 4, func(r *rig) { r.cfg.BatchSize, r.cfg.MaxDelay = 1, 0 }, func(r *rig) {
		r.server.set(func() { r.server.latency = 10 * time.Second })
		for i := range 2 {
			changed := *mustItem(t, r.cache, entryID(i)).Entry
			changed.Revision++
			changed.X509TTL = time.Hour
			r.cache.Update([]*cache.Entry{&changed}, nil)
		}
		r.sleepUntil(time.Now().Add(time.Second))
		since := time.Now()
		r.taint()
		r.sleepUntil(since.Add(time.Second)) // two calls of the wave have begun
		for want, n := range map[int]int{
			2: r.renewer.InFlight(r.ca.id, since),
			4: r.renewer.InFlight(r.ca.id, since.Add(-time.Hour)), // of an earlier taint nothing is known
		} {
			if n != want {
				t.Errorf("%d SVIDs may come from the tainted authority, want %d", n, want)
			}
		}
		r.sleepUntil(since.Add(time.Minute))
		if n := r.renewer.InFlight(r.ca.id, since); n != 0 {
			t.Errorf("%d SVIDs are in flight, want none", n)
		}
	})
}

// However high the rate is, at most 64 calls of the wave are in flight.
func TestWaveCallsInFlightAreBounded(t *testing.T) {
	drill(t, 100, func(r *rig) { r.cfg.Rate = 100 }, func(r *rig) {
		r.server.set(func() { r.server.latency = 30 * time.Second })
		begin := r.taint()
		r.sleepUntil(begin.Add(20 * time.Second))
		if n := len(r.server.since(begin)); n != 64 {
			t.Errorf("%d calls are in flight, want 64", n)
		}
		r.sleepUntil(begin.Add(2 * time.Minute))
		if held := r.cache.Held(r.ca.id); held != 0 {
			t.Errorf("%d SVIDs still depend on the tainted authority", held)
		}
	})
}

// A renewal that succeeds leaves no pause: the next reason is acted on at once.
func TestNoPauseAfterSuccess(t *testing.T) {
	drill(t, 1, func(r *rig) { r.cfg.MaxDelay = 0 }, func(r *rig) {
		first := mustItem(t, r.cache, entryID(0)).SVID
		r.sleepUntil(first.RenewAt)
		if mustItem(t, r.cache, entryID(0)).SVID == first {
			t.Fatal("not renewed at its half-life")
		}
		r.taint()
		r.sleepUntil(time.Now().Add(10 * time.Millisecond))
		if r.cache.Held(r.next.id) != 1 {
			t.Error("not renewed at once after the taint")
		}
	})
}

// An entry that changes in mid-wave is minted at once, also if it was tried later than all
// that wait in the wave.
func TestChangesDoNotWaitBehindTheWave(t *testing.T) {
	drill(t, 100, nil, func(r *rig) {
		begin := r.taint()
		r.sleepUntil(begin.Add(time.Second))
		for i := range 3 {
			changed := *mustItem(t, r.cache, entryID(99)).Entry
			changed.Revision++
			changed.X509TTL += time.Hour
			r.cache.Update([]*cache.Entry{&changed}, nil)
			r.sleepUntil(time.Now().Add(time.Millisecond))
			if s := mustItem(t, r.cache, entryID(99)).SVID; s.Revision != changed.Revision {
				t.Errorf("change %d: the SVID in use is of revision %d, want %d", i+1, s.Revision, changed.Revision)
			}
		}
		if r.cache.Held(r.ca.id) == 0 {
			t.Error("the wave is over")
		}
	})
}

// The removal of its authority ends the pause of an SVID, but not the pauses after that.
func TestRemovalEndsThePause(t *testing.T) {
	drill(t, 1, nil, func(r *rig) {
		begin := r.mark() // the server lags
		r.sleepUntil(begin.Add(10 * time.Minute))
		r.server.set(func() {
			r.server.item = func(string, crypto.PublicKey) (renew.Result, bool) {
				return renew.Result{Err: errors.New("not now")}, true
			}
		})
		removed := time.Now()
		r.cache.SetBundle(snapshot(r.t, trusted(r.next)...))
		r.sleepUntil(removed.Add(10 * time.Millisecond))
		if n := len(r.server.since(removed)); n != 1 {
			t.Errorf("%d calls right after the removal, want 1", n)
		}
		r.sleepUntil(removed.Add(10 * time.Minute))
		if n := len(r.server.since(removed)); n > 40 {
			t.Errorf("%d calls in ten minutes after the removal", n)
		}
	})
}

// retried is an agent SVID that cannot be renewed.
type retried struct {
	agentSVID
	mu sync.Mutex
	at []time.Time
}

func (o *retried) Renew(context.Context) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.at = append(o.at, time.Now())
	return errors.New("not now")
}

// The first pause of the agent SVID is one or two seconds.
func TestFirstPauseOfTheAgentSVID(t *testing.T) {
	for range 10 {
		own := &retried{}
		own.held.Store(&cache.SVID{NotAfter: time.Now(), RenewAt: time.Now()})
		drill(t, 0, func(r *rig) { r.cfg.AgentSVID = own }, func(r *rig) { r.sleepUntil(time.Now().Add(time.Minute)) })
		if len(own.at) < 2 {
			t.Fatalf("tried at %v", own.at)
		}
		if d := own.at[1].Sub(own.at[0]); d < time.Second || d > 2*time.Second {
			t.Errorf("tried again after %v", d)
		}
	}
}

// A step of the clock is one of more than five seconds.
func TestClockStep(t *testing.T) {
	for step, noticed := range map[time.Duration]int{5 * time.Second: 0, 5*time.Second + 1: 1, -5 * time.Second: 0, -5*time.Second - 1: 1} {
		var skew atomic.Int64
		var log strings.Builder
		skewed(t, 1, &skew, &log, func(r *rig) {
			r.sleepUntil(time.Now().Add(time.Minute))
			skew.Store(int64(step))
			r.sleepUntil(time.Now().Add(2 * time.Minute))
			if n := strings.Count(log.String(), "clock step detected"); n != noticed {
				t.Errorf("a step of %v: %d lines, want %d", step, n, noticed)
			}
		})
	}
}
