package renew

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v5"
	"golang.org/x/time/rate"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/renew/wave"
)

// Renewer renews the X.509-SVIDs of one cache. Run does the work and owns its state.
// InFlight, States and ClockLag are safe for concurrent use.
type Renewer struct {
	cfg      Config
	policy   Policy
	limiter  *rate.Limiter // spreads the wave over each second
	pace     *wave.Pace    // bounds how many of it reach the server in any second
	follower *cache.Follower
	done     chan *call

	// Owned by Run.
	snapshot  *bundle.Snapshot
	items     map[string]*item
	timers    *queue // items that wait for a time
	urgent    *queue // due, and the rate does not apply
	wave      *queue // due because of a taint, or after an answer signed by a tainted authority
	agent     agentItem
	token     *rate.Reservation // of the next taint renewal, or nil
	gate      gate
	singles   int
	batches   int
	failing   bool            // the last failure was logged as a warning
	lagging   map[string]bool // tainted authorities that signed an answer
	settling  map[string]bool // tainted authorities that SVIDs may depend on
	clock     clock
	lagLogged bool // the clock lag was logged

	lag atomic.Int64 // see ClockLag

	mu        sync.Mutex
	inFlight  map[*call]struct{}
	states    [len(stateNames)]int   // items by State
	postponed map[string]*cache.SVID // by entry ID: item.postponed of all that have one
}

// agentItem is the agent SVID. It is owned by Run.
type agentItem struct {
	reason   Reason
	due      time.Time
	retry    time.Time
	backoff  *backoff.ExponentialBackOff
	inFlight bool
	logged   string // the last failure logged as a warning, without its numbers
}

// call is one request to the server.
type call struct {
	attempts []*attempt       // nil for the agent SVID
	paced    bool             // it holds places of the pace
	probe    bool             // it began while the gate was closed
	snapshot *bundle.Snapshot // the current one when the call began
	started  time.Time        // monotonic
	ended    time.Time        // monotonic
	err      error            // of the call as a whole
}

// svids returns the number of SVIDs requested.
func (c *call) svids() int {
	if c.attempts == nil {
		return 1
	}
	return len(c.attempts)
}

// New returns a Renewer. It panics if a required field is missing, which is a bug in the
// program.
func New(cfg Config) *Renewer {
	cfg = cfg.withDefaults()
	return &Renewer{
		cfg: cfg,
		policy: Policy{Delay: func(id string) time.Duration {
			return wave.Delay(cfg.Seed, id, cfg.MaxDelay)
		}},
		limiter: rate.NewLimiter(rate.Limit(cfg.Rate), 1),
		pace:    wave.NewPace(cfg.Rate, time.Now()),
		// Room for every possible call, so that no worker waits for Run, which may
		// have ended.
		done:      make(chan *call, maxSingles+maxBatches+1),
		items:     make(map[string]*item),
		timers:    newTimers(),
		urgent:    newReady(),
		wave:      newReady(),
		lagging:   make(map[string]bool),
		settling:  make(map[string]bool),
		inFlight:  make(map[*call]struct{}),
		postponed: make(map[string]*cache.SVID),
		gate:      gate{backoff: newBackoff(time.Second, gateLimit)},
		agent:     agentItem{backoff: newBackoff(retryBase, retryLimit)},
	}
}

// InFlight counts the SVIDs in flight, including the agent SVID, whose calls began
// before this node learned at since of the authority's taint: the tainted authority may
// sign them. Postponed SVIDs that the authority signed count, too. Call it before you
// read the cache, so that an answer is seen in one of the two. It is safe for
// concurrent use.
func (r *Renewer) InFlight(authorityID string, since time.Time) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for c := range r.inFlight {
		// The time when the call began does not tell: clocks are set.
		if state, at := c.snapshot.State(authorityID); state != bundle.Tainted || !at.Equal(since) {
			n += max(len(c.attempts), 1)
		}
	}
	return n + len(r.postponedLocked(authorityID))
}

// withPostponed lists the entries whose postponed SVID the authority signed.
func (r *Renewer) withPostponed(authorityID string) []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.postponedLocked(authorityID)
}

