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
	// completeWait is how long after a token was first asked for the callers
	// that can be given other ones wait for it. Some workloads fetch tokens for
	// each of their requests: one entry that hangs must not slow them down for ever.
	completeWait = 5 * time.Second
	// answerTime is what an answer gets of the caller's deadline to arrive in,
	// or a tenth of it if that is less.
	answerTime = 250 * time.Millisecond
)

var (
	errNotMinted = status.Error(codes.Unavailable, "the server did not mint a JWT-SVID: the agent's log says why")
	errTooLate   = status.Error(codes.DeadlineExceeded, "the server did not mint a JWT-SVID within the deadline of the call")
)

// FetchJWTSVID returns JWT-SVIDs for the audience: one for each matched entry,
// or the one with the SPIFFE ID asked for (SPIFFE Workload API, section 6.2.1).
//
// A token that is held is handed out while it is valid; past half of its life
// another one is minted behind the answer. Tokens of entries with IncludeJTI are
// not held, and each call has its own. What is not held is tried for within
// the caller's deadline. Entries whose token cannot be had are left out, as they
// are from X.509-SVIDs: it is an error only when there is none at all. The first
// one left is the default identity then; a caller that wants a certain one asks
// for it by its SPIFFE ID.
func (s *service) FetchJWTSVID(ctx context.Context, req *workloadpb.JWTSVIDRequest) (*workloadpb.JWTSVIDResponse, error) {
	deadline := patience(ctx)
	c, err := s.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer c.leave()
	r := &jwtRequest{s: s, c: c, deadline: deadline}
	if r.audience, err = canonical(req.Audience); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if req.SpiffeId != "" {
		if r.wanted, err = spiffeid.FromString(req.SpiffeId); err != nil {
			return nil, status.Errorf(codes.InvalidArgument, "spiffe_id: %v", err)
		}
	}
	defer r.close()
	for settled := false; ; {
		svids, err := r.look()
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

// patience is when an answer has to be on its way.
func patience(ctx context.Context) time.Time {
	deadline, ok := ctx.Deadline()
	if !ok {
		return time.Now().Add(mintTimeout)
	}
	return deadline.Add(-min(answerTime, time.Until(deadline)/10))
}

// jwtRequest is one call of FetchJWTSVID.
type jwtRequest struct {
	s        *service
	c        *caller
	audience []string
	wanted   spiffeid.ID // zero: all
	deadline time.Time
	waits    map[*cache.Entry]wait // for what was not held
	// Made when the call has to wait.
	wake  chan struct{} // flights
	watch *cache.Watch  // entries and bundle
}

// wait is a token that the call waits for.
type wait struct {
	f     *flight // nil: the user has too many
	tries int     // of f before the call waited for it
}

// look reads what the caller may be given now and has minted what is missing.
// Everything that it returns is of entries as they are: an entry that was edited
// since the last look is asked for as it is now, and what was minted for it as it
// was is nobody's.
func (r *jwtRequest) look() ([]*workloadpb.JWTSVID, error) {
	held := r.s.cfg.Cache
	v := held.Match(r.c.selectors)
	if err := r.c.admit(&v); err != nil {
		return nil, err
	}
	var hidden []*cache.Entry
	v.Entries, hidden = cache.ByHint(v.Entries)
	r.s.warnHidden(hidden)
	if err := r.exists(&v); err != nil {
		return nil, err
	}
	r.leave(func(e *cache.Entry) bool { return !slices.Contains(v.Entries, e) })
	svids := make([]*workloadpb.JWTSVID, 0, len(v.Entries))
	var missing []*cache.Entry
	for _, e := range v.Entries {
		if !r.wants(e) {
			continue
		}
		jwt, ok := held.JWT(e, r.audience)
		if ok && r.s.stale(jwt, v.Bundle) {
			r.s.refresh(r, e)
		}
		if !ok {
			jwt, ok = r.landed(e, v.Bundle)
		}
		if !ok {
			missing = append(missing, e)
			continue
		}
		svids = append(svids, &workloadpb.JWTSVID{SpiffeId: e.SPIFFEID.String(), Svid: jwt.Token, Hint: e.Hint})
	}
	r.join(missing, len(svids) == 0)
	return svids, nil
}

func (r *jwtRequest) wants(e *cache.Entry) bool { return r.wanted.IsZero() || e.SPIFFEID == r.wanted }

// exists returns an error when no entry gives the caller what it asks for.
func (r *jwtRequest) exists(v *cache.View) error {
	switch {
	case slices.ContainsFunc(v.Entries, r.wants):
		return nil
	case r.c.incomplete():
		return errAttest
	case v.Partial:
		return errStarting
	}
	return status.Error(codes.PermissionDenied, "no registration entry gives this process that SPIFFE ID")
}

// landed returns the token that this call has waited for, in case that the
// cache has no room for it, or that it is for this call alone.
func (r *jwtRequest) landed(e *cache.Entry, b *bundle.Snapshot) (cache.JWT, bool) {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	f := r.waits[e].f
	if f == nil || !f.landed() {
		return cache.JWT{}, false
	}
	_, trusted := b.Own.JWTKey(f.jwt.KeyID)
	return f.jwt, trusted
}

// join has all of these minted. The call waits for each once.
func (r *jwtRequest) join(entries []*cache.Entry, hurry bool) {
	if len(entries) == 0 {
		return
	}
	if r.waits == nil {
		r.waits, r.wake, r.watch = make(map[*cache.Entry]wait), make(chan struct{}, 1), r.s.cfg.Cache.Watch()
	}
	busy := false
	r.s.mu.Lock()
	for _, e := range entries {
		if w, joined := r.waits[e]; joined && (w.f == nil || !w.f.landed()) {
			continue
		}
		w := wait{f: r.s.join(r, e)}
		if w.f != nil {
			w.tries = w.f.tries
			w.f.waiting[r.wake] = struct{}{}
			if hurry {
				notify(w.f.hurry)
			}
		}
		busy = busy || w.f == nil
		r.waits[e] = w
	}
	r.s.mu.Unlock()
	if busy {
		r.s.warnMints(r.c)
	}
}

// leave ends the waits for some entries.
func (r *jwtRequest) leave(which func(*cache.Entry) bool) {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	for e, w := range r.waits {
		if which(e) {
			if w.f != nil {
				delete(w.f.waiting, r.wake)
			}
			delete(r.waits, e)
		}
	}
}

func (r *jwtRequest) close() {
	r.leave(func(*cache.Entry) bool { return true })
	if r.watch != nil {
		r.watch.Close()
	}
}

// pending reports whether there is something to wait for, and until when. some
// says that the caller can be given a token already.
func (r *jwtRequest) pending(some bool) (until time.Time, pending bool) {
	now := time.Now()
	until = r.deadline
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	for _, w := range r.waits {
		some = some || (w.f != nil && w.f.landed())
	}
	if !now.Before(until) || (some && !r.wanted.IsZero()) {
		return until, false
	}
	for _, w := range r.waits {
		if w.f == nil || w.f.landed() {
			continue
		}
		// What was said before this call does not count for a caller that has
		// nothing else.
		if final(w.f.err) && (some || w.f.tries > w.tries) {
			continue
		}
		if some {
			enough := w.f.begun.Add(completeWait)
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

// wait returns when it is time for another look. settled says that nothing is
// left to wait for: the next look is the answer.
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

// failure is why there is no token at all.
func (r *jwtRequest) failure(ctx context.Context) error {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	err := errNotMinted
	if _, limited := ctx.Deadline(); limited {
		err = errTooLate
	}
	for _, w := range r.waits {
		switch {
		case w.f == nil:
			return errBusy
		case w.f.err != nil:
			err = errNotMinted
		}
	}
	return err
}

// canonical sorts the audience and drops repeats. It refuses what no verifier
// would ever ask for.
func canonical(audience []string) ([]string, error) {
	if len(audience) == 0 {
		return nil, errors.New("audience must be given")
	}
	if len(audience) > maxAudiences {
		return nil, fmt.Errorf("no more than %d audiences are possible", maxAudiences)
	}
	out := slices.Clone(audience)
	slices.Sort(out)
	out = slices.Compact(out)
	for _, a := range out {
		switch {
		case a == "":
			return nil, errors.New("audience must not be empty")
		case len(a) > maxAudienceLen:
			return nil, fmt.Errorf("an audience has no more than %d bytes", maxAudienceLen)
		case strings.ContainsRune(a, 0):
			return nil, errors.New("audience must not hold NUL")
		}
	}
	return out, nil
}
