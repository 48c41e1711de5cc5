package workload

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/cache"
)

// Whatever the server does and however the entries change, a caller gets every token
// that is available at the time of the answer. It gets no error if there is one, and
// no identity without an entry. The server is never asked for a token twice at a time,
// or again right after a failure.
//
// RENEWD_SEED replays one history; RENEWD_HISTORIES sets how many there are.
func TestJWTHistories(t *testing.T) {
	t.Parallel()
	histories := 5
	if n, err := strconv.Atoi(os.Getenv("RENEWD_HISTORIES")); err == nil {
		histories = n
	}
	base := rand.Uint64()
	if seed, err := strconv.ParseUint(os.Getenv("RENEWD_SEED"), 10, 64); err == nil {
		base, histories = seed, 1
	}
	var partial, failed, waited int
	for i := range histories {
		seed := base + uint64(i)
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newJWTHistory(t, seed)
				h.run()
				partial, failed, waited = partial+h.partial, failed+h.failed, waited+h.waited
			})
		})
	}
	// Histories without these would check nothing.
	if histories >= 5 && (partial == 0 || failed == 0 || waited == 0) {
		t.Errorf("%d answers without some identity, %d errors, %d answers after a wait; want some of each", partial, failed, waited)
	}
}

const (
	jwtEntries = 4
	jwtTTL     = 20 * time.Second
)

// jwtTry is one request to the server, and its result once ended is set.
type jwtTry struct {
	entry        *cache.Entry
	audience     string
	begun, ended time.Time
	token        string
	final        bool
}

type jwtHistory struct {
	t   *testing.T
	s   *system
	rng *rand.Rand // of run

	mu                      sync.Mutex
	rnd                     *rand.Rand                    // of the server
	serverMode              [jwtEntries]int               // of the server, by entry
	current                 [jwtEntries]*cache.Entry      // nil: deleted
	spans                   map[*cache.Entry][2]time.Time // when each was an entry
	tries                   []*jwtTry
	partial, failed, waited int
}

func newJWTHistory(t *testing.T, seed uint64) *jwtHistory {
	h := &jwtHistory{
		t: t, rng: rand.New(rand.NewPCG(seed, 1)), rnd: rand.New(rand.NewPCG(seed, 2)),
		spans: make(map[*cache.Entry][2]time.Time),
	}
	h.s = newSystem(t, func(c *Config) { c.JWT = h })
	for i := range jwtEntries {
		h.edit(i)
	}
	return h
}

// edit changes entry i: it becomes new, edited, of another user, or deleted.
func (h *jwtHistory) edit(i int) {
	h.mu.Lock()
	id := fmt.Sprintf("e%d", i)
	before := h.current[i]
	var after *cache.Entry
	if before == nil || h.rng.IntN(5) > 0 {
		after = entry(id, fmt.Sprintf("/w%d", h.rng.IntN(6)), 1000+uint32(h.rng.IntN(8)/7))
		after.Revision = int64(len(h.spans) + 1)
		h.spans[after] = [2]time.Time{time.Now()}
	}
	if before != nil {
		h.spans[before] = [2]time.Time{h.spans[before][0], time.Now()}
	}
	h.current[i] = after
	h.mu.Unlock()
	if after == nil {
		h.s.cache.Update(nil, []string{id})
	} else {
		h.s.cache.Update([]*cache.Entry{after}, nil)
	}
}

