package renew

import (
	"container/heap"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/renewd/renewd/cache"
)

// item is one entry in the Renewer's hands. It is owned by Run.
type item struct {
	entryID  string
	entry    *cache.Entry // as it was when looked at last
	reason   Reason
	streams  bool
	missing  bool      // the server's answers do not name the entry
	expiry   time.Time // zero when none is held
	wake     time.Time // when to look again
	retry    time.Time // not before, after a failure
	backoff  *backoff.ExponentialBackOff
	inFlight bool
	timerPos int // position in timers, or -1
	readyPos int // position in its ready queue, or -1
	ready    *queue
}

// queue is a heap of items that knows where each of them is.
type queue struct {
	items []*item
	less  func(a, b *item) bool
	pos   func(*item) *int
}

func newTimers() *queue {
	return &queue{
		less: func(a, b *item) bool { return a.wake.Before(b.wake) },
		pos:  func(it *item) *int { return &it.timerPos },
	}
}

// newReady returns a queue with the most urgent item first: those with open
// streams, then those that expire first. What is not held at all has a zero
// expiry and so comes first among its like.
func newReady() *queue {
	return &queue{
		less: func(a, b *item) bool {
			if a.streams != b.streams {
				return a.streams
			}
			return a.expiry.Before(b.expiry)
		},
		pos: func(it *item) *int { return &it.readyPos },
	}
}

func (q *queue) Len() int           { return len(q.items) }
func (q *queue) Less(i, j int) bool { return q.less(q.items[i], q.items[j]) }
func (q *queue) Swap(i, j int) {
	q.items[i], q.items[j] = q.items[j], q.items[i]
	*q.pos(q.items[i]), *q.pos(q.items[j]) = i, j
}

// Push and Pop are for container/heap; use put and take.
func (q *queue) Push(x any) {
	it := x.(*item)
	*q.pos(it) = len(q.items)
	q.items = append(q.items, it)
}

func (q *queue) Pop() any {
	last := len(q.items) - 1
	it := q.items[last]
	q.items[last] = nil
	q.items = q.items[:last]
	*q.pos(it) = -1
	return it
}

// put adds it, or moves it after its order has changed.
func (q *queue) put(it *item) {
	if p := *q.pos(it); p >= 0 {
		heap.Fix(q, p)
	} else {
		heap.Push(q, it)
	}
}

// drop removes it if it is there.
func (q *queue) drop(it *item) {
	if p := *q.pos(it); p >= 0 {
		heap.Remove(q, p)
	}
}

// take removes and returns the first; the queue must not be empty.
func (q *queue) take() *item { return heap.Pop(q).(*item) }

// newBackoff returns the pauses between attempts: doubling from base, full
// jitter (uniform in [0, 2·interval]), never above limit.
func newBackoff(base, limit time.Duration) *backoff.ExponentialBackOff {
	return &backoff.ExponentialBackOff{
		InitialInterval:     base / 2,
		RandomizationFactor: 1,
		Multiplier:          2,
		MaxInterval:         limit / 2,
	}
}
