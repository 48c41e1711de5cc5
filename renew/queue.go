package renew

import (
	"container/heap"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/renewd/renewd/cache"
)

// item is one entry whose X.509-SVID is to be held. It is owned by Run.
type item struct {
	entryID   string
	entry     *cache.Entry // as of the last reschedule
	reason    Reason
	streams   bool
	missing   bool        // the server does not list the entry
	expiry    time.Time   // zero when none is held
	wake      time.Time   // when to reschedule next
	retry     time.Time   // earliest next mint after a failure
	failures  int         // consecutive failures that are this item's own fault
	lagged    bool        // a tainted authority signed the last answer
	maxBatch  int         // maximum size of its next call; zero means BatchSize
	tried     time.Time   // monotonic: when its last mint began
	postponed *cache.SVID // minted and not to be used before swap; see Renewer.postpone
	swap      time.Time
	inFlight  bool
	state     State
	outcome   Outcome // of the last mint
	timerPos  int     // position in timers, or -1
	readyPos  int     // position in its ready queue, or -1
	ready     *queue
}

// queue is a heap of items that tracks the position of each.
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

// resetRetry resets the backoff.
func (it *item) resetRetry() { it.retry, it.failures, it.maxBatch = time.Time{}, 0, 0 }

// pause sets when an item is retried after a failure: with full jitter below a bound that
// doubles from retryBase to retryLimit, and within a quarter of its remaining life.
func (it *item) pause(expiry, now time.Time) {
	bound := min(retryBase<<min(max(it.failures-1, 0), 10), retryLimit)
	d := rand.N(bound)
	if left := expiry.Sub(now); left > 0 {
		d = min(d, left/4)
	}
	it.retry = now.Add(max(d, time.Second))
}

// doubtful reports whether the item is probably the cause of its failures. A single
// failure may also be the start of an outage.
func (it *item) doubtful() bool { return it.failures > 1 }

// newReady returns a queue with the most urgent item first: items with open streams,
// then the soonest to expire, then the least recently tried. An item without an SVID
// has a zero expiry and counts as the soonest. Doubtful items come last and take turns.
func newReady() *queue {
	return &queue{
		less: func(a, b *item) bool {
			if a.doubtful() != b.doubtful() {
				return b.doubtful()
			}
			if !a.doubtful() && a.streams != b.streams {
				return a.streams
			}
			if !a.doubtful() && !a.expiry.Equal(b.expiry) {
				return a.expiry.Before(b.expiry)
			}
			return a.tried.Before(b.tried)
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

// put adds the item, or updates its position.
func (q *queue) put(it *item) {
	if p := *q.pos(it); p >= 0 {
		heap.Fix(q, p)
	} else {
		heap.Push(q, it)
	}
}

// drop removes the item if it is in the queue.
func (q *queue) drop(it *item) {
	if p := *q.pos(it); p >= 0 {
		heap.Remove(q, p)
	}
}

// leastRecent returns the least recently tried item, nil when the queue is empty.
func (q *queue) leastRecent() *item {
	if len(q.items) == 0 {
		return nil
	}
	return slices.MinFunc(q.items, func(a, b *item) int {
		if c := a.tried.Compare(b.tried); c != 0 {
			return c
		}
		if q.less(a, b) {
			return -1
		}
		return 1
	})
}

// maxCalls returns how many of limit calls in flight the queue may use. Doubtful items
// may all hang, so they leave half of the calls to others.
func (q *queue) maxCalls(limit int) int {
	if len(q.items) == 0 {
		return 0
	}
	if q.items[0].doubtful() {
		return (limit + 1) / 2
	}
	return limit
}

// newBackoff returns pauses that double from base, with full jitter (uniform in
// [0, 2·interval]), never above limit.
func newBackoff(base, limit time.Duration) *backoff.ExponentialBackOff {
	return &backoff.ExponentialBackOff{
		InitialInterval:     base / 2,
		RandomizationFactor: 1,
		Multiplier:          2,
		MaxInterval:         limit / 2,
	}
}
