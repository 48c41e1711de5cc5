package workload

import (
	"sync"
	"time"
)

// logLimiter limits how often a repeated problem is logged: denied callers retry
// every few seconds.
type logLimiter struct {
	mu     sync.Mutex
	logged map[logKey]time.Time
}

type logKey struct {
	kind string
	uid  uint32
}

const (
	logInterval = 10 * time.Minute
	maxLogKeys  = 1024
)

// allow reports whether the problem may be logged: it was not logged within
// logInterval. With maxLogKeys problems it refuses new ones until the oldest expire.
func (l *logLimiter) allow(key logKey) bool {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	if at, ok := l.logged[key]; ok && now.Sub(at) < logInterval {
		return false
	}
	if l.logged == nil {
		l.logged = make(map[logKey]time.Time)
	}
	if len(l.logged) >= maxLogKeys {
		for k, at := range l.logged {
			if now.Sub(at) >= logInterval {
				delete(l.logged, k)
			}
		}
		if len(l.logged) >= maxLogKeys {
			return false
		}
	}
	l.logged[key] = now
	return true
}
