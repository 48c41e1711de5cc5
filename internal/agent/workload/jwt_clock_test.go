package workload

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A new token is served whatever this node's clock says, cached for its lifetime,
// minted again after half of it, and never served after it has expired.
func TestJWTWhileTheClockIsWrong(t *testing.T) {
	t.Parallel()
	const ttl = 5 * time.Minute
	for name, ahead := range map[string]time.Duration{ // the server's clock
		"right":         0,
		"lags 50 s":     50 * time.Second,
		"lags 75 s":     75 * time.Second,
		"lags a day":    24 * time.Hour,
		"ahead 4 min":   -4 * time.Minute,
		"ahead 5 min":   -ttl,
		"ahead 5.5 min": -ttl - 30*time.Second,
		"ahead a day":   -24 * time.Hour,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s, m := newJWTSystem(t)
				mint := func(_ context.Context, _ string, audience []string) (string, error) {
					now := time.Now().Add(ahead)
					return s.ca.token(t, "spiffe://example.org/one", audience, ttl, map[string]any{
						"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(ttl).Unix(), "jti": now.String(),
					}), nil
				}
				m.set(mint)
				time.Sleep(300 * time.Millisecond) // iat has full seconds
				c := s.client(1000)
				first, err := fetchJWT(t.Context(), c, "a")
				if err != nil {
					t.Fatal(err)
				}
				begun := time.Now()
				for time.Since(begun) < ttl/2-5*time.Second {
					if got, err := fetchJWT(t.Context(), c, "a"); err != nil || got != first {
						t.Fatalf("after %v: same token %v (%v)", time.Since(begun), got == first, err)
					}
					time.Sleep(time.Second)
				}
				if n := m.count(); n != 1 {
					t.Errorf("%d mints before half of its life, want 1", n)
				}
				if at := s.cache.JWTExpiry()["jwt-a"]; at.Before(begun.Add(ahead+ttl-time.Second)) || at.Before(begun.Add(ttl-2*time.Second)) {
					t.Errorf("the last token of the key ends at %v, it is %v now and %v at the server", at, begun, begun.Add(ahead))
				}
				m.set(failWith(codes.Unavailable))
				for time.Since(begun) < ttl-2*time.Second {
					if got, err := fetchJWT(t.Context(), c, "a"); err != nil || got != first {
						t.Fatalf("after %v, server down: same token %v (%v)", time.Since(begun), got == first, err)
					}
					time.Sleep(time.Second)
				}
				time.Sleep(time.Until(begun.Add(ttl - 300*time.Millisecond)))
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				if _, err := fetchJWT(ctx, c, "a"); status.Code(err) != codes.Unavailable {
					t.Errorf("at its end: got %v, want Unavailable", err)
				}
				m.set(mint)
				time.Sleep(time.Minute)
				if _, err := fetchJWT(t.Context(), c, "a"); err != nil {
					t.Errorf("the next one: %v", err)
				}
			})
		})
	}
}
