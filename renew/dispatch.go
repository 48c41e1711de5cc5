package renew

import (
	"context"
	"errors"
	"math/rand/v2"
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
			break // this one tries
		}
	}
	return calls
}

func (r *Renewer) next(now time.Time) *call {
	ownDue := r.own.reason != "" && !r.own.inFlight && !r.own.due.After(now)
	if ownDue && r.own.reason != ReasonTaint {
		return r.startOwn()
	}
	if r.urgent.Len() > 0 && r.batches < maxBatches {
		n := min(r.urgent.Len(), r.cfg.BatchSize)
		if r.gate.closed {
			n = 1
		}
		r.batches++
		return r.start(r.urgent, n, false)
	}
	// While the own SVID is on its way the wave waits: it would go out with an
	// identity that is about to be retired.
	if (!ownDue && r.wave.Len() == 0) || r.own.inFlight || r.singles >= maxSingles {
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
	if r.token.Delay() > 0 {
		return nil
	}
	r.token = nil
	if ownDue {
		return r.startOwn()
	}
	r.singles++
	return r.start(r.wave, 1, true)
}

func (r *Renewer) startOwn() *call {
	r.own.inFlight = true
	return &call{snapshot: r.snapshot, started: time.Now()}
}

// start takes up to n items from a ready queue for one call. Those that a
// stream waits for go in a call of their own, because an answer comes when its
// last item is signed.
func (r *Renewer) start(q *queue, n int, single bool) *call {
	c := &call{single: single, snapshot: r.snapshot, started: time.Now(), attempts: make([]*attempt, 0, n)}
	for first := q.items[0].streams; len(c.attempts) < n && q.Len() > 0 && q.items[0].streams == first; {
		it := q.take()
		it.ready = nil
		it.inFlight = true
		r.timers.drop(it)
		a := &attempt{item: it, reason: it.reason}
		if state, ok := r.cfg.Cache.Item(it.entryID); ok {
			a.entry, a.held = state.Entry, state.SVID
			c.attempts = append(c.attempts, a)
		} else {
			r.forget(it) // gone since it was looked at
		}
	}
	return c
}

// work makes the call on its own goroutine.
func (r *Renewer) work(ctx context.Context, c *call) {
	switch {
	case c.attempts == nil:
		c.err = r.cfg.Own.Renew(ctx)
	case len(c.attempts) > 0:
		c.err = r.mint(ctx, c.attempts)
	}
	r.done <- c
}

// finish takes a call's outcome in: opens or closes the gate, puts what was
// minted, and has every item looked at again.
func (r *Renewer) finish(c *call) {
	defer func() {
		r.mu.Lock()
		delete(r.inFlight, c)
		r.mu.Unlock()
	}()
	now := r.cfg.Now()
	if c.attempts == nil {
		r.finishOwn(c, now)
		return
	}
	if c.single {
		r.singles--
	} else {
		r.batches--
	}
	took := time.Since(c.started)
	if c.err != nil {
		r.closeGate(c)
	} else if len(c.attempts) > 0 {
		r.openGate()
	}
	for _, a := range c.attempts {
		a.item.inFlight = false
		if c.err != nil {
			r.cfg.Observer.Minted(c.err, took)
			r.cfg.Observer.Renewed(a.reason, OutcomeFailed)
			r.cfg.Cache.Failed(a.entry.ID)
		} else {
			outcome := r.apply(a, now)
			if outcome != OutcomeMissing {
				r.cfg.Observer.Minted(a.err, took)
			}
			r.cfg.Observer.Renewed(a.reason, outcome)
		}
		if r.items[a.item.entryID] == a.item {
			r.look(a.item.entryID, now)
		}
	}
	r.settled()
}

// apply takes in one item's answer.
func (r *Renewer) apply(a *attempt, now time.Time) Outcome {
	if a.err != nil {
		return r.failed(a, now)
	}
	a.svid.RenewAt = RenewAt(a.svid.NotBefore, a.svid.NotAfter, rand.Float64())
	// Compared with what is held now: the entry may have been gone for a moment
	// and minted again while this answer was on its way.
	if state, _ := r.cfg.Cache.Item(a.entry.ID); !r.better(a.svid, state.SVID, now) {
		r.lag(a, now)
		return OutcomeTainted
	}
	if err := r.cfg.Cache.Put(a.svid); err != nil {
		return OutcomeDropped
	}
	if r.failing {
		r.failing = false
		r.cfg.Log.Info("renewals work again")
	}
	if state, _ := r.snapshot.State(a.svid.Authority); state == bundle.Tainted {
		r.lag(a, now)
		return OutcomeTainted
	}
	if old(a.svid, now) {
		r.pause(a.item, a.svid.NotAfter, now)
		return OutcomeRenewed
	}
	a.item.retry, a.item.backoff = time.Time{}, nil
	return OutcomeRenewed
}

// old reports whether an SVID that has just been minted is due again too soon:
// this node's clock is far ahead of the server's, or the authority is about to
// end. The next would be no better, so it is asked for with pauses.
func old(s *cache.SVID, now time.Time) bool {
	return s.RenewAt.Sub(now) < s.NotAfter.Sub(now)/4
}

// better reports whether got is no worse than held. One of a trusted authority
// never is, also where it ends sooner: how long SVIDs live is the server's to
// say. One of a tainted authority does not replace one of a trusted authority,
// unless that one has less than a tenth of its life left: a tainted SVID is
// better than none.
func (r *Renewer) better(got, held *cache.SVID, now time.Time) bool {
	if held == nil || held.Revision != got.Revision || !held.Created.Equal(got.Created) || !held.NotAfter.After(now) {
		return true
	}
	gotState, _ := r.snapshot.State(got.Authority)
	heldState, _ := r.snapshot.State(held.Authority)
	rank := map[bundle.State]int{bundle.Removed: 0, bundle.Tainted: 1, bundle.Trusted: 2}
	switch {
	case gotState == bundle.Trusted, rank[gotState] > rank[heldState]:
		return true
	case rank[gotState] == rank[heldState]:
		return !got.NotAfter.Before(held.NotAfter)
	}
	return held.NotAfter.Sub(now) < held.NotAfter.Sub(held.NotBefore)/10
}

// lag notes that a tainted authority still signs and has the item wait.
func (r *Renewer) lag(a *attempt, now time.Time) {
	if !r.lagging[a.svid.Authority] {
		r.lagging[a.svid.Authority] = true
		r.settling[a.svid.Authority] = true
		r.cfg.Log.Warn("server still signs with a tainted authority, trying again later",
			"authority", a.svid.Authority, "entry", a.entry.ID, "spiffe_id", a.entry.SPIFFEID.String())
	}
	r.pause(a.item, a.svid.NotAfter, now)
}

// failed notes that one entry's SVID could not be minted and has it wait.
func (r *Renewer) failed(a *attempt, now time.Time) Outcome {
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
	level := r.cfg.Log.Debug
	if !r.failing && outcome != OutcomeMissing {
		r.failing, level = true, r.cfg.Log.Warn
	}
	level("X.509-SVID not renewed, trying again later", "entry", a.entry.ID,
		"spiffe_id", a.entry.SPIFFEID.String(), "reason", a.reason, "error", a.err)
	var expiry time.Time
	if a.held != nil {
		expiry = a.held.NotAfter
	} else {
		r.cfg.Cache.Failed(a.entry.ID)
	}
	r.pause(a.item, expiry, now)
	return outcome
}

// pause draws when the item is tried again. One that is about to expire does
// not wait for more than a quarter of what it has left.
func (r *Renewer) pause(it *item, expiry, now time.Time) {
	if it.backoff == nil {
		it.backoff = newBackoff(retryBase, retryLimit)
	}
	d := it.backoff.NextBackOff()
	if left := expiry.Sub(now); left > 0 {
		d = min(d, left/4)
	}
	it.retry = now.Add(max(d, time.Second))
}

func (r *Renewer) finishOwn(c *call, now time.Time) {
	reason := r.own.reason
	r.own.inFlight = false
	if c.err != nil {
		r.own.retry = now.Add(max(r.own.backoff.NextBackOff(), time.Second))
		log := r.cfg.Log.Debug
		if text := c.err.Error(); text != r.own.said {
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
		if r.cfg.Cache.Held(id) == 0 {
			delete(r.settling, id)
			r.cfg.Log.Info("no X.509-SVID hangs on the tainted authority any more", "authority", id)
		}
	}
}
