package wave_test

import (
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/renewd/renewd/renew/wave"
)

// call is one request: when it was sent, when it reached the server and when its
// answer came back, or the caller stopped waiting.
type call struct {
	n                       int
	sent, arrived, answered time.Time
	answerSeen              bool // the Pace knows of the answer
}

// Whatever the network does with calls of several SVIDs, at most limit of them reach the
// server in any second. And none waits without need: an SVID is held back only while
// limit others may arrive in the same second.
func TestPace(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		limit := rapid.IntRange(1, 25).Draw(t, "limit")
		start := time.Unix(1, 0)
		now := start
		pace := wave.NewPace(limit, now)
		var calls []*call
		delay := rapid.OneOf(
			rapid.Just(time.Duration(0)),
			rapid.Map(rapid.Int64Range(0, int64(20*time.Millisecond)), func(d int64) time.Duration { return time.Duration(d) }),
			rapid.Map(rapid.Int64Range(0, int64(5*time.Second)), func(d int64) time.Duration { return time.Duration(d) }),
		)
		pass := func(d time.Duration) {
			now = now.Add(d)
			for _, c := range calls {
				if !c.answerSeen && !c.answered.After(now) {
					c.answerSeen = true
					pace.Answer(c.n, c.answered)
				}
			}
		}
		// free counts the free places directly by the rule.
		free := func(at time.Time) int {
			n := limit
			if at.Sub(start) < time.Second {
				n -= limit
			}
			for _, c := range calls {
				if !c.answerSeen || at.Sub(c.answered) < time.Second {
					n -= c.n
				}
			}
			return n
		}
		for range rapid.IntRange(1, 100).Draw(t, "calls") {
			n := rapid.IntRange(1, min(limit, 4)).Draw(t, "n")
			pass(delay.Draw(t, "pause"))
			for {
				d, ok := pace.Wait(n, now)
				if ok != (free(now.Add(time.Second)) >= n) || ok && free(now.Add(d)) < n || ok && d > 0 && free(now.Add(d-1)) >= n {
					t.Fatalf("%d SVIDs wait for %v (%v): %d places are free, %d then", n, d, ok, free(now), free(now.Add(d)))
				}
				if ok && d == 0 {
					break
				}
				// The next thing to happen: the wait is over, or an answer comes.
				for _, c := range calls {
					if left := c.answered.Sub(now); !c.answerSeen && (!ok || left < d) {
						d, ok = left, true
					}
				}
				pass(d)
			}
			arrived := now.Add(delay.Draw(t, "there"))
			pace.Send(n)
			calls = append(calls, &call{n: n, sent: now, arrived: arrived, answered: arrived.Add(delay.Draw(t, "back"))})
		}
		var arrivals []time.Time
		for _, c := range calls {
			for range c.n {
				arrivals = append(arrivals, c.arrived)
			}
		}
		slices.SortFunc(arrivals, time.Time.Compare)
		for i := limit; i < len(arrivals); i++ {
			if d := arrivals[i].Sub(arrivals[i-limit]); d < time.Second {
				t.Fatalf("%d SVIDs arrive within %v, the limit is %d a second", limit+1, d, limit)
			}
		}
	})
}

// A server that answers at once gets as many requests as the limit allows, and a slow
// one as many as the rule allows.
func TestPaceOfAWave(t *testing.T) {
	for latency, want := range map[time.Duration]time.Duration{
		0:                      49 * time.Second,
		5 * time.Millisecond:   49*time.Second + 49*5*time.Millisecond,
		100 * time.Millisecond: 49*time.Second + 49*100*time.Millisecond,
		time.Second:            98 * time.Second,
	} {
		const limit, svids = 20, 1000
		now := time.Unix(1, 0)
		pace := wave.NewPace(limit, now.Add(-time.Second))
		var begin time.Time
		for i := range svids {
			d, ok := pace.Wait(1, now)
			if !ok {
				t.Fatalf("SVID %d waits for an answer and all have come", i)
			}
			now = now.Add(d)
			if i == 0 {
				begin = now
			}
			pace.Send(1)
			pace.Answer(1, now.Add(latency))
		}
		if took := now.Sub(begin); took != want {
			t.Errorf("with answers after %v the last of %d SVIDs is sent after %v, want %v", latency, svids, took, want)
		}
	}
}

// A missing answer costs one place and does not stop the wave.
func TestPaceWithAHangingCall(t *testing.T) {
	const limit = 20
	now := time.Unix(1, 0)
	pace := wave.NewPace(limit, now.Add(-time.Second))
	pace.Send(1) // and no answer
	sent := 0
	for end := now.Add(10 * time.Second); now.Before(end); {
		d, ok := pace.Wait(1, now)
		if !ok {
			t.Fatal("one hanging call holds up all others")
		}
		if now = now.Add(d); d == 0 {
			pace.Send(1)
			pace.Answer(1, now)
			sent++
		}
	}
	if sent != 10*(limit-1) {
		t.Errorf("%d SVIDs in ten seconds beside one that hangs, want %d", sent, 10*(limit-1))
	}
	pace.Send(limit - 1)
	if _, ok := pace.Wait(1, now.Add(time.Hour)); ok {
		t.Error("an SVID may be sent while as many as the limit are without an answer")
	}
}
