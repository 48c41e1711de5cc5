package workload

import (
	"sync"
	"time"
)

// repeats says which problems are to be logged: each once in a while, however
// often it happens, because callers that are denied come back every few
// seconds.
type repeats struct {
	mu     sync.Mutex
	logged map[about]time.Time
}

type about struct {
	kind string
	uid  uint32
}

const (
	repeatEvery = 10 * time.Minute
	maxRepeats  = 1024
)

// first reports whether the problem has not come up for some time. Past
// maxRepeats different ones it says so no more until the oldest are forgotten.
func (d *repeats) first(key about) bool {
	now := time.Now()
	d.mu.Lock()
	defer d.mu.Unlock()
	if at, ok := d.logged[key]; ok && now.Sub(at) < repeatEvery {
		return false
	}
	if d.logged == nil {
		d.logged = make(map[about]time.Time)
	}
	if len(d.logged) >= maxRepeats {
		for k, at := range d.logged {
			if now.Sub(at) >= repeatEvery {
				delete(d.logged, k)
			}
		}
		if len(d.logged) >= maxRepeats {
			return false
		}
	}
	d.logged[key] = now
	return true
}
