package renew_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/renew"
	"github.com/renewd/renewd/renew/wave"
)

// paced fails the test if the server was asked for more than rate SVIDs in any
// one second.
func (r *rig) paced(rate int, calls []mintCall) {
	r.t.Helper()
	var arrivals []time.Time
	for _, c := range calls {
		for range c.ids {
			arrivals = append(arrivals, c.at)
		}
	}
	slices.SortFunc(arrivals, time.Time.Compare)
	for i := rate; i < len(arrivals); i++ {
		if d := arrivals[i].Sub(arrivals[i-rate]); d < time.Second {
			r.t.Fatalf("%d SVIDs asked for within %v, at most %d are allowed in a second", rate+1, d, rate)
		}
	}
}

// network delays the messages to and from a server. At times it holds all of them and
// then delivers them at once, so requests and answers arrive late and in bursts. Some
// are lost.
type network struct {
	server *fakeServer
	mu     sync.Mutex
	random *rand.Rand
	until  time.Time // nothing passes before that
}

// carry waits for as long as the network takes and reports whether the message is lost.
func (n *network) carry() (lost bool) {
	n.mu.Lock()
	now := time.Now()
	if n.until.Before(now) && n.random.IntN(40) == 0 {
		n.until = now.Add(time.Duration(n.random.Int64N(int64(3 * time.Second))))
	}
	wait := max(n.until.Sub(now), 0)
	if n.random.IntN(3) > 0 {
		wait += time.Duration(n.random.Int64N(int64(100 * time.Millisecond)))
	}
	lost = n.random.IntN(100) == 0
	n.mu.Unlock()
	time.Sleep(wait)
	return lost
}

func (n *network) Mint(ctx context.Context, requests []renew.Request) ([]renew.Result, error) {
	if n.carry() {
		return nil, errors.New("connection reset")
	}
	results, err := n.server.Mint(ctx, requests)
	if n.carry() {
		return nil, errors.New("connection reset")
	}
	return results, err
}

// busyAgentSVID blocks Run at times, as on an overloaded machine.
type busyAgentSVID struct {
	mu     sync.Mutex
	random *rand.Rand
}

func (o *busyAgentSVID) Held() *cache.SVID {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.random.IntN(100) == 0 {
		time.Sleep(time.Duration(o.random.Int64N(int64(400 * time.Millisecond))))
	}
	return nil
}

func (*busyAgentSVID) Renew(context.Context) error { return nil }

// The server counts at most 20 requests in any second of the wave, whatever the network
// and this machine do, and the wave ends.
func TestRateHoldsAtTheServer(t *testing.T) {
	n, first := 3, rand.Uint64()
	if k, err := strconv.Atoi(os.Getenv("RENEWD_HISTORIES")); err == nil {
		n = k
	}
	if seed, err := strconv.ParseUint(os.Getenv("RENEWD_SEED"), 10, 64); err == nil {
		n, first = 1, seed
	}
	for i := range n {
		seed := first + uint64(i)
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			const svids = 150
			drill(t, svids, nil, func(r *rig) {
				r.cfg.Minter = &network{server: r.server, random: rand.New(rand.NewPCG(seed, 1))}
				r.cfg.AgentSVID = &busyAgentSVID{random: rand.New(rand.NewPCG(seed, 2))}
				again := r.restart()
				defer again()
				begin := r.taint()
				r.sleepUntil(begin.Add(3 * time.Minute))
				if held := r.cache.Held(r.ca.id); held != 0 {
					t.Errorf("%d SVIDs still depend on the tainted authority after three minutes", held)
				}
				r.paced(20, r.server.since(begin))
			})
		})
	}
}

// restart stops the Renewer and starts another with the current configuration, which the
// returned function stops.
func (r *rig) restart() (stop func()) {
	r.stop()
	ctx, cancel := context.WithCancel(r.t.Context())
	next := renew.New(r.cfg)
	stopped := make(chan error, 1)
	go func() { stopped <- next.Run(ctx) }()
	return func() {
		cancel()
		if err := <-stopped; err != nil {
			r.t.Errorf("Run: %v", err)
		}
	}
}

// A restart in mid-wave does not raise the rate.
func TestRateHoldsOverARestart(t *testing.T) {
	drill(t, 100, nil, func(r *rig) {
		begin := r.taint()
		r.sleepUntil(begin.Add(1999 * time.Millisecond))
		stop := r.restart()
		defer stop()
		r.sleepUntil(begin.Add(10 * time.Second))
		if held := r.cache.Held(r.ca.id); held != 0 {
			t.Errorf("%d SVIDs still depend on the tainted authority", held)
		}
		r.paced(20, r.server.since(begin))
	})
}

