package workload

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/cenkalti/backoff/v5"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
)

const (
	// mintTimeout bounds one request to the server, and before it the wait for a
	// slot. The request goes on if its caller gives up: others may want the token.
	mintTimeout = 30 * time.Second
	// maxMints is how many requests run at a time, maxEntryMints how many of them
	// for one entry: if the server hangs for that entry, the others go on.
	maxMints      = 32
	maxEntryMints = maxMints / 4
	// The delay between two attempts to mint a token doubles from retryBase to
	// retryLimit, ±50 %.
	retryBase  = 500 * time.Millisecond
	retryLimit = 8 * time.Second
)

var errNoMinter = errors.New("this agent has no JWT-SVID minter")

// mintKey identifies a token that is minted once for all callers: the entry as it
// is, and the sorted audience without duplicates, joined by NUL. A token with a jti
// is for one call only.
type mintKey struct {
	entry    *cache.Entry
	audience string
	request  *jwtRequest // nil: for every call
}

// mintJob mints one token and retries with backoff. Callers share it, so that the
// backoff holds for all of them.
type mintJob struct {
	key       mintKey
	audience  []string
	limits    *entryLimits
	createdAt time.Time
	// urgent, of capacity 1, wakes the job for a caller without any token.
	urgent chan struct{}

	// Guarded by service.mu.
	waiting   map[chan struct{}]struct{} // the wake-up channels of its callers
	requested bool                       // by a caller since the last attempt began
	tries     int                        // completed attempts
	err       error                      // of the last attempt
	jwt       cache.JWT                  // of the successful attempt
}

// entryLimits is shared by the mintJobs of one entry.
type entryLimits struct {
	slots chan struct{} // a slot for each request to the server
	jobs  int           // guarded by service.mu
}

// minted reports whether the token was minted.
func (j *mintJob) minted() bool { return j.tries > 0 && j.err == nil }

// joinLocked returns the mintJob for a token of the entry and starts it if necessary.
// It returns nil if the caller's user has too many, which the caller logs without
// the lock. The job survives its callers, and Serve waits for it. It counts for the
// user until it ends: callers may give up and ask for another token at once.
func (s *service) joinLocked(r *jwtRequest, e *cache.Entry) *mintJob {
	key := mintKey{entry: e, audience: strings.Join(r.audience, "\x00")}
	if e.IncludeJTI {
		key.request = r
	}
	if j := s.jobs[key]; j != nil {
		j.requested = true
		return j
	}
	uid := r.caller.peer.UID()
	if !s.mints.acquire(uid) {
		return nil
	}
	limits := s.entryJobs[e]
	if limits == nil {
		limits = &entryLimits{slots: make(chan struct{}, maxEntryMints)}
		s.entryJobs[e] = limits
	}
	limits.jobs++
	j := &mintJob{
		key: key, audience: r.audience, limits: limits, createdAt: time.Now(),
		urgent: make(chan struct{}, 1), waiting: make(map[chan struct{}]struct{}),
	}
	s.jobs[key] = j
	s.running.Go(func() {
		defer s.mints.release(uid)
		s.runJob(j)
	})
	return j
}

// refresh mints a token in the background.
func (s *service) refresh(r *jwtRequest, e *cache.Entry) {
	s.mu.Lock()
	j := s.joinLocked(r, e)
	s.mu.Unlock()
	if j == nil {
		s.logMintLimit(r.caller)
	}
}

// taintedRemintAge is the age at which a token of a tainted key is minted again. A
// lagging server still signs with the tainted key and must not be asked at each call.
const taintedRemintAge = 10 * time.Second

// refreshDue reports whether a cached token should be minted again in the background.
func (s *service) refreshDue(jwt cache.JWT, b *bundle.Snapshot) bool {
	now := s.cfg.Cache.Now()
	if !jwt.Fresh(now) {
		return true
	}
	key, _ := b.Own.JWTKey(jwt.KeyID)
	return s.cfg.ReplaceTainted && key.Tainted && now.Sub(jwt.AskedAt) >= taintedRemintAge
}

// logHidden logs the entries that are omitted because of their hints.
func (s *service) logHidden(entries []*cache.Entry) {
	for _, e := range entries {
		s.lines.Note(slog.LevelWarn, "entry omitted, an older entry of the caller has the same hint", e.ID,
			"entry_id", e.ID, "spiffe_id", e.SPIFFEID.String(), "hint", e.Hint)
	}
}

// logMintLimit logs that a caller's user is at the limit of mints.
func (s *service) logMintLimit(c *caller) { s.logLimitExceeded(c.peer, "mints", s.mints.limit) }

// runJob tries until the token is minted, or until no caller wants it.
func (s *service) runJob(j *mintJob) {
	delays := &backoff.ExponentialBackOff{
		InitialInterval: retryBase, MaxInterval: retryLimit, Multiplier: 2, RandomizationFactor: 0.5,
	}
	for s.beginTry(j) {
		jwt, err := s.mintAndStore(j)
		s.endTry(j, jwt, err)
		if err == nil {
			return
		}
		ended := time.Now()
		if s.pause(delays.NextBackOff(), j.urgent) {
			// A caller has no token until this succeeds. Retry as after a first
			// failure, however long the job has been failing for others.
			delays.Reset()
			s.pause(time.Until(ended.Add(delays.NextBackOff())), nil)
		}
	}
}

