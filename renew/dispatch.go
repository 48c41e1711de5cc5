package renew

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"regexp"
	"time"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
)

// dispatch takes what is ready and may start now, and returns the calls to
// make. The order is: the node's own SVID, what is free of the rate in
// batches, then the taint wave one by one as tokens come.
func (r *Renewer) dispatch(now time.Time) []*call {
	if r.snapshot == nil {
		return nil
	}
	var calls []*call
	for !r.blocked() {
		c := r.next(now)
		if c == nil {
			break
		}
		calls = append(calls, c)
		if r.gate.closed {
			c.probe = true
			r.gate.hold()
		}
	}
	return calls
}

func (r *Renewer) next(now time.Time) *call {
	ownDue := r.own.reason != "" && !r.own.inFlight && !r.own.due.After(now)
	if ownDue && r.own.reason != ReasonTaint {
		return r.startOwn(false)
	}
	if r.batches < r.urgent.room(maxBatches) && !r.waveTries() {
		r.batches++
		return r.start(r.urgent, r.cfg.BatchSize, false)
	}
	// While the own SVID is on its way the wave waits: it would go out with an
	// identity that is about to be retired.
	if (!ownDue && r.wave.Len() == 0) || r.own.inFlight || (!ownDue && r.singles >= r.wave.room(min(maxSingles, r.cfg.Rate))) {
		if r.token != nil && !r.own.inFlight && r.wave.Len() == 0 {
			r.token.Cancel()
			r.token = nil
		}
		return nil
	}
	// The token comes first and the choice after it, so that what has become
	// urgent meanwhile goes first.
	if r.token == nil {
		r.token = r.limiter.Reserve()
	}
	if left, ok := r.tokenDelay(); left > 0 || !ok {
		return nil
	}
	r.token = nil
	var c *call
	if ownDue {
		c = r.startOwn(true)
	} else {
		r.singles++
		c = r.start(r.wave, 1, true)
	}
	r.pace.Send(c.svids())
	return c
}

// tokenDelay is how long the token that was reserved cannot be used yet: until its
// own time, and until a place of the pace is free. It reports false while the
// latter is up to an answer.
func (r *Renewer) tokenDelay() (time.Duration, bool) {
	left, ok := r.pace.Wait(1, time.Now())
	return max(left, r.token.Delay()), ok
}

// waveTries reports whether the gate is closed and the item to try next is one
// of the wave, although others are more urgent. They do not wait for it while
// calls that hang have taken its rate.
func (r *Renewer) waveTries() bool {
	if !r.gate.closed || r.own.inFlight {
		return false
	}
	if _, ok := r.pace.Wait(1, time.Now()); !ok {
		return false
	}
	u, w := r.urgent.stalest(), r.wave.stalest()
	return u != nil && w != nil && w.tried.Before(u.tried)
}

func (r *Renewer) startOwn(paced bool) *call {
	r.own.inFlight = true
	return &call{paced: paced, snapshot: r.snapshot, started: time.Now()}
}

// start takes up to n items from a ready queue for one call. Those that a
// stream waits for go in a call of their own, because an answer comes when its
// last item is signed. Behind a closed gate it takes the one that tries.
func (r *Renewer) start(q *queue, n int, paced bool) *call {
	c := &call{paced: paced, snapshot: r.snapshot, started: time.Now(), attempts: make([]*attempt, 0, min(n, q.Len()))}
	if r.gate.closed {
		r.take(c, q, q.stalest())
		return c
	}
	for first := q.items[0].streams; q.Len() > 0; {
		it := q.items[0]
		if it.most > 0 {
			n = min(n, it.most)
		}
		if len(c.attempts) >= n || it.streams != first {
			break
		}
		r.take(c, q, it)
	}
	return c
}

// take moves an item from its ready queue into a call.
func (r *Renewer) take(c *call, q *queue, it *item) {
	r.dequeue(it)
	r.timers.drop(it)
	state, ok := r.cfg.Cache.Item(it.entryID)
	if !ok {
		r.forget(it) // deleted since it was scheduled
		return
	}
	it.inFlight = true
	it.tried = c.started
	r.move(it, StateMinting)
	c.attempts = append(c.attempts, &attempt{item: it, reason: it.reason, entry: state.Entry, held: state.SVID})
}

// work makes the call on its own goroutine.
func (r *Renewer) work(ctx context.Context, c *call) {
	switch {
	case c.attempts == nil:
		c.err = r.cfg.Own.Renew(ctx)
	case len(c.attempts) > 0:
		c.err = r.mint(ctx, c.attempts)
	}
	c.ended = time.Now()
	r.done <- c
}