func (r *Renewer) postponedLocked(authorityID string) []string {
	var ids []string
	for id, s := range r.postponed {
		if s.Authority == authorityID {
			ids = append(ids, id)
		}
	}
	return ids
}

// Run renews until ctx is done. It then waits for the calls in flight, which ctx cancels,
// and returns nil.
func (r *Renewer) Run(ctx context.Context) error {
	r.follower = r.cfg.Cache.Follow()
	defer r.follower.Close()
	var workers sync.WaitGroup
	defer workers.Wait()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-r.follower.C():
		case c := <-r.done:
			// The bundle comes first: a new authority in it may have signed the
			// answer.
			r.handleChanges(r.cfg.Now())
			r.handleResult(c)
		}
		now := r.cfg.Now()
		r.handleChanges(now)
		if r.clock.stepped(now) {
			r.cfg.Log.Warn("clock step detected, recomputing deadlines")
			r.agent.retry = time.Time{}
			for id, it := range r.items {
				it.retry, it.swap = time.Time{}, time.Time{}
				r.reschedule(id, now)
			}
		}
		for r.timers.Len() > 0 && !r.timers.items[0].wake.After(now) {
			r.reschedule(r.timers.items[0].entryID, now)
		}
		r.scheduleAgentSVID(now)
		for _, c := range r.dispatch(now) {
			r.mu.Lock()
			r.inFlight[c] = struct{}{}
			r.mu.Unlock()
			workers.Go(func() { r.work(ctx, c) })
		}
		timer.Reset(r.sleep(now))
	}
}

// handleChanges reschedules every item that a change of the cache or of the
// bundle may have made due, and no other.
func (r *Renewer) handleChanges(now time.Time) {
	for {
		changed := r.follower.Drain()
		next := r.cfg.Cache.Bundle()
		if next == nil {
			// Nothing can be verified yet. The items made here are rescheduled with
			// the first bundle.
			for _, id := range changed {
				r.reschedule(id, now)
			}
			return
		}
		if next != r.snapshot {
			prev := r.snapshot
			r.snapshot = next
			changed = append(changed, r.affected(prev, next)...)
		}
		if len(changed) == 0 {
			return
		}
		for _, id := range changed {
			r.reschedule(id, now)
		}
	}
}

// affected lists the entries whose SVID is signed by an authority that changed between
// two snapshots.
func (r *Renewer) affected(prev, next *bundle.Snapshot) []string {
	if prev == nil {
		ids := make([]string, 0, len(r.items))
		for id := range r.items {
			ids = append(ids, id)
		}
		return ids
	}
	var ids []string
	for _, c := range bundle.Diff(prev.Own, next.Own) {
		if c.Type != bundle.TypeX509 {
			continue
		}
		signed := append(r.cfg.Cache.SignedBy(c.ID), r.withPostponed(c.ID)...)
		ids = append(ids, signed...)
		delete(r.lagging, c.ID)
		switch c.Kind {
		case bundle.KindTainted:
			_, since := next.State(c.ID)
			r.cfg.Log.Info("authority tainted, renewals scheduled", "authority_id", c.ID,
				"svids", len(signed), "delay", r.policy.Delay(c.ID).Round(time.Millisecond),
				"begins_at", since.Add(r.policy.Delay(c.ID)))
			r.settling[c.ID] = true
		case bundle.KindRemoved:
			if len(signed) > 0 {
				r.cfg.Log.Warn("authority removed while X.509-SVIDs depend on it, renewing at once",
					"authority_id", c.ID, "svids", len(signed))
			}
		}
	}
	return ids
}

