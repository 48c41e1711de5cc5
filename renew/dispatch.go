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

// dispatch dequeues the items that may start now and returns the calls to make. The
// order is: the agent SVID, batches of all that the rate does not apply to, then the
// taint wave one by one.
func (r *Renewer) dispatch(now time.Time) []*call {
	if r.snapshot == nil {
		return nil
	}
	var calls []*call
	for !r.blocked() {
		c := r.nextCall(now)
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

// nextCall returns the next call that may start now, nil if there is none.
func (r *Renewer) nextCall(now time.Time) *call {
	agentDue := r.agent.reason != "" && !r.agent.inFlight && !r.agent.due.After(now)
	if agentDue && r.agent.reason != ReasonTaint {
		return r.startAgentSVID(false)
	}
	if r.batches < r.urgent.maxCalls(maxBatches) && !r.waveProbes() {
		r.batches++
		return r.start(r.urgent, r.cfg.BatchSize, false)
	}
	// The wave waits for the agent SVID in flight, so that no call of the wave uses
	// the one that is being replaced.
	if (!agentDue && r.wave.Len() == 0) || r.agent.inFlight || (!agentDue && r.singles >= r.wave.maxCalls(min(maxSingles, r.cfg.Rate))) {
		if r.token != nil && !r.agent.inFlight && r.wave.Len() == 0 {
			r.token.Cancel()
			r.token = nil
		}
		return nil
	}
	// The token comes before the choice, so that an item that became urgent
	// meanwhile goes first.
	if r.token == nil {
		r.token = r.limiter.Reserve()
	}
	if left, ok := r.tokenDelay(); left > 0 || !ok {
		return nil
	}
	r.token = nil
	var c *call
	if agentDue {
		c = r.startAgentSVID(true)
	} else {
		r.singles++
		c = r.start(r.wave, 1, true)
	}
	r.pace.Send(c.svids())
	return c
}

// tokenDelay returns how long the reserved token has to wait: until its own time and
// until the pace has a free place. It reports false if that place depends on an answer.
func (r *Renewer) tokenDelay() (time.Duration, bool) {
	left, ok := r.pace.Wait(1, time.Now())
	return max(left, r.token.Delay()), ok
}

// waveProbes reports whether the next probe of a closed gate is an item of the wave,
// although others are more urgent. If hanging calls hold all places of the pace, the
// others go first.
func (r *Renewer) waveProbes() bool {
	if !r.gate.closed || r.agent.inFlight {
		return false
	}
	if _, ok := r.pace.Wait(1, time.Now()); !ok {
		return false
	}
	u, w := r.urgent.leastRecent(), r.wave.leastRecent()
	return u != nil && w != nil && w.tried.Before(u.tried)
}

func (r *Renewer) startAgentSVID(paced bool) *call {
	r.agent.inFlight = true
	return &call{paced: paced, snapshot: r.snapshot, started: time.Now()}
}

// start dequeues up to n items for one call. Items with open streams do not share a
// call with others, because the answer comes only when its last item is signed.
// While the gate is closed, start takes one item as a probe.
func (r *Renewer) start(q *queue, n int, paced bool) *call {
	c := &call{paced: paced, snapshot: r.snapshot, started: time.Now(), attempts: make([]*attempt, 0, min(n, q.Len()))}
	if r.gate.closed {
		r.take(c, q, q.leastRecent())
		return c
	}
	for first := q.items[0].streams; q.Len() > 0; {
		it := q.items[0]
		if it.maxBatch > 0 {
			n = min(n, it.maxBatch)
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
		c.err = r.cfg.AgentSVID.Renew(ctx)
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
		r.handleAgentResult(c, now)
		return
	}
	if c.paced {
		r.singles--
	} else {
		r.batches--
	}
	took := time.Since(c.started)
	// If the server answered another call meanwhile, this call's items are at fault.
	ownFault := c.started.Before(r.gate.answered)
	switch {
	case c.err == nil && len(c.attempts) > 0:
		r.openGate()
	case c.err != nil && !ownFault:
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
			a.item.maxBatch = 0
			outcome = r.handleFailure(a, true, now)
		case len(c.attempts) == 1:
			// A failed probe is the server's fault until the server has answered
			// another call.
			outcome = r.handleFailure(a, ownFault || !c.probe, now)
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
	r.logSettled()
}

// accept handles the verified answer for one item.
func (r *Renewer) accept(a *attempt, now time.Time) Outcome {
	a.item.lagged = false
	r.setLag(a.svid.NotBefore.Sub(now))
	at := later(now, a.svid.NotBefore)
	a.svid.RenewAt = RenewAt(a.svid.NotBefore, a.svid.NotAfter, rand.Float64())
	early := dueSoon(a.svid, at)
	a.svid.RenewAt = a.svid.RenewAt.Add(now.Sub(at)) // by this node's clock
	// The SVID held now may not be the one held at the request: an entry may be
	// deleted, created and minted again meanwhile.
	state, _ := r.cfg.Cache.Item(a.entry.ID)
	if !r.noWorse(a.svid, state.SVID, at) {
		r.handleLag(a, now)
		return OutcomeTainted
	}
	if !r.postpone(a, state, now) {
		r.setPostponed(a.item, nil)
		if err := r.cfg.Cache.Put(a.svid); err != nil {
			return OutcomeDropped
		}
	}
	if r.failing {
		r.failing = false
		r.cfg.Log.Info("renewals recovered")
	}
	if state, _ := r.snapshot.State(a.svid.Authority); state == bundle.Tainted {
		r.handleLag(a, now)
		return OutcomeTainted
	}
	if early {
		a.item.failures++
		a.item.pause(a.svid.NotAfter, now)
		return OutcomeRenewed
	}
	a.item.resetRetry()
	return OutcomeRenewed
}

// postpone keeps an SVID that is not yet valid by this node's clock, which is behind
// the server's, and reports whether it did. Peers with the correct time accept both
// SVIDs. Peers on this node accept only the one held, so that one stays in use until
// the new one is valid by this node's clock, or until the old one is about to expire
// by the server's clock.
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
	r.setPostponed(a.item, a.svid)
	a.item.swap = swap
	return true
}

// setPostponed sets the SVID that the item is to use later; nil means none.
func (r *Renewer) setPostponed(it *item, next *cache.SVID) {
	it.postponed = next
	r.mu.Lock()
	defer r.mu.Unlock()
	if next == nil {
		delete(r.postponed, it.entryID)
	} else {
		r.postponed[it.entryID] = next
	}
}

// serves reports whether the SVID held is valid by this node's clock, matches the
// entry and is signed by a trusted authority.
func (r *Renewer) serves(state cache.Item, now time.Time) bool {
	s := state.SVID
	if s == nil || !s.For(state.Entry) || s.NotBefore.After(now) || !s.NotAfter.After(now) {
		return false
	}
	trust, _ := r.snapshot.State(s.Authority)
	return trust == bundle.Trusted
}

// swap puts the postponed SVID to use and returns the SVID held then. If its authority
// has been tainted meanwhile, it stays postponed while the SVID held is better by the
// server's time, because a replacement may not come before that one expires.
func (r *Renewer) swap(it *item, state cache.Item, now time.Time) *cache.SVID {
	next := it.postponed
	if !r.noWorse(next, state.SVID, later(now.Add(r.ClockLag()), next.NotBefore)) {
		it.swap = now.Add(maxSleep)
		return state.SVID
	}
	err := r.cfg.Cache.Put(next)
	r.setPostponed(it, nil) // after Put: see InFlight
	if err != nil {
		return state.SVID // the entry has changed
	}
	r.logSettled()
	return next
}

// handleLag handles an answer signed by a tainted authority: the item backs off.
func (r *Renewer) handleLag(a *attempt, now time.Time) {
	if !r.lagging[a.svid.Authority] {
		r.lagging[a.svid.Authority] = true
		r.settling[a.svid.Authority] = true
		r.cfg.Log.Warn("X.509-SVID signed by a tainted authority again, renewal delayed",
			"authority_id", a.svid.Authority, "entry_id", a.entry.ID, "spiffe_id", a.entry.SPIFFEID.String())
	}
	a.item.lagged = true
	a.item.failures++
	a.item.pause(a.svid.NotAfter, now)
}

// handleFailure handles a failed mint of one item, which was alone in its call or had
// an error of its own: it backs off. Only a failure that is the item's own fault
// makes the pause longer and the item doubtful.
func (r *Renewer) handleFailure(a *attempt, own bool, now time.Time) Outcome {
	if errors.Is(a.err, errUnknownAuthority) {
		r.cfg.UnknownAuthority()
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
		r.cfg.Log.Log(context.Background(), level, "X.509-SVID renewal failed", "entry_id", a.entry.ID,
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

// split handles the failure of a call of n items. One of them may be bad, or the
// server cannot sign as many within the deadline. The next calls have an eighth of the
// size, so that all parts can start at once and a bad item among 500 is alone after
// three failures.
func (r *Renewer) split(a *attempt, n int) Outcome {
	a.item.maxBatch = max(n/maxBatches, 1)
	r.cfg.Cache.Failed(a.entry.ID)
	return OutcomeFailed
}

// numbers matches numbers, with the units of a duration.
var numbers = regexp.MustCompile(`([0-9]+[0-9.]*([nµm]?s|[hm])?)+`)

func (r *Renewer) handleAgentResult(c *call, now time.Time) {
	reason := r.agent.reason
	r.agent.inFlight = false
	if c.err != nil {
		r.agent.retry = now.Add(max(r.agent.backoff.NextBackOff(), time.Second))
		log := r.cfg.Log.Debug
		// Two failures of one kind may differ in a time, a port or a count.
		if text := numbers.ReplaceAllString(c.err.Error(), "#"); text != r.agent.logged {
			log, r.agent.logged = r.cfg.Log.Warn, text
		}
		log("agent SVID renewal failed", "reason", reason, "error", c.err)
		return
	}
	r.agent.logged = ""
	if held := r.cfg.AgentSVID.Held(); held != nil {
		if state, _ := r.snapshot.State(held.Authority); state != bundle.Trusted || dueSoon(held, now) {
			r.agent.retry = now.Add(max(r.agent.backoff.NextBackOff(), retryBase))
			return
		}
	}
	r.agent.retry = time.Time{}
	r.agent.backoff.Reset()
}

// logSettled logs once for each tainted authority that no SVID depends on it.
func (r *Renewer) logSettled() {
	for id := range r.settling {
		if r.cfg.Cache.Held(id) == 0 && len(r.withPostponed(id)) == 0 {
			delete(r.settling, id)
			r.cfg.Log.Info("no X.509-SVID depends on the tainted authority", "authority_id", id)
		}
	}
}