// handleResult opens or closes the gate by a call's outcome, puts what was minted
// into the cache and reschedules every item.
func (r *Renewer) handleResult(c *call) {
	defer func() {
		r.mu.Lock()
		delete(r.inFlight, c)
		r.mu.Unlock()
	}()
	now := r.cfg.Now()
	if c.paced {
		r.pace.Answer(c.svids(), c.ended)
	}
	if c.attempts == nil {
		r.handleOwnResult(c, now)
		return
	}
	if c.paced {
		r.singles--
	} else {
		r.batches--
	}
	took := time.Since(c.started)
	// A server that answered another call meanwhile is there: the fault is with
	// what this call asked for.
	blamed := c.started.Before(r.gate.answered)
	switch {
	case c.err == nil && len(c.attempts) > 0:
		r.openGate()
	case c.err != nil && !blamed:
		r.closeGate(c)
	}
	for _, a := range c.attempts {
		a.item.inFlight = false
		if a.err == nil {
			a.err = c.err
		}
		var outcome Outcome
		switch {
		case a.err == nil:
			outcome = r.accept(a, now)
		case c.err == nil:
			a.item.most = 0
			outcome = r.failed(a, true, now)
		case len(c.attempts) == 1:
			// What fails behind a closed gate is the server's fault until it has
			// answered another call.
			outcome = r.failed(a, blamed || !c.probe, now)
		default:
			outcome = r.split(a, len(c.attempts))
		}
		if outcome != OutcomeMissing {
			r.cfg.Observer.Minted(a.err, took)
		}
		r.cfg.Observer.Renewed(a.reason, outcome)
		a.item.outcome = outcome
		if r.items[a.item.entryID] == a.item {
			r.reschedule(a.item.entryID, now)
		}
	}
	r.settled()
}

// accept handles the verified answer for one item.
func (r *Renewer) accept(a *attempt, now time.Time) Outcome {
	a.item.lagged = false
	r.noteLag(a.svid.NotBefore.Sub(now))
	at := later(now, a.svid.NotBefore)
	a.svid.RenewAt = RenewAt(a.svid.NotBefore, a.svid.NotAfter, rand.Float64())
	early := old(a.svid, at)
	a.svid.RenewAt = a.svid.RenewAt.Add(now.Sub(at)) // by this node's clock
	// Compared with what is held now: the entry may have been gone for a moment
	// and minted again while this answer was on its way.
	state, _ := r.cfg.Cache.Item(a.entry.ID)
	if !r.better(a.svid, state.SVID, at) {
		r.lagged(a, now)
		return OutcomeTainted
	}
	if !r.postpone(a, state, now) {
		r.keepFor(a.item, nil)
		if err := r.cfg.Cache.Put(a.svid); err != nil {
			return OutcomeDropped
		}
	}
	if r.failing {
		r.failing = false
		r.cfg.Log.Info("renewals work again")
	}
	if state, _ := r.snapshot.State(a.svid.Authority); state == bundle.Tainted {
		r.lagged(a, now)
		return OutcomeTainted
	}
	if early {
		a.item.failures++
		a.item.pause(a.svid.NotAfter, now)
		return OutcomeRenewed
	}
	a.item.answered()
	return OutcomeRenewed
}

// postpone keeps an SVID that is not valid yet by this node's clock, because that
// is behind the server's, until it may be used, and reports whether there is
// cause to. Peers with the right time accept it and the one held; those that
// share this node's clock accept the one held alone. So that one stays in use
// while it is valid by both clocks: until the new one begins by this node's
// clock, or the old one is about to end by the server's.
func (r *Renewer) postpone(a *attempt, state cache.Item, now time.Time) bool {
	lag := a.svid.NotBefore.Sub(now)
	if lag <= 0 || !r.serves(state, now) {
		return false
	}
	swap := a.svid.NotBefore
	if end := state.SVID.NotAfter.Add(-lag - swapMargin); end.Before(swap) {
		swap = end
	}
	if !swap.After(now) {
		return false
	}
	r.keepFor(a.item, a.svid)
	a.item.swap = swap
	return true
}

// keepFor has the item's next SVID wait for its time, or none with nil.
func (r *Renewer) keepFor(it *item, next *cache.SVID) {
	it.postponed = next
	r.mu.Lock()
	defer r.mu.Unlock()
	if next == nil {
		delete(r.postponed, it.entryID)
	} else {
		r.postponed[it.entryID] = next
	}
}

// serves reports whether what is held is good to hand out by this node's clock,
// as it is and as the entry is.
func (r *Renewer) serves(state cache.Item, now time.Time) bool {
	s := state.SVID
	if s == nil || !s.For(state.Entry) || s.NotBefore.After(now) || !s.NotAfter.After(now) {
		return false
	}
	trust, _ := r.snapshot.State(s.Authority)
	return trust == bundle.Trusted
}

