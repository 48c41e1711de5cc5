package workload

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// mintFunc answers a request for a token as the server.
type mintFunc = func(ctx context.Context, entryID string, audience []string) (string, error)

func hang(ctx context.Context, _ string, _ []string) (string, error) {
	<-ctx.Done()
	return "", ctx.Err()
}

func failWith(code codes.Code) mintFunc {
	return func(context.Context, string, []string) (string, error) {
		return "", fmt.Errorf("mint JWT-SVID: %w", status.Error(code, "no"))
	}
}

// newJWTSystemOf has n entries (e0, /w0 and so on) for user 1000. The server
// mints for each unless except says otherwise.
func newJWTSystemOf(t *testing.T, n int, except map[string]mintFunc) (*system, *minter) {
	t.Helper()
	m := &minter{}
	s := newSystem(t, func(c *Config) { c.JWT = m })
	for i := range n {
		s.add(entry(fmt.Sprintf("e%d", i), fmt.Sprintf("/w%d", i), 1000))
	}
	m.set(s.mintAll(except))
	return s, m
}

func (s *system) mintAll(except map[string]mintFunc) mintFunc {
	return func(ctx context.Context, id string, audience []string) (string, error) {
		if mint := except[id]; mint != nil {
			return mint(ctx, id, audience)
		}
		return s.mintFor("/w"+id[1:])(ctx, id, audience)
	}
}

// fetchJWTs returns the paths of the identities in the answer, and how long it took.
// A zero timeout is no deadline.
func fetchJWTs(t *testing.T, c workloadpb.SpiffeWorkloadAPIClient, timeout time.Duration, id string) (paths []string, took time.Duration, err error) {
	t.Helper()
	ctx := withHeader(t.Context())
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	if id != "" {
		id = "spiffe://example.org" + id
	}
	start := time.Now()
	res, err := c.FetchJWTSVID(ctx, &workloadpb.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: id})
	for _, svid := range res.GetSvids() {
		paths = append(paths, svid.SpiffeId[len("spiffe://example.org"):])
	}
	return paths, time.Since(start), err
}

func TestAvailableJWTsAreReturned(t *testing.T) {
	t.Parallel()
	for name, missing := range map[string]string{"the default": "e0", "one in the middle": "e1", "the last": "e2"} {
		for _, code := range []codes.Code{codes.NotFound, codes.InvalidArgument, codes.PermissionDenied} {
			t.Run(fmt.Sprint(name, " ", code), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					s, m := newJWTSystemOf(t, 3, map[string]mintFunc{missing: failWith(code)})
					c := s.client(1000)
					want := slices.DeleteFunc([]string{"/w0", "/w1", "/w2"}, func(p string) bool { return p[2] == missing[1] })
					for range 2 {
						got, took, err := fetchJWTs(t, c, 10*time.Second, "")
						if err != nil || !slices.Equal(got, want) || took > 0 {
							t.Errorf("got %v (%v) after %v, want %v at once", got, err, took, want)
						}
					}
					if got, took, err := fetchJWTs(t, c, 10*time.Second, want[1]); err != nil || !slices.Equal(got, want[1:]) || took > 0 {
						t.Errorf("one asked for: %v (%v) after %v", got, err, took)
					}
					time.Sleep(time.Minute)
					before := m.count()
					if _, took, err := fetchJWTs(t, c, 10*time.Second, "/w"+missing[1:]); status.Code(err) != codes.Unavailable || took > 0 || m.count() != before+1 {
						t.Errorf("the missing one asked for: %v after %v and %d tries", err, took, m.count()-before)
					}
				})
			})
		}
	}
}

// Two entries may give the same SPIFFE ID. A token of either is an answer.
func TestJWTOfAnIDThatTwoEntriesGive(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, _ := newJWTSystemOf(t, 2, map[string]mintFunc{"e0": failWith(codes.NotFound)})
		s.add(entry("e0", "/w1", 1000))
		if got, took, err := fetchJWTs(t, s.client(1000), 10*time.Second, "/w1"); err != nil || len(got) != 1 || took > 0 {
			t.Errorf("got %v (%v) after %v", got, err, took)
		}
	})
}