// beginTry reports whether to make another attempt. Otherwise the job is over: no
// caller wants the token, or its entry was edited and its callers wait for another.
func (s *service) beginTry(j *mintJob) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	wanted := j.tries == 0 || j.requested || len(j.waiting) > 0
	if !wanted || s.stopping.Err() != nil || !s.cfg.Cache.Current(j.key.entry) {
		s.removeLocked(j)
		return false
	}
	j.requested = false
	select {
	case <-j.urgent:
	default:
	}
	return true
}

// endTry stores the result of an attempt and wakes the callers.
func (s *service) endTry(j *mintJob, jwt cache.JWT, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	j.tries++
	j.jwt, j.err = jwt, err
	if err == nil {
		s.removeLocked(j)
	}
	for wake := range j.waiting {
		notify(wake)
	}
}

// removeLocked removes a job that is over.
func (s *service) removeLocked(j *mintJob) {
	delete(s.jobs, j.key)
	if j.limits.jobs--; j.limits.jobs == 0 {
		delete(s.entryJobs, j.key.entry)
	}
}

// pause waits and reports whether an urgent wake-up ended the wait.
func (s *service) pause(d time.Duration, urgent <-chan struct{}) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-urgent:
		return true
	case <-timer.C:
	case <-s.stopping.Done():
	}
	return false
}

// mintAndStore makes one attempt to mint a token and put it into the cache.
func (s *service) mintAndStore(j *mintJob) (cache.JWT, error) {
	e := j.key.entry
	jwt, err := s.mintInSlot(j)
	if err == nil {
		err = s.cfg.Cache.PutJWT(e, j.audience, jwt)
	}
	failed := err != nil && !errors.Is(err, cache.ErrChanged) && s.stopping.Err() == nil
	// A server that does not list the entry does not mint for it: no fault.
	if failed && !s.cfg.Cache.Missing(e.ID) {
		s.lines.Note(slog.LevelWarn, "JWT-SVID not minted", e.ID, "entry_id", e.ID, "spiffe_id", e.SPIFFEID.String(), "error", err)
	}
	return jwt, err
}

// mintInSlot waits for a slot and mints a token.
func (s *service) mintInSlot(j *mintJob) (cache.JWT, error) {
	if s.cfg.JWT == nil {
		return cache.JWT{}, errNoMinter
	}
	slot, cancel := context.WithTimeout(s.stopping, mintTimeout)
	defer cancel()
	for _, mints := range []chan struct{}{j.limits.slots, s.mintSlots} {
		select {
		case mints <- struct{}{}:
			defer func() { <-mints }()
		case <-slot.Done():
			return cache.JWT{}, fmt.Errorf("wait for other mints: %w", slot.Err())
		}
	}
	if !s.cfg.Cache.Current(j.key.entry) {
		return cache.JWT{}, cache.ErrChanged
	}
	// The request gets its full time whatever the wait took: with little time left
	// the server would sign a token that nobody receives.
	ctx, cancel := context.WithTimeout(s.stopping, mintTimeout)
	defer cancel()
	start := time.Now()
	jwt, err := s.mintOnce(ctx, j.key.entry, j.audience)
	if err == nil || !s.cfg.Cache.Missing(j.key.entry.ID) {
		s.cfg.Observer.JWTMinted(time.Since(start), err)
	}
	return jwt, err
}

// mintOnce makes one request to the server and checks the token.
func (s *service) mintOnce(ctx context.Context, e *cache.Entry, audience []string) (cache.JWT, error) {
	asked := s.cfg.Cache.Now()
	token, err := s.cfg.JWT.MintJWT(ctx, e.ID, audience)
	if err != nil {
		return cache.JWT{}, fmt.Errorf("mint JWT-SVID: %w", err)
	}
	snapshot := s.cfg.Cache.Bundle()
	if snapshot == nil {
		return cache.JWT{}, errors.New("check JWT-SVID: no trust bundle")
	}
	jwt, err := checkToken(token, snapshot.Own, e, audience, asked)
	if err != nil {
		return cache.JWT{}, fmt.Errorf("check JWT-SVID: %w", err)
	}
	return jwt, nil
}

// isFinal reports whether an error is the server's answer about this token, which a
// retry does not change. PermissionDenied with details is about the agent (SPIRE's
// PermissionDeniedDetails), which attests again and retries.
func isFinal(err error) bool {
	if errors.Is(err, errNoMinter) {
		return true
	}
	s, ok := status.FromError(err)
	if !ok {
		return false
	}
	switch s.Code() {
	case codes.NotFound, codes.InvalidArgument:
		return true
	case codes.PermissionDenied:
		return len(s.Details()) == 0
	}
	return false
}

// notify sends a wake-up unless one is pending.
func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
