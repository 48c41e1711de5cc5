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
	// mintTimeout bounds one call of the server, and before it the wait for
	// a slot. The call goes on when its caller gives up, for those who want the
	// same token.
	mintTimeout = 30 * time.Second
	// maxMints is how many mints run at a time, maxEntryMints how many of them
	// for one entry: when the server hangs for that, the others go on.
	maxMints      = 32
	maxEntryMints = maxMints / 4
	// The pauses between tries to mint a token double from retryBase to
	// retryLimit, ±50 %.
	retryBase  = 500 * time.Millisecond
	retryLimit = 8 * time.Second
)

var errNoMinter = errors.New("this agent cannot have JWT-SVIDs minted")

// flightKey is what is minted once for all who ask: the entry as it is, and the
// audience sorted, without repeats, and joined by NUL. A token with a jti is for
// the one call that asks for it.
type flightKey struct {
	entry    *cache.Entry
	audience string
	call     *jwtRequest // nil: whoever asks
}

// flight is a token being minted, with the pauses between failed tries: while
// it pauses it is what keeps callers from asking the server again at each call.
type flight struct {
	key      flightKey
	audience []string
	lane     *lane
	begun    time.Time
	// hurry has room for one: a caller came that has no token at all.
	hurry chan struct{}

	// Guarded by service.mu.
	waiting map[chan struct{}]struct{} // wakes each caller that waits for it
	asked   bool                       // for by anybody since the last try began
	tries   int                        // that have ended
	err     error                      // of the last try
	jwt     cache.JWT                  // once a try has succeeded
}

// lane is what the flights of one entry share.
type lane struct {
	mints   chan struct{} // a slot for each running mint
	flights int           // guarded by service.mu
}

// landed reports whether the token is there.
func (f *flight) landed() bool { return f.tries > 0 && f.err == nil }

// join returns the flight for a token of the entry, started if need be, or nil when
// the caller's user has too many, which is logged once the lock is free. It goes on
// whatever becomes of the caller, for Serve to wait for. It counts as the user's
// until it ends: callers may give up and ask for another at once. service.mu is
// held.
func (s *service) join(r *jwtRequest, e *cache.Entry) *flight {
	key := flightKey{entry: e, audience: strings.Join(r.audience, "\x00")}
	if e.IncludeJTI {
		key.call = r
	}
	if f := s.flights[key]; f != nil {
		f.asked = true
		return f
	}
	uid := r.c.peer.UID()
	if !s.flying.acquire(uid) {
		return nil
	}
	l := s.lanes[e]
	if l == nil {
		l = &lane{mints: make(chan struct{}, maxEntryMints)}
		s.lanes[e] = l
	}
	l.flights++
	f := &flight{
		key: key, audience: r.audience, lane: l, begun: time.Now(),
		hurry: make(chan struct{}, 1), waiting: make(map[chan struct{}]struct{}),
	}
	s.flights[key] = f
	s.minting.Go(func() {
		defer s.flying.release(uid)
		s.fly(f)
	})
	return f
}

// refresh has a token minted that the call does not wait for.
func (s *service) refresh(r *jwtRequest, e *cache.Entry) {
	s.mu.Lock()
	f := s.join(r, e)
	s.mu.Unlock()
	if f == nil {
		s.warnMints(r.c)
	}
}

// taintedAgain is how old a token by a tainted key is when it is minted again. A
// server that lags signs with the key that others have tainted: its tokens are not
// asked for at each call.
const taintedAgain = 10 * time.Second

// stale reports whether a token that is held is to be minted again behind the
// answer.
func (s *service) stale(jwt cache.JWT, b *bundle.Snapshot) bool {
	now := s.cfg.Cache.Now()
	if !jwt.Fresh(now) {
		return true
	}
	key, _ := b.Own.JWTKey(jwt.KeyID)
	return s.cfg.ReplaceTainted && key.Tainted && now.Sub(jwt.AskedAt) >= taintedAgain
}

// warnHidden says which entries callers are not given because of their hints.
func (s *service) warnHidden(entries []*cache.Entry) {
	for _, e := range entries {
		if s.said.first(about{kind: "hint " + e.ID}) {
			s.log.Warn("entry not handed out, an older one of the caller has its hint", slog.String("entry_id", e.ID),
				slog.String("spiffe_id", e.SPIFFEID.String()), slog.String("hint", e.Hint))
		}
	}
}

// warnMints says that a caller's user has too many mints.
func (s *service) warnMints(c *caller) { s.warnBusy(c.peer, "mints", s.flying.limit) }