func TestNoJWTAvailable(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		mint     mintFunc
		timeout  time.Duration
		want     codes.Code
		min, max time.Duration
		tries    int
	}{
		"unknown to the server":       {failWith(codes.NotFound), 10 * time.Second, codes.Unavailable, 0, 0, 2},
		"failing":                     {failWith(codes.Internal), 10 * time.Second, codes.Unavailable, 9 * time.Second, 10 * time.Second, 14},
		"failing, a short deadline":   {failWith(codes.Unavailable), time.Second, codes.Unavailable, 900 * time.Millisecond, time.Second, 6},
		"failing, no deadline":        {failWith(codes.Unavailable), 0, codes.Unavailable, mintTimeout, mintTimeout, 20},
		"hanging":                     {hang, 10 * time.Second, codes.DeadlineExceeded, 9 * time.Second, 10 * time.Second, 2},
		"hanging, no deadline":        {hang, 0, codes.Unavailable, mintTimeout, mintTimeout, 2},
		"the agent must attest again": {deniedAgent, 3 * time.Second, codes.Unavailable, 2 * time.Second, 3 * time.Second, 10},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s, m := newJWTSystemOf(t, 2, map[string]mintFunc{"e0": tt.mint, "e1": tt.mint})
				_, took, err := fetchJWTs(t, s.client(1000), tt.timeout, "")
				if status.Code(err) != tt.want || took < tt.min || took > tt.max {
					t.Errorf("got %v after %v, want %v after %v to %v", err, took, tt.want, tt.min, tt.max)
				}
				if n := m.count(); n > tt.tries {
					t.Errorf("%d tries, want no more than %d", n, tt.tries)
				}
			})
		})
	}
}

// The server may recover within the caller's deadline.
func TestJWTIsRetriedWithinTheDeadline(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		broken, timeout time.Duration
	}{
		"a moment":    {time.Millisecond, 2 * time.Second},
		"two seconds": {2 * time.Second, 10 * time.Second},
		"no deadline": {10 * time.Second, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s, m := newJWTSystemOf(t, 1, map[string]mintFunc{"e0": failWith(codes.Unavailable)})
				time.AfterFunc(tt.broken, func() { m.set(s.mintAll(nil)) })
				c := s.client(1000)
				var wg sync.WaitGroup
				for range 10 {
					wg.Go(func() {
						if got, took, err := fetchJWTs(t, c, tt.timeout, ""); err != nil || len(got) != 1 {
							t.Errorf("got %v (%v) after %v", got, err, took)
						}
					})
				}
				wg.Wait()
				if n := m.count(); n > 8 {
					t.Errorf("%d tries for ten callers", n)
				}
			})
		})
	}
}

// However long the server has been failing for others, a caller without any token
// gets one soon after it has recovered.
func TestJWTForAnotherCallerAfterALongOutage(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, m := newJWTSystemOf(t, 1, map[string]mintFunc{"e0": failWith(codes.Unavailable)})
		c := s.client(1000)
		var wg sync.WaitGroup
		wg.Go(func() {
			_, _, err := fetchJWTs(t, c, 10*time.Minute, "")
			if err != nil {
				t.Error(err)
			}
		})
		time.Sleep(2 * time.Minute)
		if n := m.count(); n > 40 {
			t.Errorf("%d tries in two minutes", n)
		}
		for before, i := m.count(), 0; m.count() == before && i < 60; i++ { // into one of the long delays
			time.Sleep(time.Second)
		}
		m.set(s.mintAll(nil))
		if _, took, err := fetchJWTs(t, c, 2*time.Second, ""); err != nil {
			t.Errorf("the new caller: %v after %v", err, took)
		}
		wg.Wait()
	})
}

// One hanging entry delays the others by at most partialWait, and only once.
func TestHangingEntryDoesNotDelayOthers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, m := newJWTSystemOf(t, 3, map[string]mintFunc{"e1": hang})
		c := s.client(1000)
		want := []string{"/w0", "/w2"}
		for name, tt := range map[string]struct{ timeout, max time.Duration }{
			"short":       {time.Second, time.Second},
			"no deadline": {0, partialWait},
		} {
			time.Sleep(time.Hour)
			if got, took, err := fetchJWTs(t, c, tt.timeout, ""); err != nil || !slices.Equal(got, want) || took > tt.max {
				t.Errorf("%s: got %v (%v) after %v, want %v", name, got, err, took, want)
			}
			time.Sleep(partialWait)
			if got, took, err := fetchJWTs(t, c, tt.timeout, ""); err != nil || !slices.Equal(got, want) || took > 0 {
				t.Errorf("%s, next: got %v (%v) after %v, want %v at once", name, got, err, took, want)
			}
		}
		m.set(s.mintAll(nil))
		time.Sleep(time.Minute)
		if got, took, err := fetchJWTs(t, c, time.Second, ""); err != nil || len(got) != 3 || took > 0 {
			t.Errorf("after it has recovered: got %v (%v) after %v", got, err, took)
		}
	})
}

