package agent_test

import (
	"testing"
	"time"
)

// SPIRE logs an error for each status that its policy denies. An agent that polls
// every few seconds fills that log unless it takes no for an answer, even while
// the bundle changes.
func TestServerThatTakesNoStatuses(t *testing.T) {
	t.Parallel()
	count := func(policy bool) (calls int) {
		inWorld(t, 1, nil, func(w *world) {
			w.set(func(f *faults) { f.policy = policy })
			for range 10 {
				time.Sleep(3 * time.Minute)
				w.rotate()
			}
			w.mu.Lock()
			defer w.mu.Unlock()
			calls = w.statusCalls
		})
		return calls
	}
	if calls := count(true); calls > 5 {
		t.Errorf("a server that denies it was asked %d times in half an hour", calls)
	}
	if calls := count(false); calls < 30 {
		t.Errorf("a server that takes statuses was given %d in half an hour", calls)
	}
}
