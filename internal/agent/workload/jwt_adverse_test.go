package workload

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/cache"
)

// A token that was requested before its entry changed is neither served nor cached
// for the entry as it is now.
func TestJWTOfAnEntryEditedDuringTheMint(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*cache.Cache, *cache.Entry){
		"changed": func(c *cache.Cache, e *cache.Entry) {
			e.Revision++
			c.Update([]*cache.Entry{e}, nil)
		},
		"replaced by another of its ID": func(c *cache.Cache, e *cache.Entry) {
			c.Update([]*cache.Entry{e}, []string{e.ID})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s, m := newJWTSystem(t)
				release := make(chan struct{})
				old := s.mintFor("/one")
				m.set(func(ctx context.Context, id string, audience []string) (string, error) {
					<-release
					return old(ctx, id, audience)
				})
				c := s.client(1000)
				first := make(chan error, 1)
				go func() { _, err := fetchJWT(t.Context(), c, "a"); first <- err }()
				synctest.Wait()
				m.set(s.mintFor("/two"))
				change(s.cache, entry("e1", "/two", 1000))
				subject := func() string {
					t.Helper()
					res, err := c.FetchJWTSVID(withHeader(t.Context()), &workloadpb.JWTSVIDRequest{Audience: []string{"a"}})
					if err != nil {
						t.Fatal(err)
					}
					got, err := c.ValidateJWTSVID(withHeader(t.Context()), &workloadpb.ValidateJWTSVIDRequest{Audience: "a", Svid: res.Svids[0].Svid})
					if err != nil {
						t.Fatal(err)
					}
					if got.SpiffeId != res.Svids[0].SpiffeId {
						t.Errorf("the token is for %s, the answer says %s", got.SpiffeId, res.Svids[0].SpiffeId)
					}
					return got.SpiffeId
				}
				time.AfterFunc(time.Second, func() { close(release) })
				for range 2 {
					if got := subject(); got != "spiffe://example.org/two" {
						t.Errorf("after the change the token is for %s", got)
					}
					time.Sleep(2 * time.Second)
				}
				if err := <-first; err != nil {
					t.Errorf("the call from before the change: %v, want a token of the edited entry", err)
				}
			})
		})
	}
}

// While the server does not list an entry, a cached token is served. That the server
// mints no other is no fault.
func TestJWTOfAMissingEntry(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, m := newJWTSystem(t)
		c := s.client(1000)
		held, err := fetchJWT(t.Context(), c, "a")
		if err != nil {
			t.Fatal(err)
		}
		mints := len(s.obs.mints)
		s.cache.SetMissing(true, "e1")
		m.set(func(context.Context, string, []string) (string, error) { return "", errors.New("entry not found") })
		if got, err := fetchJWT(t.Context(), c, "a"); err != nil || got != held {
			t.Errorf("the cached token: %v, the same %v", err, got == held)
		}
		if _, err := fetchJWT(t.Context(), c, "b"); status.Code(err) != codes.Unavailable {
			t.Errorf("a token that is not cached: %v, want Unavailable", err)
		}
		if warned := s.logs.attrs("JWT-SVID not minted"); len(warned) > 0 || len(s.obs.mints) > mints {
			t.Errorf("warnings %v, %d mints observed", warned, len(s.obs.mints)-mints)
		}
	})
}

// The mints of callers that gave up count for their user until they end.
func TestAbandonedMintsAreLimited(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const limit = 3
		m := &minter{}
		s := newSystem(t, func(c *Config) { c.JWT, c.MaxPerUser = m, limit })
		s.add(entry("e1", "/one", 1000), entry("e2", "/two", 1001))
		m.set(func(ctx context.Context, _ string, _ []string) (string, error) {
			<-ctx.Done()
			return "", ctx.Err()
		})
		c := s.client(1000)
		for i := range limit {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
			if _, err := fetchJWT(ctx, c, fmt.Sprint(i)); status.Code(err) != codes.DeadlineExceeded {
				t.Fatalf("call %d: %v", i, err)
			}
			cancel()
		}
		_, err := fetchJWT(t.Context(), c, "extra")
		if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "too many") {
			t.Errorf("with %d mints left behind: %v, want Unavailable for too many", limit, err)
		}
		if n := m.count(); n != limit {
			t.Errorf("%d mints under way, want %d", n, limit)
		}
		m.set(s.mintFor("/two"))
		if _, err := fetchJWT(t.Context(), s.client(1001), "a"); err != nil {
			t.Errorf("another user: %v", err)
		}
		time.Sleep(mintTimeout + 2*retryBase) // the last attempt and the delay after it
		m.set(s.mintFor("/one"))
		if _, err := fetchJWT(t.Context(), c, "a"); err != nil {
			t.Errorf("after they have ended: %v", err)
		}
	})
}

