package renew

import (
	"container/heap"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/renewd/renewd/cache"
)

// item is one entry in the Renewer's hands. It is owned by Run.
type item struct {
	entryID   string
	entry     *cache.Entry // as it was when looked at last
	reason    Reason
	streams   bool
	missing   bool        // the server's answers do not name the entry
	expiry    time.Time   // zero when none is held
	wake      time.Time   // when to look again
	retry     time.Time   // not before, after a failure
	failures  int         // tries in a row, of this item alone, that did not renew it
	lagged    bool        // a tainted authority signed the last answer
	most      int         // how large a call it may be in; zero means BatchSize
	tried     time.Time   // monotonic: when it was last asked for
	postponed *cache.SVID // minted, and not in use before swap; see Renewer.postpone
	swap      time.Time
	inFlight  bool
	state     State
	outcome   Outcome // of the last mint
	timerPos  int     // position in timers, or -1
	readyPos  int     // position in its ready queue, or -1
	ready     *queue
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

// answered forgets the failures.
func (it *item) answered() { it.retry, it.failures, it.most = time.Time{}, 0, 0 }

// pause draws when an item that failed is tried again: after full jitter below
// a bound that doubles from retryBase to retryLimit. One that is about to expire
// does not wait for more than a quarter of what it has left.
func (it *item) pause(expiry, now time.Time) {
	bound := min(retryBase<<min(max(it.failures-1, 0), 10), retryLimit)
	d := rand.N(bound)
	if left := expiry.Sub(now); left > 0 {
		d = min(d, left/4)
	}
	it.retry = now.Add(max(d, time.Second))
}

// doubtful says that the item itself is probably why it fails. A single failure
// is not enough: it is also what the start of an outage looks like.
func (it *item) doubtful() bool { return it.failures > 1 }

// newReady returns a queue with the most urgent item first: those with open
// streams, then those that expire first. What is not held at all has a zero
// expiry and so comes first among its like; of equals the least recently tried
// does. Doubtful ones come last and take turns, however urgent they are.
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

// stalest returns the least recently tried item, nil when the queue is empty.
func (q *queue) stalest() *item {
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

// room is how many calls of limit the queue may use: doubtful items, which may
// all hang, leave half of them to others, where it is more than one.
func (q *queue) room(limit int) int {
	if len(q.items) == 0 {
		return 0
	}
	if q.items[0].doubtful() {
		return (limit + 1) / 2
	}
	return limit
}

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