// MintJWT acts as the server.
func (h *jwtHistory) MintJWT(ctx context.Context, id string, audience []string) (string, error) {
	h.mu.Lock()
	i := int(id[1] - '0')
	try := &jwtTry{entry: h.current[i], audience: strings.Join(audience, " "), begun: time.Now()}
	for _, other := range h.tries {
		if try.entry == nil || other.entry != try.entry || other.audience != try.audience {
			continue
		}
		if other.ended.IsZero() {
			h.t.Errorf("%v: asked twice at a time for %s", time.Now(), id)
		} else if other.token == "" && try.begun.Sub(other.ended) < retryBase/2 {
			h.t.Errorf("%v: asked %v after a failure for %s", time.Now(), try.begun.Sub(other.ended), id)
		}
	}
	h.tries = append(h.tries, try)
	mode, latency := h.serverMode[i], time.Duration(h.rnd.IntN(300))*time.Millisecond
	if mode == 1 {
		latency *= 10
	}
	h.mu.Unlock()
	select {
	case <-time.After(latency):
	case <-ctx.Done():
	}
	if mode == 2 {
		<-ctx.Done()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	try.ended = time.Now()
	switch e := h.current[i]; {
	case ctx.Err() != nil:
		return "", ctx.Err()
	case mode == 3:
		return "", status.Error(codes.Unavailable, "no")
	case mode == 4 || e == nil:
		try.final = true
		return "", status.Error(codes.NotFound, "no such entry")
	case e == try.entry:
		try.token = h.s.ca.token(h.t, e.SPIFFEID.String(), audience, jwtTTL, map[string]any{"jti": fmt.Sprint(len(h.tries), id)})
		return try.token, nil
	default: // as a server that reads the entry last
		return h.s.ca.token(h.t, e.SPIFFEID.String(), audience, jwtTTL, nil), nil
	}
}

func (h *jwtHistory) run() {
	c := h.s.client(1000)
	var calls sync.WaitGroup
	for range 400 {
		time.Sleep(time.Duration(1+h.rng.IntN(200)) * time.Millisecond)
		switch i := h.rng.IntN(jwtEntries); h.rng.IntN(12) {
		case 0:
			h.edit(i)
		case 1:
			h.mu.Lock()
			h.serverMode[i] = max(0, h.rng.IntN(8)-3)
			h.mu.Unlock()
		default:
			timeout := time.Duration(50+h.rng.IntN(1<<h.rng.IntN(15))) * time.Millisecond
			req := &workloadpb.JWTSVIDRequest{Audience: []string{fmt.Sprint("a", h.rng.IntN(2))}}
			if h.rng.IntN(4) == 0 {
				req.SpiffeId = fmt.Sprintf("spiffe://example.org/w%d", h.rng.IntN(6))
			}
			calls.Go(func() {
				ctx, cancel := context.WithTimeout(withHeader(h.t.Context()), timeout)
				defer cancel()
				begun := time.Now()
				res, err := c.FetchJWTSVID(ctx, req)
				h.check(req, begun, timeout, res.GetSvids(), err)
			})
		}
	}
	calls.Wait()
}

// check compares an answer with the tokens that were available.
func (h *jwtHistory) check(req *workloadpb.JWTSVIDRequest, begun time.Time, timeout time.Duration, svids []*workloadpb.JWTSVID, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	inTime := now.Sub(begun) < timeout-min(timeout/10, answerReserve)
	var got []string
	for _, svid := range svids {
		got = append(got, svid.Svid)
		h.checkToken(svid, now)
	}
	missing := 0
	for e, span := range h.spans {
		// Entries that changed at the instant of the answer are ignored.
		gone := !span[1].IsZero()
		if gone || !span[0].Before(now) || e.Selectors[0].Value != "uid:1000" || (req.SpiffeId != "" && req.SpiffeId != e.SPIFFEID.String()) {
			continue
		}
		had, held, final, waited := false, false, false, false
		for _, try := range h.tries {
			if try.entry == nil || try.entry.ID != e.ID || try.entry.SPIFFEID != e.SPIFFEID || try.audience != req.Audience[0] {
				continue
			}
			had = had || slices.Contains(got, try.token) // perhaps of the entry before an edit
			if try.entry != e {
				continue
			}
			valid := try.token != "" && now.Sub(try.begun) < jwtTTL-2*time.Second
			held = held || (valid && try.ended.Before(now))
			final = final || (try.final && now.Sub(try.ended) < 2*retryLimit && (len(svids) > 0 || !try.ended.Before(begun)))
			waited = waited || (len(svids) > 0 && now.Sub(try.begun) >= partialWait && now.Sub(try.begun) < 2*mintTimeout)
		}
		if had {
			continue
		}
		missing++
		switch {
		case held && (req.SpiffeId == "" || len(svids) == 0):
			h.t.Errorf("%v: %v without %s (%s), which is available (%v)", now, req, e.SPIFFEID, e.ID, err)
		case inTime && !final && !waited && (req.SpiffeId == "" || len(svids) == 0):
			h.t.Errorf("%v: %v answered after %v of %v without waiting for %s (%s): %v", now, req, now.Sub(begun), timeout, e.SPIFFEID, e.ID, err)
		}
	}
	switch {
	case err != nil && missing > 0:
		h.failed++
	case err == nil && missing > 0:
		h.partial++
	case err == nil && now.After(begun):
		h.waited++
	}
	if code := status.Code(err); (code == codes.PermissionDenied) != (missing == 0 && err != nil) && !h.changedAt(now) {
		h.t.Errorf("%v: %v: %v with %d tokens missing", now, req, err, missing)
	}
}

// changedAt reports whether an entry changed at this instant.
func (h *jwtHistory) changedAt(now time.Time) bool {
	for _, span := range h.spans {
		if span[0].Equal(now) || span[1].Equal(now) {
			return true
		}
	}
	return false
}

// checkToken checks that the token is valid, for the SPIFFE ID in the answer, and of
// an entry of the caller.
func (h *jwtHistory) checkToken(svid *workloadpb.JWTSVID, now time.Time) {
	token, err := jwt.ParseSigned(svid.Svid, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		h.t.Error(err)
		return
	}
	var claims jwt.Claims
	if err := token.Claims(h.s.ca.jwtKey.Public(), &claims); err != nil {
		h.t.Error(err)
	}
	if claims.Subject != svid.SpiffeId || !now.Before(claims.Expiry.Time()) {
		h.t.Errorf("%v: the token is for %s instead of %s, until %v", now, claims.Subject, svid.SpiffeId, claims.Expiry.Time())
	}
	for e, span := range h.spans {
		if e.SPIFFEID.String() == svid.SpiffeId && e.Selectors[0].Value == "uid:1000" && (span[1].IsZero() || !span[1].Before(now)) {
			return
		}
	}
	h.t.Errorf("%v: no entry gives the caller %s", now, svid.SpiffeId)
}
