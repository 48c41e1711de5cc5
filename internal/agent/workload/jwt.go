package workload

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
)

const (
	maxAudiences   = 64
	maxAudienceLen = 2048 // bytes
	// partialWait is how long after the start of a mintJob the callers that have
	// another token wait for it. Some workloads fetch tokens for each of their
	// requests: one entry that hangs must not slow them down forever.
	partialWait = 5 * time.Second
	// answerReserve is the part of the caller's deadline that is left for the answer
	// to arrive, or a tenth of the deadline if that is less.
	answerReserve = 250 * time.Millisecond
)

var (
	errNotMinted = status.Error(codes.Unavailable, "the server did not mint a JWT-SVID: see the agent's log")
	errTooLate   = status.Error(codes.DeadlineExceeded, "the server did not mint a JWT-SVID within the deadline of the call")
)

// FetchJWTSVID returns JWT-SVIDs for the audience: one for each matched entry, or
// the one with the requested SPIFFE ID (SPIFFE Workload API, section 6.2.1).
//
// A cached token is served while it is valid. After half of its lifetime another one
// is minted in the background. Tokens of entries with IncludeJTI are not cached, and
// each call gets its own. A missing token is minted within the caller's deadline.
// Entries whose token cannot be minted are left out, as with X.509-SVIDs: it is an
// error only if no token is left. The first token left is then the default identity.
// A caller that wants a certain identity asks for it by its SPIFFE ID.
func (s *service) FetchJWTSVID(ctx context.Context, req *workloadpb.JWTSVIDRequest) (*workloadpb.JWTSVIDResponse, error) {
	deadline := answerDeadline(ctx)
	c, err := s.admitCall(ctx)
	if err != nil {
		return nil, err
	}
	defer c.release()
	r := &jwtRequest{s: s, caller: c, deadline: deadline}
	if r.audience, err = canonicalAudience(req.Audience); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if req.SpiffeId != "" {
		if r.wanted, err = spiffeid.FromString(req.SpiffeId); err != nil {
			return nil, status.Errorf(codes.InvalidArgument, "spiffe_id: %v", err)
		}
	}
	defer r.close()
	for settled := false; ; {
		svids, err := r.collect()
		if err != nil {
			return nil, err
		}
		if _, pending := r.pending(len(svids) > 0); !pending && (settled || len(r.waits) == 0) {
			switch {
			case len(svids) == 0:
				return nil, r.failure(ctx)
			case !r.wanted.IsZero():
				svids = svids[:1]
			}
			return &workloadpb.JWTSVIDResponse{Svids: svids}, nil
		}
		if settled, err = r.wait(ctx, len(svids) > 0); err != nil {
			return nil, err
		}
	}
}

// answerDeadline is the latest time to send an answer.
func answerDeadline(ctx context.Context) time.Time {
	deadline, ok := ctx.Deadline()
	if !ok {
		return time.Now().Add(mintTimeout)
	}
	return deadline.Add(-min(answerReserve, time.Until(deadline)/10))
}

// jwtRequest is one call of FetchJWTSVID.
type jwtRequest struct {
	s        *service
	caller   *caller
	audience []string
	wanted   spiffeid.ID // zero: all
	deadline time.Time
	waits    map[*cache.Entry]pendingMint // of entries without a cached token
	// Set when the call has to wait.
	wake  chan struct{} // by mintJobs
	watch *cache.Watch  // of entries and bundle
}

// pendingMint is a token that the call waits for.
type pendingMint struct {
	job         *mintJob // nil: the user has too many
	triesBefore int      // job.tries when the call joined it
}

// collect returns the tokens that the caller may have now and starts to mint the
// missing ones. All are of current entries: for an entry that was edited it requests
// another token and ignores the one of the old entry.
func (r *jwtRequest) collect() ([]*workloadpb.JWTSVID, error) {
	store := r.s.cfg.Cache
	v := store.Match(r.caller.selectors)
	if err := r.caller.authorize(&v); err != nil {
		return nil, err
	}
	var hidden []*cache.Entry
	v.Entries, hidden = cache.ByHint(v.Entries)
	r.s.logHidden(hidden)
	if err := r.checkWanted(&v); err != nil {
		return nil, err
	}
	r.stopWaiting(func(e *cache.Entry) bool { return !slices.Contains(v.Entries, e) })
	svids := make([]*workloadpb.JWTSVID, 0, len(v.Entries))
	var missing []*cache.Entry
	for _, e := range v.Entries {
		if !r.wants(e) {
			continue
		}
		jwt, ok := store.JWT(e, r.audience)
		if ok && r.s.refreshDue(jwt, v.Bundle) {
			r.s.refresh(r, e)
		}
		if !ok {
			jwt, ok = r.minted(e, v.Bundle)
		}
		if !ok {
			missing = append(missing, e)
			continue
		}
		svids = append(svids, &workloadpb.JWTSVID{SpiffeId: e.SPIFFEID.String(), Svid: jwt.Token, Hint: e.Hint})
	}
	r.waitFor(missing, len(svids) == 0)
	return svids, nil
}

func (r *jwtRequest) wants(e *cache.Entry) bool { return r.wanted.IsZero() || e.SPIFFEID == r.wanted }