// An edit takes effect at once, also for a waiting call: while the mint for the old
// identity hangs, it gets the new identity, or PermissionDenied if it has none.
func TestWaitingJWTCallDuringAnEdit(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		edit *cache.Entry
		want []string
		code codes.Code
	}{
		"another SPIFFE ID": {entry("e0", "/w9", 1000), []string{"/w9"}, codes.OK},
		"other selectors":   {entry("e0", "/w0", 1001), nil, codes.PermissionDenied},
	} {
		for _, completes := range []bool{false, true} {
			t.Run(fmt.Sprint(name, ", mint completes ", completes), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					s, m := newJWTSystemOf(t, 1, nil)
					old, release := s.mintFor("/w0"), make(chan struct{})
					m.set(func(ctx context.Context, id string, audience []string) (string, error) {
						select {
						case <-release:
							return old(ctx, id, audience)
						case <-ctx.Done():
							return "", ctx.Err()
						}
					})
					time.AfterFunc(time.Second, func() {
						m.set(s.mintFor("/w9"))
						edit := *tt.edit
						edit.Revision++
						s.cache.Update([]*cache.Entry{&edit}, nil)
						if completes {
							close(release)
						}
					})
					got, took, err := fetchJWTs(t, s.client(1000), 10*time.Second, "")
					if status.Code(err) != tt.code || !slices.Equal(got, tt.want) || took != time.Second {
						t.Errorf("got %v (%v) after %v, want %v (%v) after 1s", got, err, took, tt.want, tt.code)
					}
					if !completes {
						close(release)
					}
				})
			})
		}
	}
}

// A token that waits for a slot while its entry is edited is not requested: the server
// would sign for the edited entry.
func TestJWTOfAnEntryEditedDuringTheWaitForASlot(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, m := newJWTSystem(t)
		release := make(chan struct{})
		m.set(func(context.Context, string, []string) (string, error) {
			<-release
			return "", errors.New("no")
		})
		c := s.client(1000)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var calls sync.WaitGroup
		for i := range maxEntryMints + 3 {
			calls.Go(func() { _, _ = fetchJWT(ctx, c, fmt.Sprint(i)) })
		}
		calls.Wait()
		changed := entry("e1", "/two", 1000)
		changed.Revision++
		s.cache.Update([]*cache.Entry{changed}, nil)
		close(release)
		time.Sleep(time.Minute)
		if n := m.count(); n != maxEntryMints {
			t.Errorf("the server was asked %d times, want %d", n, maxEntryMints)
		}
	})
}

// A slow log delays no other call.
func TestJWTWhileTheLogIsSlow(t *testing.T) {
	t.Parallel()
	m := &minter{}
	logged := make(chan struct{})
	s := newSystem(t, func(c *Config) {
		c.JWT, c.MaxPerUser = m, 1
		c.Log = slog.New(slowLog{c.Log.Handler(), logged})
	})
	s.add(entry("e1", "/one", 1000), entry("e2", "/two", 1001))
	m.set(s.mintFor("/two"))
	other := s.client(1001)
	if _, err := fetchJWT(t.Context(), other, "a"); err != nil {
		t.Fatal(err)
	}
	c := s.client(1000)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	m.set(func(call context.Context, id string, audience []string) (string, error) {
		cancel() // the caller gives up once its mint is on its way
		return hang(call, id, audience)
	})
	_, _ = fetchJWT(ctx, c, "a")
	var refused sync.WaitGroup
	defer refused.Wait()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	refused.Go(func() {
		for ctx.Err() == nil { // until the call before no longer counts
			_, _ = fetchJWT(ctx, c, "one more")
		}
	})
	<-logged
	held, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := fetchJWT(held, other, "a"); err != nil {
		t.Errorf("the cached token: %v", err)
	}
	<-logged
}

// slowLog blocks in each record about mints until logged was received from twice.
type slowLog struct {
	slog.Handler
	logged chan struct{}
}

func (l slowLog) Handle(ctx context.Context, r slog.Record) error {
	r.Attrs(func(a slog.Attr) bool {
		if a.Equal(slog.String("resource", "mints")) {
			l.logged <- struct{}{}
			l.logged <- struct{}{}
		}
		return true
	})
	return l.Handler.Handle(ctx, r)
}

func (l slowLog) WithAttrs([]slog.Attr) slog.Handler { return l }
func (l slowLog) WithGroup(string) slog.Handler      { return l }