// reschedule decides the state of an entry's item, and the queue where it waits. It
// is the only place that does; take alone moves it from there, to StateMinting.
func (r *Renewer) reschedule(id string, now time.Time) {
	it := r.items[id]
	state, wanted := r.cfg.Cache.Item(id)
	if !wanted {
		if it != nil {
			r.forget(it)
		}
		return
	}
	if it == nil {
		it = &item{entryID: id, timerPos: -1, readyPos: -1}
		r.items[id] = it
		r.count(StateWaiting, 1)
	}
	if it.inFlight || r.snapshot == nil {
		return // until the answer, or the first snapshot
	}
	if it.postponed != nil && (!it.swap.After(now) || !r.serves(state, now)) {
		state.SVID = r.swap(it, state, now)
	}
	newest := state
	if it.postponed != nil {
		newest.SVID = it.postponed
	}
	due, reason := Due(newest, r.snapshot, r.policy, now)
	it.streams = state.Streams > 0
	returned := it.missing && !state.Missing
	it.missing = state.Missing
	it.expiry = time.Time{}
	if state.SVID != nil {
		it.expiry = state.SVID.NotAfter
	}
	if it.entry != state.Entry || returned {
		it.resetRetry() // the failures were about another revision
	} else if reason != it.reason && reason == ReasonRemoved {
		it.retry = time.Time{}
	}
	it.entry, it.reason = state.Entry, reason
	if it.retry.After(due) {
		due = it.retry
	}
	r.dequeue(it)
	r.move(it, r.nextState(it, newest.SVID, due, now))
	var wake time.Time
	switch {
	case due.After(now):
		wake = due
	case reason == ReasonTaint:
		it.ready = r.wave
		// From its half-life on the rate does not apply.
		wake = newest.RenewAt()
	case reason == ReasonHalfLife && it.lagged && now.Before(lastTenth(newest.SVID)):
		// The next answer is probably tainted, too. In the last tenth of its life the
		// SVID is replaced by any answer, and the rate does not apply.
		it.ready = r.wave
		wake = lastTenth(newest.SVID)
	default:
		it.ready = r.urgent
	}
	if it.postponed != nil {
		wake = sooner(wake, it.swap)
	}
	if newest.SVID != nil && it.state != StateExpired {
		wake = sooner(wake, newest.SVID.NotAfter)
	}
	if it.wake = wake; wake.IsZero() {
		r.timers.drop(it)
	} else {
		r.timers.put(it)
	}
	if it.ready != nil {
		it.ready.put(it)
	}
}

// sooner returns the earlier of two times, of which a may be zero for none.
func sooner(a, b time.Time) time.Time {
	if a.IsZero() || b.Before(a) {
		return b
	}
	return a
}

func (r *Renewer) dequeue(it *item) {
	if it.ready != nil {
		it.ready.drop(it)
		it.ready = nil
	}
}

func (r *Renewer) forget(it *item) {
	r.timers.drop(it)
	r.dequeue(it)
	r.setPostponed(it, nil)
	delete(r.items, it.entryID)
	r.count(it.state, -1)
}

// scheduleAgentSVID decides when the agent SVID is due.
func (r *Renewer) scheduleAgentSVID(now time.Time) {
	if r.cfg.AgentSVID == nil || r.agent.inFlight || r.snapshot == nil {
		return
	}
	held := r.cfg.AgentSVID.Held()
	if held == nil {
		r.agent.reason = ""
		return
	}
	r.agent.due, r.agent.reason = Due(cache.Item{Entry: &agentEntry, SVID: held}, r.snapshot, r.policy, now)
	if r.agent.retry.After(r.agent.due) {
		r.agent.due = r.agent.retry
	}
}

// agentEntry stands in for an entry: the agent SVID has none.
var agentEntry cache.Entry

// sleep returns how long Run may sleep if nothing wakes it.
func (r *Renewer) sleep(now time.Time) time.Duration {
	d := maxSleep
	at := func(t time.Duration) { d = min(d, max(t, 0)) }
	if r.timers.Len() > 0 {
		at(r.timers.items[0].wake.Sub(now))
	}
	if r.agent.reason != "" && !r.agent.inFlight && r.agent.due.After(now) {
		at(r.agent.due.Sub(now))
	}
	// A gate or a token that is not used although its time has come waits for an
	// event that wakes Run, such as an answer.
	if left := time.Until(r.gate.until); r.gate.closed && left > 0 {
		at(left)
	}
	if r.token != nil {
		if left, _ := r.tokenDelay(); left > 0 {
			at(left)
		}
	}
	return d
}
