package workload

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/attest"
)

func TestHeaderIsRequired(t *testing.T) {
	t.Parallel()
	for name, md := range map[string]metadata.MD{
		"none":  {},
		"false": metadata.Pairs("workload.spiffe.io", "false"),
		"upper": metadata.Pairs("workload.spiffe.io", "True"),
		"twice": metadata.Pairs("workload.spiffe.io", "true", "workload.spiffe.io", "true"),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				// The server checks the header first: neither starting nor denied.
				s := newSystem(t, nil)
				c := s.client(1000)
				ctx := metadata.NewOutgoingContext(t.Context(), md)
				ended(t, receive(c.FetchX509SVID(ctx, &workloadpb.X509SVIDRequest{})), codes.InvalidArgument)
				ended(t, receive(c.FetchX509Bundles(ctx, &workloadpb.X509BundlesRequest{})), codes.InvalidArgument)
				ended(t, receive(c.FetchJWTBundles(ctx, &workloadpb.JWTBundlesRequest{})), codes.InvalidArgument)
				_, err := c.FetchJWTSVID(ctx, &workloadpb.JWTSVIDRequest{Audience: []string{"a"}})
				if status.Code(err) != codes.InvalidArgument {
					t.Errorf("FetchJWTSVID: %v", err)
				}
				_, err = c.ValidateJWTSVID(ctx, &workloadpb.ValidateJWTSVIDRequest{Audience: "a", Svid: "x"})
				if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "security header missing") {
					t.Errorf("ValidateJWTSVID: %v", err)
				}
			})
		})
	}
}

func TestStartingIsUnavailable(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSystem(t, nil) // a bundle, but no entries yet
		c := s.client(1000)
		ctx := withHeader(t.Context())
		early := fetchX509(t.Context(), c)
		time.Sleep(time.Second)
		ended(t, early, codes.Unavailable)
		ended(t, receive(c.FetchX509Bundles(ctx, &workloadpb.X509BundlesRequest{})), codes.Unavailable)
		ended(t, receive(c.FetchJWTBundles(ctx, &workloadpb.JWTBundlesRequest{})), codes.Unavailable)
		_, err := c.FetchJWTSVID(ctx, &workloadpb.JWTSVIDRequest{Audience: []string{"a"}})
		if status.Code(err) != codes.Unavailable {
			t.Errorf("FetchJWTSVID: %v", err)
		}
		s.cache.Update(nil, nil)
		ended(t, fetchX509(t.Context(), c), codes.PermissionDenied)
	})
}

// If an authority is removed from the bundle before its SVIDs were replaced, SVIDs and
// bundle change in one answer, unless the replacement takes too long.
func TestRemovalWaitsForTheReplacement(t *testing.T) {
	t.Parallel()
	for _, late := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			s := newSystem(t, nil)
			e := entry("1", "/a", 1000)
			s.add(e)
			r := fetchX509(t.Context(), s.client(1000))
			if len(settled(r)) != 1 {
				t.Fatal("no first answer")
			}
			time.Sleep(time.Second)
			next := newAuthority(t, td, "next")
			removed := time.Now()
			s.cache.SetBundle(&bundle.Snapshot{Own: bundleOf(t, td, 9, next)})
			noAnswer(t, r)
			if late {
				time.Sleep(time.Minute)
				got := settled(r)
				if len(got) != 1 || got[0].at.Sub(removed) != 5*time.Second {
					t.Fatalf("got %v, want the new bundle to be sent after 5 s in any case", got)
				}
				return
			}
			time.Sleep(2 * time.Second)
			if err := s.cache.Put(next.svid(t, e, time.Hour)); err != nil {
				t.Fatal(err)
			}
			if got := settled(r); len(got) != 1 || got[0].err != nil {
				t.Fatalf("got %v, want one answer with the replacement", got)
			}
			time.Sleep(time.Minute)
			noAnswer(t, r)
		})
	}
}

// A call that arrives a moment before the agent is ready waits for it.
func TestStartingCallWaitsBriefly(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSystem(t, nil)
		r := fetchX509(t.Context(), s.client(1000))
		time.Sleep(400 * time.Millisecond)
		noAnswer(t, r)
		s.add(entry("1", "/a", 1000))
		if got := settled(r); len(got) != 1 || got[0].err != nil {
			t.Errorf("got %v when the agent became ready, want one answer at once", got)
		}
	})
}

func TestDeniedIsLoggedOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSystem(t, nil)
		s.add(entry("1", "/a", 1000))
		for range 3 {
			ended(t, fetchX509(t.Context(), s.client(1001)), codes.PermissionDenied)
		}
		got := s.logs.attrs("caller denied")
		if len(got) != 1 || got[0]["selector_types"] != "unix" || got[0]["selectors"] != "unix:uid:1001" || got[0]["user"] != "1001" || got[0]["path"] == "" || got[0]["pid"] == "" {
			t.Errorf("logged %v, want one line with pid, user, path and selectors", got)
		}
		if n := s.obs.streams("FetchX509SVID"); n != 0 {
			t.Errorf("%d streams counted as open", n)
		}
	})
}