// However many tokens of a hanging entry are requested, those of another entry are
// minted meanwhile.
func TestJWTBesideAnEntryThatHangsForManyAudiences(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, _ := newJWTSystemOf(t, 1, map[string]mintFunc{"e0": hang})
		s.add(entry("e1", "/w1", 1001))
		c, other := s.client(1000), s.client(1001)
		var wg sync.WaitGroup
		for i := range 2 * maxMints {
			wg.Go(func() { _, _ = fetchJWT(t.Context(), c, fmt.Sprint(i)) })
		}
		synctest.Wait()
		if got, took, err := fetchJWTs(t, other, time.Second, ""); err != nil || len(got) != 1 || took > 0 {
			t.Errorf("got %v (%v) after %v", got, err, took)
		}
		wg.Wait()
	})
}

// A cached token never waits for the server, which is not asked at each call.
func TestCachedJWTIsServedAtOnce(t *testing.T) {
	t.Parallel()
	for name, mint := range map[string]mintFunc{"failing": failWith(codes.Internal), "hanging": hang, "unknown": failWith(codes.NotFound)} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s, m := newJWTSystem(t)
				c := s.client(1000)
				held, err := fetchJWT(t.Context(), c, "a")
				if err != nil {
					t.Fatal(err)
				}
				time.Sleep(40 * time.Minute) // past half of its life
				m.set(mint)
				before := m.count()
				for range 1000 {
					start := time.Now()
					ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
					got, err := fetchJWT(ctx, c, "a")
					cancel()
					if err != nil || got != held || time.Since(start) > 0 {
						t.Fatalf("same token %v (%v) after %v", got == held, err, time.Since(start))
					}
					time.Sleep(50 * time.Millisecond)
				}
				if n := m.count() - before; n == 0 || n > 20 {
					t.Errorf("the server was asked %d times in 50 s", n)
				}
				time.Sleep(2 * mintTimeout)
				before = m.count()
				time.Sleep(5 * time.Minute)
				if n := m.count() - before; n > 0 {
					t.Errorf("the server was asked %d times although no caller wants a token", n)
				}
				m.set(s.mintFor("/one"))
				if got, err := fetchJWT(t.Context(), c, "a"); err != nil || got != held {
					t.Errorf("recovered: same token %v (%v)", got == held, err)
				}
				synctest.Wait()
				if got, err := fetchJWT(t.Context(), c, "a"); err != nil || got == held {
					t.Errorf("recovered, next: same token %v (%v)", got == held, err)
				}
			})
		})
	}
}

// A user at the limit of mints still gets cached tokens.
func TestCachedJWTIsServedBeyondTheQuota(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := &minter{}
		s := newSystem(t, func(c *Config) { c.JWT, c.MaxPerUser = m, 1 })
		s.add(entry("e1", "/one", 1000))
		m.set(s.mintFor("/one"))
		c := s.client(1000)
		held, err := fetchJWT(t.Context(), c, "a")
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(40 * time.Minute)
		m.set(hang)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := fetchJWT(ctx, c, "b"); status.Code(err) != codes.DeadlineExceeded {
			t.Fatalf("another audience: %v", err)
		}
		if got, err := fetchJWT(t.Context(), c, "a"); err != nil || got != held {
			t.Errorf("same token %v (%v)", got == held, err)
		}
	})
}

// Shutdown waits for mints in the background.
func TestShutdownEndsRefreshes(t *testing.T) {
	t.Parallel()
	for name, mint := range map[string]mintFunc{"hanging": hang, "failing": failWith(codes.Internal)} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s, m := newJWTSystem(t)
				c := s.client(1000)
				if _, err := fetchJWT(t.Context(), c, "a"); err != nil {
					t.Fatal(err)
				}
				time.Sleep(40 * time.Minute)
				m.set(mint)
				if _, err := fetchJWT(t.Context(), c, "a"); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				start := time.Now()
				s.stop()
				if took := time.Since(start); took > 2*stopGrace {
					t.Errorf("Serve ended after %v", took)
				}
				before := m.count()
				time.Sleep(time.Minute)
				if m.count() > before {
					t.Error("the server was asked after Serve had ended")
				}
			})
		})
	}
}

// deniedAgent answers as a server that rejects the agent, not the entry.
func deniedAgent(context.Context, string, []string) (string, error) {
	st, err := status.New(codes.PermissionDenied, "agent is not attested").WithDetails(
		&types.PermissionDeniedDetails{Reason: types.PermissionDeniedDetails_AGENT_NOT_ATTESTED})
	if err != nil {
		return "", err
	}
	return "", st.Err()
}