// swap puts the SVID that was postponed to use and returns what is held then. One
// whose authority was tainted meanwhile goes on waiting while what is held is the
// better one by the server's time: its replacement may not be had before that ends.
func (r *Renewer) swap(it *item, state cache.Item, now time.Time) *cache.SVID {
	next := it.postponed
	if !r.better(next, state.SVID, later(now.Add(r.ClockLag()), next.NotBefore)) {
		it.swap = now.Add(maxSleep)
		return state.SVID
	}
	err := r.cfg.Cache.Put(next)
	r.keepFor(it, nil) // after Put: see InFlight
	if err != nil {
		return state.SVID // the entry has changed
	}
	r.settled()
	return next
}

// lagged notes that a tainted authority still signs and has the item wait.
func (r *Renewer) lagged(a *attempt, now time.Time) {
	if !r.lagging[a.svid.Authority] {
		r.lagging[a.svid.Authority] = true
		r.settling[a.svid.Authority] = true
		r.cfg.Log.Warn("server still signs with a tainted authority, trying again later",
			"authority", a.svid.Authority, "entry", a.entry.ID, "spiffe_id", a.entry.SPIFFEID.String())
	}
	a.item.lagged = true
	a.item.failures++
	a.item.pause(a.svid.NotAfter, now)
}

// failed notes that one entry's SVID was asked for alone, or had an answer of
// its own, and could not be minted: it waits. The pause grows, and the item
// becomes doubtful, only by failures that are its own.
func (r *Renewer) failed(a *attempt, own bool, now time.Time) Outcome {
	if errors.Is(a.err, errUnknownAuthority) {
		r.cfg.Unexplained()
	}
	outcome := OutcomeFailed
	switch {
	case a.rejected:
		outcome = OutcomeRejected
	case r.cfg.Cache.Missing(a.entry.ID):
		outcome = OutcomeMissing
	}
	if own {
		a.item.failures++
		level := slog.LevelDebug
		if !r.failing && a.item.failures == 1 && outcome != OutcomeMissing {
			r.failing, level = true, slog.LevelWarn
		}
		r.cfg.Log.Log(context.Background(), level, "X.509-SVID not renewed, trying again later", "entry", a.entry.ID,
			"spiffe_id", a.entry.SPIFFEID.String(), "reason", a.reason, "error", a.err)
	}
	r.cfg.Cache.Failed(a.entry.ID)
	var expiry time.Time
	if a.held != nil {
		expiry = a.held.NotAfter
	}
	a.item.pause(expiry, now)
	return outcome
}

// split notes that a call of n items failed, which says little about each: one
// of them may be bad, or they are too many for the server to sign within the
// deadline. Each goes in a call of an eighth of the size next, so that all parts
// may go at once, and a bad one among 500 is alone after three.
func (r *Renewer) split(a *attempt, n int) Outcome {
	a.item.most = max(n/maxBatches, 1)
	r.cfg.Cache.Failed(a.entry.ID)
	return OutcomeFailed
}

// numbers are runs of digits with the units of a duration.
var numbers = regexp.MustCompile(`([0-9]+[0-9.]*([nµm]?s|[hm])?)+`)

func (r *Renewer) handleOwnResult(c *call, now time.Time) {
	reason := r.own.reason
	r.own.inFlight = false
	if c.err != nil {
		r.own.retry = now.Add(max(r.own.backoff.NextBackOff(), time.Second))
		log := r.cfg.Log.Debug
		// Two failures of one kind may differ in a time, a port or a count.
		if text := numbers.ReplaceAllString(c.err.Error(), "#"); text != r.own.said {
			log, r.own.said = r.cfg.Log.Warn, text
		}
		log("node's own SVID not renewed, trying again later", "reason", reason, "error", c.err)
		return
	}
	r.own.said = ""
	if held := r.cfg.Own.Held(); held != nil {
		if state, _ := r.snapshot.State(held.Authority); state != bundle.Trusted || old(held, now) {
			r.own.retry = now.Add(max(r.own.backoff.NextBackOff(), retryBase))
			return
		}
	}
	r.own.retry = time.Time{}
	r.own.backoff.Reset()
}

// settled says once for each tainted authority that nothing held hangs on it.
func (r *Renewer) settled() {
	for id := range r.settling {
		if r.cfg.Cache.Held(id) == 0 && len(r.postponedOf(id)) == 0 {
			delete(r.settling, id)
			r.cfg.Log.Info("no X.509-SVID hangs on the tainted authority any more", "authority", id)
		}
	}
}
