package spireapi_test

import (
	"context"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/server/spireapi"
)

// TestWaitingHoldsNothing: delayed calls have begun nothing in the ledger. When
// their agent is banned, none of them is served.
func TestWaitingHoldsNothing(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		drain, call func(t *testing.T, c *client) error
		after       codes.Code
	}{
		"BatchNewX509SVID": {
			func(t *testing.T, c *client) error { return c.items(t.Context(), t, 500) },
			func(t *testing.T, c *client) error { return c.items(t.Context(), t, 500) },
			codes.PermissionDenied,
		},
		"RenewAgent": {
			func(t *testing.T, c *client) error { return c.items(t.Context(), t, 500) },
			func(t *testing.T, c *client) error { return c.renew(t.Context(), t) },
			codes.PermissionDenied,
		},
		"NewJWTSVID": {
			func(t *testing.T, c *client) error { return times(500, func() error { return c.jwt(t.Context()) }) },
			func(t *testing.T, c *client) error { return c.jwt(t.Context()) },
			codes.PermissionDenied,
		},
		"AttestAgent": {
			func(t *testing.T, c *client) error { return c.knock(t.Context()) },
			func(t *testing.T, c *client) error { return c.knock(t.Context()) },
			codes.OK,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newFakeLedger()
			bubble(t, spireapi.Config{Ledger: b}, func(t *testing.T, s *running) {
				caller, _ := s.join(t)
				s.apply(t, []spireapi.Entry{entry("a")})
				c := s.from(t, "10.0.0.1").dial(t, caller)
				if err := tt.drain(t, c); err != nil {
					t.Fatal(err)
				}
				_, before := b.state()
				done := make(chan error, 1)
				go func() { done <- tt.call(t, c) }()
				synctest.Wait()
				if signing, records := b.state(); len(done) > 0 || signing != 0 || records != before {
					t.Errorf("while it waits: %d answers, %d calls signing, %d records", len(done), signing, records-before)
				}
				if err := s.BanAgent(t.Context(), caller.id); err != nil {
					t.Fatal(err)
				}
				wantCode(t, <-done, tt.after)
				if signing, records := b.state(); signing != 0 || records != before {
					t.Errorf("afterwards: %d calls signing, %d records", signing, records-before)
				}
			})
		})
	}
}

// TestDelayedAttestationKeepsToken: only the call that is served spends the token.
func TestDelayedAttestationKeepsToken(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		c := s.from(t, "10.0.0.1").dial(t, nil)
		token := s.token(t)
		_, csr := newKey(t)
		attest := func(patience time.Duration) (time.Duration, error) {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			begin := time.Now()
			_, err := c.attest(ctx, "join_token", token, csr)
			return time.Since(begin), err
		}
		if err := c.knock(t.Context()); err != nil {
			t.Fatal(err)
		}
		// The delay would take more than half of the time: refused at once.
		d, err := attest(1900 * time.Millisecond)
		wantCode(t, err, codes.ResourceExhausted)
		if d != 0 || !strings.Contains(err.Error(), "10.0.0.1") {
			t.Errorf("after %v: %v", d, err)
		}
		// Canceled while it waits.
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(300*time.Millisecond, cancel)
		_, err = c.attest(ctx, "join_token", token, csr)
		wantCode(t, err, codes.Canceled)
		synctest.Wait()
		// The two do not count.
		if d, err = attest(time.Minute); err != nil || d != 700*time.Millisecond {
			t.Errorf("attested after %v: %v", d, err)
		}
		_, err = attest(time.Minute)
		wantCode(t, err, codes.InvalidArgument)
	})
}

// TestMaxWait floods the slowest limit with callers that would wait for ever.
func TestMaxWait(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		caller, _ := s.join(t) // only agents can make that many calls
		c := s.from(t, "10.0.0.1").dial(t, caller)
		if err := c.knock(t.Context()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(500 * time.Millisecond)
		n := flood(100, func(int) error { return c.knock(t.Context()) })
		// Turns come after 0.5 s, 1.5 s, ... 29.5 s.
		if n[codes.OK] != 30 || n[codes.ResourceExhausted] != 70 {
			t.Errorf("outcomes %v", n)
		}
		if d := took(t, func() error { return c.knock(t.Context()) }); d != time.Second {
			t.Errorf("the next one waits for %v", d)
		}
	})
}

// TestWaitingIsBounded: more calls than may wait. That takes several agents and
// connections.
func TestWaitingIsBounded(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		s.apply(t, []spireapi.Entry{entry("a")})
		at := s.from(t, "10.0.0.1")
		var conns []*client
		for range 4 {
			caller, _ := s.join(t)
			conns = append(conns, at.dial(t, caller))
		}
		if err := conns[0].items(t.Context(), t, 500); err != nil {
			t.Fatal(err)
		}
		if err := times(500, func() error { return conns[0].jwt(t.Context()) }); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			begin := time.Now()
			n := flood(400, func(i int) error { return conns[i%4].jwt(t.Context()) })
			if n[codes.OK] != 256 || n[codes.ResourceExhausted] != 144 {
				t.Errorf("outcomes %v", n)
			}
			if d := time.Since(begin); d != 256*time.Second/500 {
				t.Errorf("256 turns take %v", d)
			}
		}
		// Each limit has its own bound of waiting calls.
		done := make(chan map[codes.Code]int, 1)
		go func() { done <- flood(400, func(i int) error { return conns[i%4].jwt(t.Context()) }) }()
		synctest.Wait()
		if err := conns[0].items(t.Context(), t, 500); err != nil {
			t.Error(err)
		}
		<-done
	})
}

// flood makes n calls at the same time and counts their outcomes.
func flood(n int, call func(i int) error) map[codes.Code]int {
	var wg sync.WaitGroup
	var mu sync.Mutex
	outcomes := make(map[codes.Code]int)
	for i := range n {
		wg.Go(func() {
			code := status.Code(call(i))
			mu.Lock()
			defer mu.Unlock()
			outcomes[code]++
		})
	}
	wg.Wait()
	return outcomes
}
