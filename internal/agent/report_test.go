package agent_test

import (
	"testing"
	"time"
)

// SPIRE logs an error for each status that its policy denies. After a denial the agent
// posts rarely, even while the bundle changes, so that it does not fill that log.
func TestServerWithoutStatuses(t *testing.T) {
	for name, c := range map[string]struct {
		denied      bool
		least, most int
	}{
		"denied":   {true, 1, 5},
		"accepted": {false, 30, 1000},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, 1, nil, func(w *world) {
				w.set(func(f *faults) { f.policy = c.denied })
				for range 10 {
					time.Sleep(3 * time.Minute)
					w.rotate()
				}
				w.mu.Lock()
				defer w.mu.Unlock()
				if w.statusCalls < c.least || w.statusCalls > c.most {
					w.t.Errorf("%d statuses in half an hour, want %d to %d", w.statusCalls, c.least, c.most)
				}
			})
		})
	}
}