func TestShutdown(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSystem(t, nil)
		e := entry("e1", "/one", 1000)
		s.add(e, entry("e2", "/two", 1001))
		c := s.client(1000)
		atRest := fetchX509(t.Context(), c)
		bundles := receive(c.FetchX509Bundles(withHeader(t.Context()), &workloadpb.X509BundlesRequest{}))
		spaced := fetchX509(t.Context(), s.client(1000))
		one(t, atRest)
		one(t, bundles)
		one(t, spaced)
		s.put(e) // both X.509 streams are waiting for the spacing to pass
		synctest.Wait()
		start := time.Now()
		s.stop()
		if s.err != nil {
			t.Errorf("Serve: %v", s.err)
		}
		if d := time.Since(start); d > stopGrace {
			t.Errorf("stopping took %v", d)
		}
		ended(t, atRest, codes.Unavailable)
		ended(t, bundles, codes.Unavailable)
		ended(t, spaced, codes.Unavailable)
	})
}

// A client that does not read cannot delay the shutdown.
func TestShutdownWithClientThatDoesNotRead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSystem(t, nil)
		e := entry("e1", "/one", 1000)
		s.cache.Update([]*cache.Entry{e}, nil)
		c := s.client(1000)
		svid := *s.ca.svid(t, e, time.Hour)
		svid.Intermediates = make([]byte, 3<<20) // more than the flow control window
		if err := s.cache.Put(&svid); err != nil {
			t.Fatal(err)
		}
		if _, err := c.FetchX509SVID(withHeader(t.Context()), &workloadpb.X509SVIDRequest{}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		start := time.Now()
		s.stop()
		if d := time.Since(start); s.err != nil || d > stopGrace {
			t.Errorf("Serve returned %v after %v", s.err, d)
		}
	})
}

func TestFailingAttestors(t *testing.T) {
	t.Parallel()
	broken := byUID{err: func() error { return errors.New("runtime is down") }}
	for _, tt := range []struct {
		name      string
		attestors []attest.Attestor
		uid       uint32
		want      codes.Code
	}{
		{"all", []attest.Attestor{broken, broken}, 1000, codes.Unavailable},
		{"one, and the other matches", []attest.Attestor{broken, byUID{}}, 1000, codes.OK},
		{"one, and the other does not match", []attest.Attestor{byUID{}, broken}, 1001, codes.Unavailable},
		{"none, and nothing matches", []attest.Attestor{byUID{}}, 1001, codes.PermissionDenied},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s := newSystem(t, func(c *Config) { c.Attestors = tt.attestors })
				s.add(entry("e1", "/one", 1000))
				in := fetchX509(t.Context(), s.client(tt.uid))
				if tt.want == codes.OK {
					one(t, in)
				} else {
					ended(t, in, tt.want)
				}
			})
		})
	}
}

func TestLimitOfCalls(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSystem(t, func(c *Config) { c.MaxPerUser = 2 })
		s.add(entry("e1", "/one", 1000), entry("e2", "/two", 1001))
		c := s.client(1000)
		ctx, cancel := context.WithCancel(t.Context())
		one(t, fetchX509(ctx, c))
		one(t, fetchX509(t.Context(), c))
		ended(t, fetchX509(t.Context(), c), codes.Unavailable)
		one(t, fetchX509(t.Context(), s.client(1001))) // others are not affected
		cancel()
		synctest.Wait()
		one(t, fetchX509(t.Context(), c))
	})
}

// A request has at most 64 KiB, and its metadata at most 8 KiB.
func TestLimitOfRequests(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSystem(t, nil)
		s.add(entry("e1", "/one", 1000))
		c := s.client(1000)
		ctx := withHeader(t.Context())
		for size, want := range map[int]codes.Code{60 << 10: codes.InvalidArgument, 64 << 10: codes.ResourceExhausted} {
			_, err := c.ValidateJWTSVID(ctx, &workloadpb.ValidateJWTSVIDRequest{Audience: "a", Svid: strings.Repeat("x", size)})
			if status.Code(err) != want {
				t.Errorf("a request of %d bytes: %v, want %v", size, err, want)
			}
		}
		long := metadata.AppendToOutgoingContext(ctx, "x", strings.Repeat("x", 9<<10))
		stream, err := c.FetchJWTBundles(long, &workloadpb.JWTBundlesRequest{})
		if err == nil {
			_, err = stream.Recv()
		}
		if err == nil {
			t.Error("9 KiB of metadata are accepted")
		}
	})
}

func TestLimitOfConnections(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSystem(t, func(c *Config) { c.MaxPerUser = 2 })
		s.add(entry("e1", "/one", 1000))
		open := func() error {
			c, err := s.lis.dial(t.Context(), 1000)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			c.SetReadDeadline(time.Now().Add(time.Second))
			_, err = c.Read(make([]byte, 1)) // the server's settings
			return err
		}
		if err := errors.Join(open(), open()); err != nil {
			t.Fatal(err)
		}
		if open() == nil {
			t.Error("a third connection was accepted")
		}
		time.Sleep(handshakeTimeout + time.Second) // the first two never sent anything
		if err := open(); err != nil {
			t.Errorf("after the others timed out: %v", err)
		}
	})
}

func TestWITIsUnimplemented(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSystem(t, nil)
		c := s.client(1000)
		ended(t, receive(c.FetchWITSVID(withHeader(t.Context()), &workloadpb.WITSVIDRequest{})), codes.Unimplemented)
		ended(t, receive(c.FetchWITBundles(withHeader(t.Context()), &workloadpb.WITBundlesRequest{})), codes.Unimplemented)
	})
}
