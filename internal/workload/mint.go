package workload

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/renewd/renewd/cache"
)

const (
	// mintTimeout bounds one mint. It goes on when its caller gives up, for
	// those who want the same token.
	mintTimeout = 30 * time.Second
	// maxMints is how many mints run at a time.
	maxMints = 32
)

// flightKey is what is minted once for all who ask: the entry as it is, and the
// audience sorted, without repeats, and joined by NUL.
type flightKey struct {
	entry    *cache.Entry
	audience string
}

// flight is a mint under way. jwt and err may be read once done is closed.
type flight struct {
	done chan struct{}
	jwt  cache.JWT
	err  error
}

// mint returns the flight that mints this token, started if need be. It goes
// on whatever becomes of the caller, for Serve to wait for. It counts as its
// user's until it ends: callers may give up and ask for another at once.
func (s *service) mint(c *caller, e *cache.Entry, audience []string) (*flight, error) {
	key := flightKey{e, strings.Join(audience, "\x00")}
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.flights[key]; f != nil {
		return f, nil
	}
	uid := c.peer.UID()
	if !s.flying.acquire(uid) {
		s.warnBusy(c.peer, "mints", s.flying.limit)
		return nil, errBusy
	}
	f := &flight{done: make(chan struct{})}
	s.flights[key] = f
	s.minting.Go(func() {
		defer s.flying.release(uid)
		f.jwt, f.err = s.mintNow(e, audience)
		s.mu.Lock()
		delete(s.flights, key)
		s.mu.Unlock()
		close(f.done)
	})
	return f, nil
}

func (s *service) mintNow(e *cache.Entry, audience []string) (cache.JWT, error) {
	ctx, cancel := context.WithTimeout(s.stopping, mintTimeout)
	defer cancel()
	select {
	case s.mints <- struct{}{}:
		defer func() { <-s.mints }()
	case <-ctx.Done():
		return cache.JWT{}, ctx.Err()
	}
	start := time.Now()
	jwt, err := s.askServer(ctx, e, audience)
	// That the server does not mint for an entry that it does not name at present
	// is no fault.
	missing := err != nil && s.cfg.Cache.Missing(e.ID)
	if !missing {
		s.obs.JWTMinted(time.Since(start), err)
	}
	if err != nil {
		if s.stopping.Err() == nil && !missing && s.said.first(about{kind: "mint " + e.ID}) {
			s.log.Warn("a JWT-SVID could not be minted", slog.String("entry", e.ID),
				slog.String("spiffe_id", e.SPIFFEID.String()), slog.Any("error", err))
		}
		return cache.JWT{}, err
	}
	if err := s.cfg.Cache.PutJWT(e, audience, jwt); err != nil {
		return cache.JWT{}, err
	}
	return jwt, nil
}

// askServer has a token minted and checks that it is what was asked for.
func (s *service) askServer(ctx context.Context, e *cache.Entry, audience []string) (cache.JWT, error) {
	if s.cfg.JWT == nil {
		return cache.JWT{}, errors.New("this agent cannot have JWT-SVIDs minted")
	}
	token, err := s.cfg.JWT.MintJWT(ctx, e.ID, audience)
	if err != nil {
		return cache.JWT{}, fmt.Errorf("mint a JWT-SVID: %w", err)
	}
	now := s.cfg.Cache.Now()
	snapshot := s.cfg.Cache.Bundle()
	if snapshot == nil {
		return cache.JWT{}, errors.New("check the JWT-SVID: no trust bundle")
	}
	svid, err := jwtsvid.ParseAndValidate(token, keySource{snapshot.Own}, audience)
	switch {
	case err != nil:
		return cache.JWT{}, fmt.Errorf("check the JWT-SVID: %w", err)
	case svid.ID != e.SPIFFEID:
		return cache.JWT{}, fmt.Errorf("check the JWT-SVID: it is for %s instead of %s", svid.ID, e.SPIFFEID)
	case !svid.Expiry.After(now):
		return cache.JWT{}, errors.New("check the JWT-SVID: it has expired")
	}
	for _, a := range audience {
		if !slices.Contains(svid.Audience, a) {
			return cache.JWT{}, fmt.Errorf("check the JWT-SVID: it is not for audience %q", a)
		}
	}
	jwt := cache.JWT{Token: token, KeyID: keyID(token), IssuedAt: now, ExpiresAt: svid.Expiry}
	if iat, ok := svid.Claims["iat"].(float64); ok && iat > 0 {
		// A server whose clock is ahead must not make a token look younger.
		if issued := time.Unix(int64(iat), 0); issued.Before(now) {
			jwt.IssuedAt = issued
		}
	}
	return jwt, nil
}

// keyID returns the key ID in the header of a token that was checked.
func keyID(token string) string {
	header, _, _ := strings.Cut(token, ".")
	text, err := base64.RawURLEncoding.DecodeString(header)
	if err != nil {
		return ""
	}
	var h struct {
		KeyID string `json:"kid"`
	}
	if json.Unmarshal(text, &h) != nil {
		return ""
	}
	return h.KeyID
}
