package ledger_test

import (
	"container/heap"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/server/ledger"
)

// A keyset is never called safe too early, in random histories of a signing server with
// several keysets and 50 agents. Some agents are silent, slow, restarted, cloned or
// lagging, and the server's storage is restored from a copy. The ledger's answer is
// compared with the SVIDs that agents and workloads hold, and with those in flight to a
// waiting agent, after each step and in the middle of each save.
//
// A history has no goroutines and no real time: an event is a function that runs at a
// moment of simulated time. RENEWD_SEED replays one history; RENEWD_HISTORIES sets how
// many there are.
func TestSafeIsNeverTooEarly(t *testing.T) {
	t.Parallel()
	histories := 2
	if n, err := strconv.Atoi(os.Getenv("RENEWD_HISTORIES")); err == nil {
		histories = n
	}
	if seed, err := strconv.ParseUint(os.Getenv("RENEWD_SEED"), 10, 64); err == nil {
		history(t, seed)
		return
	}
	base := rand.Uint64()
	var cleared, met count
	for i := range histories {
		s := history(t, base+uint64(i))
		cleared += s.cleared
		for _, n := range s.met {
			met += n
		}
		if t.Failed() {
			return
		}
	}
	// Without such events the test would check nothing.
	if histories >= 2 && (cleared == 0 || met == 0) {
		t.Errorf("%d keysets became safe, %d kinds of trouble happened", cleared, met)
	}
}

// Without trouble a keyset is safe minutes after its taint, although its SVIDs are valid
// for hours: a ledger that never answers safe does not pass.
func TestSafeComesInTime(t *testing.T) {
	t.Parallel()
	for seed := range uint64(3) {
		s := newSim(t, seed)
		s.calm = true
		s.run(10 * time.Minute)
		for range 3 {
			old := s.server.active()
			s.server.rotate()
			s.run(time.Minute)
			old.taint()
			if s.server.ledger.X509(old.authority, true).Clear {
				t.Errorf("seed %d: safe at once", seed)
			}
			s.run(5 * time.Minute)
			if h := s.server.ledger.X509(old.authority, true); !h.Clear {
				t.Errorf("seed %d: five minutes after the taint: %+v, held by %+v", seed, h, s.server.ledger.Holders(old.authority))
			}
			s.server.remove(old)
			s.run(10 * time.Minute)
		}
	}
}

type count int

// history runs one history.
func history(t *testing.T, seed uint64) *sim {
	var s *sim
	t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
		s = newSim(t, seed)
		s.after(0, s.trouble)
		s.after(s.between(0, 5*time.Minute), s.operator)
		s.run(75 * time.Minute)

		// Then the trouble ends: a keyset that is not safe a little later is held by
		// agents that do not report, until their SVIDs expire.
		s.calm = true
		s.server.heal()
		for _, a := range s.agents {
			if s.r.IntN(5) > 0 {
				a.partitioned = false
			}
		}
		s.run(15 * time.Minute)
		for _, k := range s.server.in(tainted) {
			for _, h := range s.server.ledger.Holders(k.authority) {
				a := s.byID[h.Agent]
				if h.Reason == ledger.ReasonRestored || (a != nil && a.cloned) {
					continue
				}
				if a == nil || (!a.partitioned && !a.evicted && !a.destroyed) {
					t.Errorf("%s is held, without trouble, by %+v", k.authority, h)
				}
			}
		}
		s.run(maxTTL + 10*time.Minute)
		for _, k := range s.server.in(tainted) {
			for _, h := range s.server.ledger.Holders(k.authority) {
				// A claim without a row counts for longer: it may have been about
				// calls that failed. So does a claim of duplicated agents, until an
				// operator evicts them.
				a := s.byID[h.Agent]
				if a != nil && a.cloned {
					continue
				}
				if !h.Latest.IsZero() || a == nil || (!a.partitioned && !a.evicted && !a.destroyed) {
					t.Errorf("%s is held, after everything has expired, by %+v", k.authority, h)
				}
			}
		}
	})
	return s
}