// Calls that hang take only their own share of the rate.
func TestHangingCallsLeaveTheWaveItsRate(t *testing.T) {
	for _, tt := range []struct {
		rate, svids, bad int
		within           time.Duration
	}{
		{20, 200, 1, 12 * time.Second},
		{20, 200, 30, 4 * time.Minute},
		{1, 10, 1, 6 * time.Minute},
	} {
		t.Run(fmt.Sprintf("%d of %d at %d a second", tt.bad, tt.svids, tt.rate), func(t *testing.T) {
			s := &troubled{bad: make(map[string]time.Duration)}
			drill(t, tt.svids, func(r *rig) { s.fakeServer, r.cfg.Minter, r.cfg.Rate = r.server, s, tt.rate }, func(r *rig) {
				s.set(func() {
					for i := range tt.bad {
						s.bad[entryID(i)] = 2 * deadline
					}
				})
				begin := r.taint()
				r.sleepUntil(begin.Add(tt.within))
				if held := r.cache.Held(r.ca.id); held != tt.bad {
					t.Errorf("%d SVIDs still depend on the tainted authority after %v, want the %d that hang", held, tt.within, tt.bad)
				}
				r.paced(tt.rate, r.server.since(begin))
			})
		})
	}
}

// However many SVIDs of the wave hang, half of the rate is free for the others.
func TestHangingCallsLeaveTheNextWaveHalfOfTheRate(t *testing.T) {
	const svids, bad = 100, 30
	s := &troubled{bad: make(map[string]time.Duration)}
	drill(t, svids, func(r *rig) { s.fakeServer, r.cfg.Minter = r.server, s }, func(r *rig) {
		s.set(func() {
			for i := range bad {
				s.bad[entryID(i)] = 2 * deadline
			}
		})
		r.taint()
		for end := time.Now().Add(10 * time.Minute); time.Now().Before(end); r.sleepUntil(time.Now().Add(10 * time.Second)) {
			// It is answered, so that the gate stays open.
			changed := *mustItem(t, r.cache, entryID(bad)).Entry
			changed.Revision++
			changed.X509TTL += time.Second
			r.cache.Update([]*cache.Entry{&changed}, nil)
		}
		third := newCA(t, "third")
		r.server.set(func() { r.server.signer = third })
		begin := time.Now().Add(wave.Delay(r.cfg.Seed, r.next.id, r.cfg.MaxDelay))
		r.cache.SetBundle(snapshot(t, append(tainted(time.Now(), r.ca, r.next), trusted(third)...)...))
		r.sleepUntil(begin.Add((svids-bad)/10*time.Second + 5*time.Second))
		if held := r.cache.Held(r.next.id); held != 0 {
			t.Errorf("%d SVIDs of the authority that was tainted last are left", held)
		}
		r.paced(20, r.server.since(begin.Add(-time.Second)))
	})
}

// While the gate is closed and hanging calls hold the whole rate, an item of the wave
// that waits for it does not block the probes of others.
func TestHangingWaveDoesNotBlockProbes(t *testing.T) {
	s := &troubled{bad: make(map[string]time.Duration)}
	drill(t, 3, func(r *rig) { s.fakeServer, r.cfg.Minter, r.cfg.Rate = r.server, s, 1 }, func(r *rig) {
		s.set(func() {
			for i := range 3 {
				s.bad[entryID(i)] = 2 * deadline
			}
		})
		begin := r.taint()
		r.sleepUntil(begin.Add(time.Second)) // one hangs
		changed := *mustItem(t, r.cache, entryID(1)).Entry
		fresh := changed
		fresh.ID = "fresh"
		r.server.set(func() {
			r.server.ids["fresh"] = fresh.SPIFFEID
			r.server.down = errors.New("connection refused")
		})
		r.cache.Update([]*cache.Entry{&fresh}, nil)
		synctest.Wait()
		r.server.set(func() { r.server.down = nil })
		r.sleepUntil(begin.Add(20 * time.Second))
		if it := mustItem(t, r.cache, "fresh"); it.SVID == nil {
			t.Error("a new entry waits for a call of the wave that hangs")
		}
	})
}

// While the server signs with a tainted authority, the rate applies to retries of SVIDs
// past their half-life. No SVID expires because of that.
func TestRetriesOfALaggingServerArePaced(t *testing.T) {
	const (
		svids = 120
		rate  = 2
	)
	drill(t, svids, func(r *rig) {
		r.server.life, r.server.signer, r.cfg.Rate = 20*time.Minute, r.next, rate
	}, func(r *rig) {
		start := time.Now()
		r.cache.SetBundle(snapshot(r.t, append(tainted(start, r.ca), trusted(r.next)...)...))
		r.server.set(func() { r.server.signer = r.ca })
		// By now all have been asked for at their half-life, which is free of the rate.
		past := start.Add(12 * time.Minute)
		r.sleepUntil(past)
		if held := r.cache.Held(r.next.id); held != svids {
			t.Fatalf("%d of %d SVIDs are of the trusted authority", held, svids)
		}
		r.sleepUntil(past.Add(5 * time.Minute))
		r.paced(rate, r.server.since(past))
		if n := len(r.server.since(past)); n < 5*60*rate*9/10 {
			t.Errorf("%d tries in five minutes, want nearly %d a second", n, rate)
		}
		// From their last tenth on an SVID of a tainted authority is better than none.
		for range 10 {
			r.sleepUntil(time.Now().Add(20 * time.Second))
			if ended := r.ended(svids); len(ended) > 0 {
				t.Fatalf("%d SVIDs have ended although the server signs", len(ended))
			}
		}
		back := time.Now()
		r.server.set(func() { r.server.signer = r.next })
		r.sleepUntil(back.Add(2*time.Minute + svids/rate*time.Second))
		if held := r.cache.Held(r.ca.id); held != 0 {
			t.Errorf("%d SVIDs still depend on the tainted authority after the server recovered", held)
		}
		r.paced(rate, r.server.since(back))
	})
}

