package renew_test

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/renew"
)

// deadline is the agent's for one mint call.
const deadline = time.Minute

// troubled is a server that cannot answer a call with a bad entry and signs one SVID
// after the other. It signs all that was requested, even if the client has canceled the
// call. Its fields may be changed under mu.
type troubled struct {
	*fakeServer
	mu    sync.Mutex
	bad   map[string]time.Duration // how long a call hangs before it fails
	hangs bool                     // every call hangs, nothing is signed
	each  time.Duration            // what one signature takes
	free  time.Time                // when all that was asked for is signed
	most  int                      // the largest call
}

func (s *troubled) Mint(ctx context.Context, requests []renew.Request) ([]renew.Result, error) {
	ctx, cancel := context.WithTimeout(ctx, deadline)
	defer cancel()
	s.mu.Lock()
	s.most = max(s.most, len(requests))
	var err error
	var wait time.Duration
	for _, r := range requests {
		if hang, bad := s.bad[r.EntryID]; bad {
			err, wait = errors.New("rpc error: code = Internal desc = panic"), max(wait, hang)
		}
	}
	switch {
	case s.hangs:
		err, wait = context.DeadlineExceeded, 2*deadline
	case err == nil:
		now := time.Now()
		if s.free.Before(now) {
			s.free = now
		}
		s.free = s.free.Add(time.Duration(len(requests)) * s.each)
		wait = s.free.Sub(now)
	}
	s.mu.Unlock()
	var results []renew.Result
	if err == nil && wait <= deadline {
		results, err = s.fakeServer.Mint(ctx, requests)
	} else {
		s.note(requests)
	}
	select {
	case <-time.After(wait):
		return results, err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// note records a call that the server does not begin.
func (s *troubled) note(requests []renew.Request) {
	call := mintCall{at: time.Now()}
	for _, r := range requests {
		call.ids = append(call.ids, r.EntryID)
	}
	s.fakeServer.set(func() { s.calls = append(s.calls, call) })
}

func (s *troubled) set(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
}

// asked counts the requests since t by entry.
func (s *troubled) asked(t time.Time) map[string]int {
	n := make(map[string]int)
	for _, c := range s.since(t) {
		for _, id := range c.ids {
			n[id]++
		}
	}
	return n
}

func total(asked map[string]int) int {
	n := 0
	for _, k := range asked {
		n += k
	}
	return n
}

// withTroubled is a drill on a troubled server; every entry has a stream. The
// SVIDs of the first k entries end first.
func withTroubled(t *testing.T, n, k int, life time.Duration, f func(*rig, *troubled)) {
	s := &troubled{bad: make(map[string]time.Duration)}
	drill(t, n, func(r *rig) {
		s.fakeServer, r.cfg.Minter = r.server, s
		r.server.life = life
		r.server.item = func(id string, public crypto.PublicKey) (renew.Result, bool) {
			der, err := r.server.signer.leaf(r.server.ids[id], public, life*9/10, nil)
			return renew.Result{Chain: [][]byte{der}, Err: err}, id < entryID(k)
		}
	}, func(r *rig) {
		for i := range n {
			defer r.cache.Subscribe(cache.Process{}, []cache.Selector{selector(i)}).Close()
		}
		f(r, s)
	})
}

func entryID(i int) string { return fmt.Sprintf("entry-%04d", i) }

// ended lists the entries without an SVID that is valid now.
func (r *rig) ended(n int) []string {
	var ids []string
	for i := range n {
		id := entryID(i)
		if it := mustItem(r.t, r.cache, id); it.SVID == nil || !it.SVID.NotAfter.After(time.Now()) {
			ids = append(ids, id)
		}
	}
	return ids
}

// A bad entry does not delay the others, however it fails, and backs off by itself.
func TestBadEntryDoesNotDelayOthers(t *testing.T) {
	for name, hang := range map[string]time.Duration{"fails at once": 0, "fails late": 5 * time.Second, "hangs": 2 * deadline} {
		t.Run(name, func(t *testing.T) {
			const n = 50
			// It is the first to expire, as any bad one is sooner or later.
			bad := entryID(0)
			withTroubled(t, n, 1, time.Hour, func(r *rig, s *troubled) {
				s.set(func() { s.bad[bad] = hang })
				from := time.Now()
				r.sleepUntil(from.Add(70 * time.Minute))
				if ended := r.ended(n); !slices.Equal(ended, []string{bad}) {
					t.Errorf("ended: %v, want %s alone", ended, bad)
				}
				asked := s.asked(from)
				if asked[bad] < 10 || asked[bad] > 70*60 {
					t.Errorf("the bad entry was asked for %d times", asked[bad])
				}
				delete(asked, bad)
				if k := total(asked); k > 3*n {
					t.Errorf("the other %d were asked for %d times in 70 minutes", n-1, k)
				}
				s.set(func() { delete(s.bad, bad) })
				r.sleepUntil(time.Now().Add(2 * time.Minute))
				if ended := r.ended(n); len(ended) > 0 {
					t.Errorf("ended after the server recovered: %v", ended)
				}
			})
		})
	}
}

// Most of the entries hang, are the most urgent ones and are all due at once. The few
// others are still renewed in the second half of their life.
func TestHangingMajorityDoesNotBlockTheOthers(t *testing.T) {
	const n, good = 50, 5
	withTroubled(t, n, n-good, time.Hour, func(r *rig, s *troubled) {
		for i := range n - good {
			s.set(func() { s.bad[entryID(i)] = 2 * deadline })
		}
		r.server.set(func() { r.server.signer = r.next })
		r.cache.SetBundle(snapshot(t, trusted(r.next)...)) // the authority of all is removed
		from := time.Now()
		r.sleepUntil(from.Add(30 * time.Minute))
		if held := r.cache.Held(r.next.id); held != good {
			t.Errorf("%d renewed after half an hour, want the %d that the server signs", held, good)
		}
		if calls := len(s.since(from)); calls > 30*20 {
			t.Errorf("%d calls in half an hour", calls)
		}
		s.set(func() { clear(s.bad) })
		r.sleepUntil(time.Now().Add(3 * time.Minute))
		if held := r.cache.Held(r.next.id); held != n {
			t.Errorf("%d of %d renewed after the server recovered", held, n)
		}
	})
}

// Entries that hang leave calls to others. Once the renewer knows which entries hang,
// new ones are minted at once, and before that within a deadline or two.
func TestNewEntriesAreMintedBesideHangingOnes(t *testing.T) {
	const n = 20
	withTroubled(t, n, n, time.Hour, func(r *rig, s *troubled) {
		for i := range n {
			s.set(func() { s.bad[entryID(i)] = 2 * deadline })
		}
		r.server.set(func() { r.server.signer = r.next })
		r.cache.SetBundle(snapshot(t, trusted(r.next)...))
		r.sleepUntil(time.Now().Add(10 * time.Minute))
		defer r.cache.Subscribe(cache.Process{}, []cache.Selector{selector(n)}).Close()
		for i := range 90 {
			id := fmt.Sprintf("fresh-%02d", i)
			r.server.set(func() { r.server.ids[id] = td.ID() })
			r.cache.Update([]*cache.Entry{{ID: id, SPIFFEID: td.ID(), Selectors: []cache.Selector{selector(n)}}}, nil)
			r.sleepUntil(time.Now().Add(10 * time.Second))
			late := 12 // the number that arrives in two deadlines
			if i >= 60 {
				late = 0
			}
			if held := r.cache.Held(r.next.id); held < i+1-late {
				t.Fatalf("%d of %d new entries have an SVID", held, i+1)
			}
		}
	})
}

// An item that was in flight when an outage began keeps its place in the order.
func TestOutageDoesNotChangeTheOrder(t *testing.T) {
	drill(t, 200, nil, func(r *rig) {
		defer r.cache.Subscribe(cache.Process{}, []cache.Selector{selector(7)}).Close()
		r.server.set(func() { r.server.down = errors.New("connection refused") })
		begin := r.taint()
		r.sleepUntil(begin.Add(time.Minute)) // the first to fail is the one with a stream
		r.server.set(func() { r.server.down = nil })
		r.sleepUntil(time.Now().Add(8 * time.Second))
		if mustItem(t, r.cache, entryID(7)).SVID.Authority != r.next.id {
			t.Error("the SVID with a stream was not renewed among the first")
		}
	})
}

// While no call succeeds all items that are due try in turn, also those of the
// wave behind more urgent ones.
func TestItemsTryInTurn(t *testing.T) {
	drill(t, 6, nil, func(r *rig) {
		r.server.set(func() { r.server.down = errors.New("connection refused") })
		begin := r.taint()
		fresh := make([]*cache.Entry, 6)
		for i := range fresh {
			fresh[i] = &cache.Entry{ID: fmt.Sprintf("fresh-%d", i), SPIFFEID: td.ID(), Selectors: []cache.Selector{selector(100)}}
		}
		for _, i := range []int{0, 1, 2, 3, 4, 5, 100} {
			defer r.cache.Subscribe(cache.Process{}, []cache.Selector{selector(i)}).Close()
		}
		r.cache.Update(fresh, nil)
		r.sleepUntil(begin.Add(time.Second))
		from := time.Now()
		r.sleepUntil(from.Add(10 * time.Minute))
		tries := make(map[string]int)
		for _, c := range r.server.since(from) {
			for _, id := range c.ids {
				tries[id]++
			}
		}
		counts := slices.Sorted(maps.Values(tries))
		if len(counts) != 12 || counts[11]-counts[0] > 5 {
			t.Errorf("tries in ten minutes: %v, want all 12 about as often", tries)
		}
	})
}

// A server that cannot sign all that is due within the deadline of a call is
// asked for less at once, and not for more in all than it is worth.
func TestSlowSignerIsAskedForLess(t *testing.T) {
	const n = 300
	synctest.Test(t, func(t *testing.T) {
		ca := newCA(t, "old")
		s := &troubled{fakeServer: &fakeServer{signer: ca, life: 24 * time.Hour}, each: 300 * time.Millisecond}
		c := cache.New(cache.Config{Limit: n})
		c.SetBundle(snapshot(t, trusted(ca)...))
		c.Update(s.entries(n), nil)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		r := renew.New(renew.Config{Cache: c, Minter: s})
		go func() { defer close(done); _ = r.Run(ctx) }()
		time.Sleep(20 * time.Minute)
		synctest.Wait()
		if held, asked := c.Held(ca.id), total(s.asked(time.Time{})); held != n || asked > 5*n {
			t.Errorf("%d of %d are held, %d were asked for", held, n, asked)
		}
		// What was learned of the size of a call is forgotten with its cause.
		s.set(func() { s.each, s.most = 0, 0 })
		next := newCA(t, "new")
		s.fakeServer.set(func() { s.signer = next })
		c.SetBundle(snapshot(t, trusted(next)...))
		synctest.Wait()
		if c.Held(next.id) != n || s.most != n {
			t.Errorf("%d renewed, at most %d at once, want all %d", c.Held(next.id), s.most, n)
		}
		cancel()
		<-done
	})
}

// A server that hangs is asked for less than one that refuses, and found within a
// deadline when it has recovered.
func TestHangingServerIsLeftInPeace(t *testing.T) {
	const n = 60
	withTroubled(t, n, 0, 24*time.Hour, func(r *rig, s *troubled) {
		begin := r.taint()
		r.sleepUntil(begin.Add(time.Second))
		s.set(func() { s.hangs = true })
		r.sleepUntil(time.Now().Add(2 * deadline)) // the gate is closed
		from := time.Now()
		r.sleepUntil(from.Add(30 * time.Minute))
		if calls := s.since(from); len(calls) < 30 || len(calls) > 31*8 { // 8 at a time hang
			t.Errorf("%d calls in half an hour of an outage", len(calls))
		}
		if len(r.ended(n)) > 0 {
			t.Error("SVIDs were lost")
		}
		s.set(func() { s.hangs = false })
		r.sleepUntil(time.Now().Add(deadline + 10*time.Second))
		if held := r.cache.Held(r.ca.id); held != 0 {
			t.Errorf("%d SVIDs still wait a deadline after the server recovered", held)
		}
	})
}

// In any history of bad entries, outages and slow signing, no SVID expires that the
// server would sign: failures of others, or earlier ones, cost it minutes and not the
// second half of its life. And the calls stay few. RENEWD_SEED replays one history;
// RENEWD_HISTORIES sets how many there are.
func TestNoEntryMakesAnotherExpire(t *testing.T) {
	n, first := 2, rand.Uint64()
	if k, err := strconv.Atoi(os.Getenv("RENEWD_HISTORIES")); err == nil {
		n = k
	}
	if seed, err := strconv.ParseUint(os.Getenv("RENEWD_SEED"), 10, 64); err == nil {
		n, first = 1, seed
	}
	for i := range n {
		seed := first + uint64(i)
		t.Run(fmt.Sprint(seed), func(t *testing.T) { randomHistory(t, rand.New(rand.NewPCG(seed, 8))) })
	}
}

func randomHistory(t *testing.T, random *rand.Rand) {
	const n = 24
	// How long after its last failure an entry may be without an SVID.
	const bound = 8 * time.Minute
	withTroubled(t, n, 0, time.Hour, func(r *rig, s *troubled) {
		well := make(map[string]time.Time) // since when the server would sign for it
		for i := range n {
			well[entryID(i)] = time.Now()
		}
		from := time.Now()
		outage := false
		for minute := range 180 {
			now := time.Now()
			if random.IntN(10) == 0 {
				id := entryID(random.IntN(n))
				s.set(func() {
					if _, bad := s.bad[id]; bad {
						delete(s.bad, id)
					} else if len(s.bad) < n/2 {
						s.bad[id] = []time.Duration{0, time.Second, 2 * deadline}[random.IntN(3)]
					}
				})
			}
			if outage = outage && random.IntN(5) > 0; !outage && random.IntN(30) == 0 {
				outage = true
			}
			kind := random.IntN(2)
			r.server.set(func() {
				if r.server.down = nil; outage && kind == 0 {
					r.server.down = errors.New("connection refused")
				}
			})
			s.set(func() {
				s.hangs = outage && kind == 1
				if random.IntN(20) == 0 {
					s.each = time.Duration(random.IntN(3)) * time.Second
				}
				for id := range well {
					if _, bad := s.bad[id]; bad || outage {
						well[id] = now
					}
				}
			})
			r.sleepUntil(now.Add(time.Minute))
			for _, id := range r.ended(n) {
				if now := time.Now(); now.Sub(well[id]) > bound {
					t.Fatalf("minute %d: %s ended although the server would sign for it since %v", minute, id, now.Sub(well[id]))
				}
			}
			if calls := len(s.since(now)); calls > 100 {
				t.Fatalf("minute %d: %d calls", minute, calls)
			}
		}
		t.Logf("%d entries asked for %d times in %v", n, total(s.asked(from)), time.Since(from))
	})
}