// checkWanted returns an error if no entry gives the caller the requested SPIFFE ID.
func (r *jwtRequest) checkWanted(v *cache.View) error {
	switch {
	case slices.ContainsFunc(v.Entries, r.wants):
		return nil
	case r.caller.mayMatch(r.wants):
		return errAttest
	case v.Partial:
		return errStarting
	}
	return status.Error(codes.PermissionDenied, "no registration entry gives this process that SPIFFE ID")
}

// minted returns the token that this call has waited for. The cache may have no room
// for it, or it may be for this call alone.
func (r *jwtRequest) minted(e *cache.Entry, b *bundle.Snapshot) (cache.JWT, bool) {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	j := r.waits[e].job
	if j == nil || !j.minted() {
		return cache.JWT{}, false
	}
	_, trusted := b.Own.JWTKey(j.jwt.KeyID)
	return j.jwt, trusted
}

// waitFor joins the mintJobs of the entries, each once. urgent is set if the call
// has no token at all.
func (r *jwtRequest) waitFor(entries []*cache.Entry, urgent bool) {
	if len(entries) == 0 {
		return
	}
	if r.waits == nil {
		r.waits, r.wake, r.watch = make(map[*cache.Entry]pendingMint), make(chan struct{}, 1), r.s.cfg.Cache.Watch()
	}
	busy := false
	r.s.mu.Lock()
	for _, e := range entries {
		if w, joined := r.waits[e]; joined && (w.job == nil || !w.job.minted()) {
			continue
		}
		w := pendingMint{job: r.s.joinLocked(r, e)}
		if w.job != nil {
			w.triesBefore = w.job.tries
			w.job.waiting[r.wake] = struct{}{}
			if urgent {
				notify(w.job.urgent)
			}
		}
		busy = busy || w.job == nil
		r.waits[e] = w
	}
	r.s.mu.Unlock()
	if busy {
		r.s.logMintLimit(r.caller)
	}
}

// stopWaiting ends the waits for some entries.
func (r *jwtRequest) stopWaiting(which func(*cache.Entry) bool) {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	for e, w := range r.waits {
		if which(e) {
			if w.job != nil {
				delete(w.job.waiting, r.wake)
			}
			delete(r.waits, e)
		}
	}
}

func (r *jwtRequest) close() {
	r.stopWaiting(func(*cache.Entry) bool { return true })
	if r.watch != nil {
		r.watch.Close()
	}
}

// pending reports whether a token is worth waiting for, and until when. some is set
// if there is a token for the caller already.
func (r *jwtRequest) pending(some bool) (until time.Time, pending bool) {
	now := time.Now()
	until = r.deadline
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	for _, w := range r.waits {
		some = some || (w.job != nil && w.job.minted())
	}
	if !now.Before(until) || (some && !r.wanted.IsZero()) {
		return until, false
	}
	for _, w := range r.waits {
		if w.job == nil || w.job.minted() {
			continue
		}
		// A caller without any token waits for an attempt after its call.
		if isFinal(w.job.err) && (some || w.job.tries > w.triesBefore) {
			continue
		}
		if some {
			enough := w.job.createdAt.Add(partialWait)
			if !now.Before(enough) {
				continue
			}
			if enough.Before(until) {
				until = enough
			}
		}
		pending = true
	}
	return until, pending
}

// wait returns when it is time to collect again. settled is true if nothing is left
// to wait for: the next result of collect is the answer.
func (r *jwtRequest) wait(ctx context.Context, some bool) (settled bool, err error) {
	for {
		until, pending := r.pending(some)
		if !pending {
			return true, nil
		}
		timer := time.NewTimer(time.Until(until))
		select {
		case <-r.wake:
		case <-timer.C:
		case <-r.watch.C():
			timer.Stop()
			return false, nil
		case <-ctx.Done():
			timer.Stop()
			return false, status.FromContextError(ctx.Err()).Err()
		case <-r.s.stopping.Done():
			timer.Stop()
			return false, errStopping
		}
		timer.Stop()
	}
}

// failure returns the reason why there is no token at all.
func (r *jwtRequest) failure(ctx context.Context) error {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	err := errNotMinted
	if _, limited := ctx.Deadline(); limited {
		err = errTooLate
	}
	for _, w := range r.waits {
		switch {
		case w.job == nil:
			return errLimit
		case w.job.err != nil:
			err = errNotMinted
		}
	}
	return err
}

// canonicalAudience sorts the audience and drops duplicates. It rejects audiences
// that are empty, too long or contain NUL.
func canonicalAudience(audience []string) ([]string, error) {
	if len(audience) == 0 {
		return nil, errors.New("audience missing")
	}
	if len(audience) > maxAudiences {
		return nil, fmt.Errorf("more than %d audiences", maxAudiences)
	}
	out := slices.Clone(audience)
	slices.Sort(out)
	out = slices.Compact(out)
	for _, a := range out {
		switch {
		case a == "":
			return nil, errors.New("audience is empty")
		case len(a) > maxAudienceLen:
			return nil, fmt.Errorf("audience is longer than %d bytes", maxAudienceLen)
		case strings.ContainsRune(a, 0):
			return nil, errors.New("audience contains NUL")
		}
	}
	return out, nil
}