// sim is one history.
type sim struct {
	t      *testing.T
	r      *rand.Rand
	start  time.Time
	now    time.Time // the true time
	events events
	made   int // events
	calm   bool

	server  *server
	touched map[*agent]bool // by the current event: SVIDs on their nodes have changed
	agents  []*agent
	byID    map[string]*agent
	cleared count            // keysets that became safe
	met     map[string]count // what went wrong
}

const agents = 50

func newSim(t *testing.T, seed uint64) *sim {
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	s := &sim{
		t: t, r: rand.New(rand.NewPCG(seed, 0)), start: start, now: start,
		byID: map[string]*agent{}, met: map[string]count{}, touched: map[*agent]bool{},
	}
	s.server = newServer(s)
	for i := range agents {
		a := newAgent(s, i)
		s.agents = append(s.agents, a)
		s.byID[a.id] = a
	}
	return s
}

type event struct {
	at time.Time
	n  int // events of one moment run in the order in which they were made
	f  func()
}

type events []event

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	if !e[i].at.Equal(e[j].at) {
		return e[i].at.Before(e[j].at)
	}
	return e[i].n < e[j].n
}
func (e events) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)   { *e = append(*e, x.(event)) }
func (e *events) Pop() any {
	last := len(*e) - 1
	x := (*e)[last]
	*e = (*e)[:last]
	return x
}

func (s *sim) after(d time.Duration, f func()) {
	s.made++
	heap.Push(&s.events, event{s.now.Add(d), s.made, f})
}

// between returns a random duration.
func (s *sim) between(low, high time.Duration) time.Duration {
	return low + time.Duration(s.r.Int64N(int64(high-low)))
}

// happens reports whether a trouble happens that does in one of n cases.
func (s *sim) happens(n int, what string) bool {
	if s.calm || s.r.IntN(n) > 0 {
		return false
	}
	s.met[what]++
	return true
}

func (s *sim) run(d time.Duration) {
	end := s.now.Add(d)
	for len(s.events) > 0 && !s.events[0].at.After(end) && !s.t.Failed() {
		e := heap.Pop(&s.events).(event)
		s.now = e.at
		s.server.survives(e.f)
		s.check()
		clear(s.touched)
	}
	s.now = end
}

// check compares the ledger's answers with the SVIDs that exist.
func (s *sim) check() {
	if !s.server.up {
		return
	}
	for _, k := range s.server.keysets {
		if k.state != tainted {
			continue
		}
		h := s.server.ledger.X509(k.authority, true)
		if !h.Clear && h.SVIDs < 1 && h.UnknownUntil.IsZero() {
			s.t.Fatalf("%v: %s is not safe, without a reason: %+v", s.at(), k.authority, h)
		}
		if h.Clear {
			s.checkSafe(k, "said to be safe", !k.safe)
			if !k.met {
				k.met = true
				s.cleared++
			}
		}
		k.safe = h.Clear
		if _, clear := s.server.ledger.JWT(k.key, true); clear {
			for _, a := range s.agents {
				if !a.destroyed && a.jwts[k.key].After(s.now) {
					s.t.Fatalf("%v: %s is called safe, but a workload of %s has a JWT-SVID of it until %v", s.at(), k.key, a.id, a.jwts[k.key])
				}
			}
			for c := range s.server.calls {
				if c.jwt && c.signer == k && c.open {
					s.t.Fatalf("%v: %s is called safe, but a JWT-SVID of it is in flight to %s", s.at(), k.key, c.agent.id)
				}
			}
		}
	}
	for _, k := range s.server.removed {
		s.checkSafe(k, "removed as safe", false)
	}
}

func (s *sim) at() time.Duration { return s.now.Sub(s.start) }

// checkSafe fails if an agent has an SVID of the keyset that the server could know of.
// If the authority was safe before the event, it mostly checks only the agents that the
// event has touched.
func (s *sim) checkSafe(k *keyset, what string, newlySafe bool) {
	agents := maps.Keys(s.touched)
	if newlySafe || s.made%500 == 0 {
		agents = slices.Values(s.agents)
	}
	for a := range agents {
		if a.destroyed || (a.rowless[k.authority] && (k.state == removed || !a.spoke[k.authority])) {
			continue
		}
		if place := a.has(k.authority); place != "" {
			s.t.Fatalf("%v: %s is %s, but %s has an SVID of it, in %s", s.at(), k.authority, what, a.id, place)
		}
	}
	for c := range s.server.calls {
		if !c.jwt && c.signer == k && c.open && !c.agent.destroyed {
			s.t.Fatalf("%v: %s is %s, but an SVID of it is in flight to %s", s.at(), k.authority, what, c.agent.id)
		}
	}
}

