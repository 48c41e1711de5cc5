package workload

import "sync"

// quota limits how many of a resource the processes of each user have open.
type quota struct {
	limit int

	mu   sync.Mutex
	open map[uint32]int // by user ID
}

// acquire takes one for the user, or returns false at the limit.
func (q *quota) acquire(uid uint32) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.open[uid] >= q.limit {
		return false
	}
	if q.open == nil {
		q.open = make(map[uint32]int)
	}
	q.open[uid]++
	return true
}

// release gives back what acquire took.
func (q *quota) release(uid uint32) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.open[uid]--; q.open[uid] == 0 {
		delete(q.open, uid)
	}
}