// The agent SVID comes first in the wave, and takes a place of the rate. At its half-life
// it does not wait for the rate.
func TestAgentSVIDInTheWave(t *testing.T) {
	for name, tt := range map[string]struct {
		tainted bool
		half    time.Duration // after the begin of the wave
	}{"of the tainted authority": {true, time.Hour}, "at its half-life": {false, 2500 * time.Millisecond}} {
		t.Run(name, func(t *testing.T) {
			own := &agentSVID{}
			var renewed atomic.Pointer[time.Time]
			drill(t, 10, func(r *rig) {
				r.cfg.Rate, r.cfg.AgentSVID = 1, own
				own.next = func() *cache.SVID {
					at := time.Now()
					renewed.Store(&at)
					return &cache.SVID{Authority: r.next.id, NotBefore: at, NotAfter: at.Add(time.Hour), RenewAt: at.Add(30 * time.Minute)}
				}
			}, func(r *rig) {
				begin := r.taint()
				held := &cache.SVID{Authority: r.next.id, NotAfter: begin.Add(2 * time.Hour), RenewAt: begin.Add(tt.half)}
				if tt.tainted {
					held.Authority = r.ca.id
				}
				own.held.Store(held)
				r.sleepUntil(begin.Add(10 * time.Second))
				calls := r.server.since(begin)
				if renewed.Load() == nil || len(calls) < 7 {
					t.Fatalf("the agent SVID was renewed at %v, and %d others in 10 s", renewed.Load(), len(calls))
				}
				answered, want := renewed.Load().Sub(begin), 100*time.Millisecond // see agentSVID
				if !tt.tainted {
					want += tt.half
				}
				if answered != want {
					t.Errorf("the agent SVID was renewed %v after the begin, want %v", answered, want)
				}
				if first := calls[0].at.Sub(begin); tt.tainted && first < answered+time.Second {
					t.Errorf("the first of the wave came %v after the begin, want a second after the agent SVID's answer", first)
				}
			})
		})
	}
}

// While the agent SVID is being replaced, no call of the wave begins.
func TestWaveWaitsForTheAgentSVID(t *testing.T) {
	own := &agentSVID{}
	var renewed time.Time
	drill(t, 100, func(r *rig) {
		r.cfg.AgentSVID = own
		own.next = func() *cache.SVID {
			renewed = time.Now()
			return &cache.SVID{Authority: r.next.id, NotBefore: renewed, NotAfter: renewed.Add(time.Hour), RenewAt: renewed.Add(30 * time.Minute)}
		}
	}, func(r *rig) {
		begin := r.taint()
		own.held.Store(&cache.SVID{Authority: r.next.id, NotAfter: begin.Add(time.Hour), RenewAt: begin.Add(2510 * time.Millisecond)})
		r.sleepUntil(begin.Add(10 * time.Second))
		calls := r.server.since(begin)
		if len(calls) != 100 || renewed.IsZero() {
			t.Fatalf("%d calls, the agent SVID was renewed at %v", len(calls), renewed)
		}
		for _, c := range calls {
			if !c.at.Before(renewed.Add(-100*time.Millisecond)) && c.at.Before(renewed) {
				t.Errorf("a call %v before the agent SVID was replaced", renewed.Sub(c.at))
			}
		}
	})
}

// stalledAgentSVID blocks Run once, for as long as stall says.
type stalledAgentSVID struct{ stall atomic.Int64 }

func (o *stalledAgentSVID) Held() *cache.SVID {
	time.Sleep(time.Duration(o.stall.Swap(0)))
	return nil
}

func (*stalledAgentSVID) Renew(context.Context) error { return nil }

// A renewal that started late is not caught up with in the same second.
func TestRateHoldsAfterAStall(t *testing.T) {
	own := new(stalledAgentSVID)
	drill(t, 200, func(r *rig) { r.cfg.AgentSVID = own }, func(r *rig) {
		begin := r.taint()
		r.sleepUntil(begin.Add(2*time.Second + 10*time.Millisecond))
		own.stall.Store(int64(300 * time.Millisecond))
		r.sleepUntil(begin.Add(12 * time.Second))
		if held := r.cache.Held(r.ca.id); held != 0 {
			t.Errorf("%d SVIDs still depend on the tainted authority", held)
		}
		r.paced(20, r.server.since(begin))
	})
}