// fly tries until the token is there, or until nobody has asked for it since
// the last try began.
func (s *service) fly(f *flight) {
	pauses := &backoff.ExponentialBackOff{
		InitialInterval: retryBase, MaxInterval: retryLimit, Multiplier: 2, RandomizationFactor: 0.5,
	}
	for s.begin(f) {
		jwt, err := s.mint(f)
		s.end(f, jwt, err)
		if err == nil {
			return
		}
		ended := time.Now()
		if s.pause(pauses.NextBackOff(), f.hurry) {
			// Somebody has nothing until this works: as soon as after a first
			// failure, however long it has been failing for others.
			pauses.Reset()
			s.pause(time.Until(ended.Add(pauses.NextBackOff())), nil)
		}
	}
}

// begin reports whether there is to be another try. If not, the flight is over:
// nobody wants the token, or its entry was edited and its callers are waiting for
// another one.
func (s *service) begin(f *flight) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	wanted := f.tries == 0 || f.asked || len(f.waiting) > 0
	if !wanted || s.stopping.Err() != nil || !s.cfg.Cache.Current(f.key.entry) {
		s.forget(f)
		return false
	}
	f.asked = false
	select {
	case <-f.hurry:
	default:
	}
	return true
}

// end tells what came of a try.
func (s *service) end(f *flight, jwt cache.JWT, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f.tries++
	f.jwt, f.err = jwt, err
	if err == nil {
		s.forget(f)
	}
	for wake := range f.waiting {
		notify(wake)
	}
}

// forget takes a flight that is over out of everything. service.mu is held.
func (s *service) forget(f *flight) {
	delete(s.flights, f.key)
	if f.lane.flights--; f.lane.flights == 0 {
		delete(s.lanes, f.key.entry)
	}
}

// pause waits and reports whether it was cut short by hurry.
func (s *service) pause(d time.Duration, hurry <-chan struct{}) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-hurry:
		return true
	case <-timer.C:
	case <-s.stopping.Done():
	}
	return false
}

// mint makes one try to have a token minted and held.
func (s *service) mint(f *flight) (cache.JWT, error) {
	e := f.key.entry
	jwt, err := s.askServer(f)
	if err == nil {
		err = s.cfg.Cache.PutJWT(e, f.audience, jwt)
	}
	failed := err != nil && !errors.Is(err, cache.ErrChanged) && s.stopping.Err() == nil
	// That the server does not mint for an entry that it does not name at present
	// is no fault.
	if failed && !s.cfg.Cache.Missing(e.ID) && s.said.first(about{kind: "mint " + e.ID}) {
		s.log.Warn("a JWT-SVID could not be minted", slog.String("entry_id", e.ID),
			slog.String("spiffe_id", e.SPIFFEID.String()), slog.Any("error", err))
	}
	return jwt, err
}

// askServer has a token minted when there is a slot for it.
func (s *service) askServer(f *flight) (cache.JWT, error) {
	if s.cfg.JWT == nil {
		return cache.JWT{}, errNoMinter
	}
	slot, cancel := context.WithTimeout(s.stopping, mintTimeout)
	defer cancel()
	for _, mints := range []chan struct{}{f.lane.mints, s.mints} {
		select {
		case mints <- struct{}{}:
			defer func() { <-mints }()
		case <-slot.Done():
			return cache.JWT{}, fmt.Errorf("wait for another mint to end: %w", slot.Err())
		}
	}
	if !s.cfg.Cache.Current(f.key.entry) {
		return cache.JWT{}, cache.ErrChanged
	}
	// The wait does not count: a server that is asked with little time left
	// signs in vain.
	ctx, cancel := context.WithTimeout(s.stopping, mintTimeout)
	defer cancel()
	start := time.Now()
	jwt, err := s.fetchToken(ctx, f.key.entry, f.audience)
	if err == nil || !s.cfg.Cache.Missing(f.key.entry.ID) {
		s.obs.JWTMinted(time.Since(start), err)
	}
	return jwt, err
}

// fetchToken makes the call and checks that the token is what was asked for.
func (s *service) fetchToken(ctx context.Context, e *cache.Entry, audience []string) (cache.JWT, error) {
	asked := s.cfg.Cache.Now()
	token, err := s.cfg.JWT.MintJWT(ctx, e.ID, audience)
	if err != nil {
		return cache.JWT{}, fmt.Errorf("mint a JWT-SVID: %w", err)
	}
	snapshot := s.cfg.Cache.Bundle()
	if snapshot == nil {
		return cache.JWT{}, errors.New("check the JWT-SVID: no trust bundle")
	}
	jwt, err := checkToken(token, snapshot.Own, e, audience, asked)
	if err != nil {
		return cache.JWT{}, fmt.Errorf("check the JWT-SVID: %w", err)
	}
	return jwt, nil
}

// final reports whether an error is the server's answer about this token, which
// trying again at once does not change. PermissionDenied with details is about
// the agent (SPIRE's PermissionDeniedDetails): it attests again and goes on.
func final(err error) bool {
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

// notify wakes by level: a wake-up already waiting is enough.
func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