// trouble disturbs an agent or the server every few seconds.
func (s *sim) trouble() {
	if s.calm {
		return
	}
	s.after(s.between(0, 15*time.Second), s.trouble)
	a := s.victim()
	switch v := s.server; s.r.IntN(24) {
	case 0, 1, 2:
		a.restart(s.r.IntN(2) == 0)
	case 3, 4:
		a.partitioned = true
		s.after(s.between(0, 10*time.Minute), func() { a.partitioned = false })
	case 5:
		if s.happens(4, "silent") {
			a.partitioned = true // until the end
		}
	case 6, 7:
		v.crash()
	case 8, 9:
		v.trouble = s.r.IntN(3) > 0
	case 10, 11:
		// The clock is set wrong by up to two minutes in either direction.
		v.offset = s.between(-2*time.Minute, 2*time.Minute)
	case 12, 13:
		v.slow = s.r.IntN(2) == 0
	case 14, 15:
		a.slow = s.r.IntN(2) == 0
	case 16:
		if s.happens(10, "evicted") {
			for _, b := range s.agents {
				b.evicted = b.evicted || b.id == a.id
			}
		}
	case 17:
		if !a.cloned && s.happens(10, "destroyed") {
			a.destroy()
			s.after(s.between(0, time.Hour), func() {
				if v.up {
					_ = v.ledger.RemoveAgent(s.t.Context(), a.id)
				}
			})
		}
	case 18:
		if v.up && !a.cloned && s.happens(3, "wrongly gone") {
			a.unknown()
			_ = v.ledger.RemoveAgent(s.t.Context(), a.id)
		}
	case 19:
		if s.happens(2, "snapshot") {
			a.snapshot()
		}
	case 20:
		if s.happens(2, "rolled back") {
			a.rollBack()
		}
	case 21:
		if v.copied == nil || s.happens(6, "copied") {
			v.copy()
		}
	case 22:
		if s.happens(6, "restored") {
			v.restore()
		}
	case 23:
		if running := s.r.IntN(2) == 0; s.happens(2, fmt.Sprint("cloned, running ", running)) {
			a.clone(running)
		}
	}
}

// victim picks an agent, most often one that is in the middle of a wave.
func (s *sim) victim() *agent {
	a := s.agents[s.r.IntN(len(s.agents))]
	for range 10 {
		for _, k := range s.server.in(tainted) {
			if s.r.IntN(4) > 0 && a.has(k.authority) != "" {
				return a
			}
		}
		a = s.agents[s.r.IntN(len(s.agents))]
	}
	return a
}

// operator rotates, at all speeds, and removes keysets that are safe.
func (s *sim) operator() {
	if s.calm {
		return
	}
	v := s.server
	s.after(s.between(0, 6*time.Minute), s.operator)
	if !v.up {
		return
	}
	for _, k := range v.in(tainted) {
		switch {
		case s.r.IntN(2) == 0 && v.ledger.X509(k.authority, true).Clear:
			v.remove(k)
			v.removed = append(v.removed, k)
		case s.r.IntN(100) == 0: // by force
			v.remove(k)
		}
	}
	old := v.active()
	switch s.r.IntN(4) {
	case 0:
		v.rotate()
		s.after(s.between(0, time.Minute), func() { old.taint() })
	case 1:
		// The new keyset signs for a moment only.
		v.rotate()
		brief := v.active()
		s.after(s.between(0, 15*time.Second), func() {
			if v.active() == brief {
				v.rotate()
				brief.taint()
			}
		})
	case 2:
		for _, k := range v.in(prepared) {
			if s.r.IntN(2) == 0 {
				k.taint()
			}
		}
	case 3: // activate a keyset that has signed before
		for _, k := range v.in(prepared) {
			v.activate(k)
			break
		}
	}
}
