package workload

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
)

// minter is a server that signs JWT-SVIDs.
type minter struct {
	mu    sync.Mutex
	calls int
	mint  func(ctx context.Context, entryID string, audience []string) (string, error)
}

func (m *minter) MintJWT(ctx context.Context, entryID string, audience []string) (string, error) {
	m.mu.Lock()
	m.calls++
	mint := m.mint
	m.mu.Unlock()
	return mint(ctx, entryID, audience)
}

func (m *minter) set(mint func(context.Context, string, []string) (string, error)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mint = mint
}

func (m *minter) count() int { m.mu.Lock(); defer m.mu.Unlock(); return m.calls }

// newJWTSystem has one entry, e1 (/one), for user 1000.
func newJWTSystem(t *testing.T) (*system, *minter) {
	t.Helper()
	m := &minter{}
	s := newSystem(t, func(c *Config) { c.JWT = m })
	s.add(entry("e1", "/one", 1000))
	m.set(s.mintFor("/one"))
	return s, m
}

func (s *system) mintFor(path string) func(context.Context, string, []string) (string, error) {
	return func(_ context.Context, _ string, audience []string) (string, error) {
		return s.ca.token(s.t, "spiffe://example.org"+path, audience, time.Hour, map[string]any{"jti": fmt.Sprint(time.Now().UnixNano())}), nil
	}
}

// cachedJWT returns the cached token of the one entry of user 1000.
func (s *system) cachedJWT(audience ...string) (cache.JWT, bool) {
	v := s.cache.Match([]cache.Selector{{Type: "unix", Value: "uid:1000"}})
	return s.cache.JWT(v.Entries[0], audience)
}

func fetchJWT(ctx context.Context, c workloadpb.SpiffeWorkloadAPIClient, audience ...string) (string, error) {
	res, err := c.FetchJWTSVID(withHeader(ctx), &workloadpb.JWTSVIDRequest{Audience: audience})
	if err != nil {
		return "", err
	}
	if len(res.Svids) != 1 {
		return "", fmt.Errorf("%d tokens", len(res.Svids))
	}
	return res.Svids[0].Svid, nil
}

func TestRejectedJWTRequests(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, m := newJWTSystem(t)
		c := s.client(1000)
		for name, tt := range map[string]struct {
			req  *workloadpb.JWTSVIDRequest
			want codes.Code
		}{
			"no audience":       {&workloadpb.JWTSVIDRequest{}, codes.InvalidArgument},
			"empty audience":    {&workloadpb.JWTSVIDRequest{Audience: []string{"a", ""}}, codes.InvalidArgument},
			"NUL in audience":   {&workloadpb.JWTSVIDRequest{Audience: []string{"a\x00b"}}, codes.InvalidArgument},
			"long audience":     {&workloadpb.JWTSVIDRequest{Audience: []string{strings.Repeat("a", maxAudienceLen+1)}}, codes.InvalidArgument},
			"many audiences":    {&workloadpb.JWTSVIDRequest{Audience: make([]string, maxAudiences+1)}, codes.InvalidArgument},
			"no SPIFFE ID":      {&workloadpb.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: "one"}, codes.InvalidArgument},
			"another SPIFFE ID": {&workloadpb.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: "spiffe://example.org/two"}, codes.PermissionDenied},
		} {
			if _, err := c.FetchJWTSVID(withHeader(t.Context()), tt.req); status.Code(err) != tt.want {
				t.Errorf("%s: got %v, want %v", name, err, tt.want)
			}
		}
		if _, err := fetchJWT(t.Context(), s.client(1001), "a"); status.Code(err) != codes.PermissionDenied {
			t.Errorf("unknown caller: got %v", err)
		}
		if m.count() != 0 {
			t.Errorf("%d tokens were minted", m.count())
		}
	})
}

func TestJWTIsCachedUntilHalfOfItsLife(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, m := newJWTSystem(t)
		c := s.client(1000)
		first, err := fetchJWT(t.Context(), c, "a", "b")
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(29 * time.Minute)
		if again, err := fetchJWT(t.Context(), c, "b", "a", "b"); err != nil || again != first || m.count() != 1 {
			t.Errorf("the same audiences before half-life: %v, same token %v, %d mints", err, again == first, m.count())
		}
		if other, err := fetchJWT(t.Context(), c, "a"); err != nil || other == first {
			t.Errorf("another audience: %v, same token %v", err, other == first)
		}
		time.Sleep(2 * time.Minute)
		start := time.Now()
		if held, err := fetchJWT(t.Context(), c, "a", "b"); err != nil || held != first || time.Since(start) > 0 {
			t.Errorf("after half-life: %v, same token %v, after %v", err, held == first, time.Since(start))
		}
		synctest.Wait()
		if renewed, err := fetchJWT(t.Context(), c, "a", "b"); err != nil || renewed == first {
			t.Errorf("the second time after half-life: %v, same token %v", err, renewed == first)
		}
		if n := s.obs.minted(); n != 3 {
			t.Errorf("%d mints observed, want 3", n)
		}
	})
}

func TestJWTWhileTheServerFails(t *testing.T) {
	t.Parallel()
	for name, fail := range map[string]func(context.Context, string, []string) (string, error){
		"down":   func(context.Context, string, []string) (string, error) { return "", errors.New("down") },
		"frozen": func(ctx context.Context, _ string, _ []string) (string, error) { <-ctx.Done(); return "", ctx.Err() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s, m := newJWTSystem(t)
				c := s.client(1000)
				held, err := fetchJWT(t.Context(), c, "a")
				if err != nil {
					t.Fatal(err)
				}
				m.set(fail)
				time.Sleep(45 * time.Minute) // past half of its life
				start := time.Now()
				got, err := fetchJWT(t.Context(), c, "a")
				if err != nil || got != held {
					t.Errorf("the valid token was not served: %v", err)
				}
				if d := time.Since(start); d > 0 {
					t.Errorf("it took %v", d)
				}
				time.Sleep(16 * time.Minute) // past its end
				if _, err := fetchJWT(t.Context(), c, "a"); status.Code(err) != codes.Unavailable {
					t.Errorf("after its end: got %v, want Unavailable", err)
				}
			})
		})
	}
}

func TestMintedJWTIsChecked(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, m := newJWTSystem(t)
		c := s.client(1000)
		otherKey := newAuthority(t, td, "a") // the same key ID, another key
		for name, token := range map[string]string{
			"empty":             "",
			"garbage":           "a.b.c",
			"another subject":   s.ca.token(t, "spiffe://example.org/two", []string{"a"}, time.Hour, nil),
			"another audience":  s.ca.token(t, "spiffe://example.org/one", []string{"b"}, time.Hour, nil),
			"expired":           s.ca.token(t, "spiffe://example.org/one", []string{"a"}, -2*time.Minute, nil),
			"another key":       otherKey.token(t, "spiffe://example.org/one", []string{"a"}, time.Hour, nil),
			"key not in bundle": newAuthority(t, td, "x").token(t, "spiffe://example.org/one", []string{"a"}, time.Hour, nil),
		} {
			m.set(func(context.Context, string, []string) (string, error) { return token, nil })
			if _, err := fetchJWT(t.Context(), c, "a"); status.Code(err) != codes.Unavailable {
				t.Errorf("%s: got %v, want Unavailable", name, err)
			}
		}
		if _, held := s.cachedJWT("a"); held {
			t.Error("a rejected token is cached")
		}
		// A token for one of two audiences is rejected.
		m.set(func(context.Context, string, []string) (string, error) {
			return s.ca.token(t, "spiffe://example.org/one", []string{"a"}, time.Hour, nil), nil
		})
		if _, err := fetchJWT(t.Context(), c, "a", "b"); status.Code(err) != codes.Unavailable {
			t.Errorf("for one of two audiences: got %v, want Unavailable", err)
		}
		for _, err := range s.obs.mints {
			if err == nil {
				t.Error("a rejected token was counted as minted")
			}
		}
	})
}

func TestJWTMintIsShared(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, m := newJWTSystem(t)
		mint := s.mintFor("/one")
		m.set(func(ctx context.Context, id string, audience []string) (string, error) {
			select {
			case <-time.After(5 * time.Second):
				return mint(ctx, id, audience)
			case <-ctx.Done():
				return "", ctx.Err()
			}
		})
		c := s.client(1000)
		impatient, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		errs := make([]error, 10)
		var wg sync.WaitGroup
		for i := range errs {
			ctx := t.Context()
			if i == 0 {
				ctx = impatient
			}
			wg.Go(func() { _, errs[i] = fetchJWT(ctx, c, "a") })
			if i == 0 {
				synctest.Wait() // the caller that gives up starts the mint
			}
		}
		wg.Wait()
		if status.Code(errs[0]) != codes.DeadlineExceeded {
			t.Errorf("the impatient caller: %v", errs[0])
		}
		if err := errors.Join(errs[1:]...); err != nil {
			t.Error(err)
		}
		if m.count() != 1 {
			t.Errorf("%d mints, want 1", m.count())
		}
	})
}

func TestJWTForSeveralEntries(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := &minter{}
		s := newSystem(t, func(c *Config) { c.JWT = m })
		var all []*cache.Entry
		for i := range 3 {
			e := entry(fmt.Sprintf("e%d", i), fmt.Sprintf("/w%d", i), 1000)
			e.CreatedAt = time.Unix(int64(10-i), 0)
			all = append(all, e)
		}
		s.add(all...)
		m.set(func(_ context.Context, id string, audience []string) (string, error) {
			return s.ca.token(t, "spiffe://example.org/w"+id[1:], audience, time.Hour, nil), nil
		})
		c := s.client(1000)
		res, err := c.FetchJWTSVID(withHeader(t.Context()), &workloadpb.JWTSVIDRequest{Audience: []string{"a"}})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, svid := range res.Svids {
			got = append(got, svid.SpiffeId)
		}
		if want := []string{"spiffe://example.org/w0", "spiffe://example.org/w1", "spiffe://example.org/w2"}; !slices.Equal(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
		res, err = c.FetchJWTSVID(withHeader(t.Context()),
			&workloadpb.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: "spiffe://example.org/w1"})
		if err != nil || len(res.Svids) != 1 || res.Svids[0].SpiffeId != "spiffe://example.org/w1" || m.count() != 3 {
			t.Errorf("one asked for: %v, %v, %d mints", res, err, m.count())
		}
	})
}

// Taint changes nothing; a key that left the bundle does.
func TestJWTFollowsItsKey(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, m := newJWTSystem(t)
		c := s.client(1000)
		first, err := fetchJWT(t.Context(), c, "a")
		if err != nil {
			t.Fatal(err)
		}
		old, next := s.ca, newAuthority(t, td, "b")
		tainted, err := bundle.New(td, bundle.Content{
			X509: []bundle.X509Authority{{Certificate: old.cert, Tainted: true}, {Certificate: next.cert}},
			JWT: []bundle.JWTAuthority{
				{KeyID: old.kid, PublicKey: old.jwtKey.Public(), Tainted: true},
				{KeyID: next.kid, PublicKey: next.jwtKey.Public()},
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		s.ca = next
		s.cache.SetBundle(&bundle.Snapshot{Own: tainted})
		if got, err := fetchJWT(t.Context(), c, "a"); err != nil || got != first {
			t.Errorf("after the taint: %v, same token %v", err, got == first)
		}
		s.cache.SetBundle(&bundle.Snapshot{Own: bundleOf(t, td, 3, next)})
		got, err := fetchJWT(t.Context(), c, "a")
		if err != nil || got == first || m.count() != 2 {
			t.Errorf("after the removal: %v, same token %v", err, got == first)
		}
		if held, ok := s.cachedJWT("a"); !ok || held.KeyID != "jwt-b" {
			t.Errorf("held under key ID %q, want jwt-b", held.KeyID)
		}
	})
}

func TestShutdownEndsMints(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, m := newJWTSystem(t)
		ended := false
		m.set(func(ctx context.Context, _ string, _ []string) (string, error) {
			<-ctx.Done()
			time.Sleep(3 * time.Second) // longer than stopGrace
			ended = true
			return "", ctx.Err()
		})
		var err error
		var wg sync.WaitGroup
		c := s.client(1000)
		wg.Go(func() { _, err = fetchJWT(t.Context(), c, "a") })
		synctest.Wait()
		s.stop()
		if !ended {
			t.Error("Serve returned while a mint was running")
		}
		wg.Wait()
		if status.Code(err) != codes.Unavailable {
			t.Errorf("got %v, want Unavailable", err)
		}
		if got := s.logs.attrs("JWT-SVID not minted"); len(got) != 0 {
			t.Errorf("shutdown was logged as a failure: %v", got)
		}
	})
}

func TestValidateJWTSVID(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSystem(t, nil)
		friend, thirdParty := newAuthority(t, otherTD, "friend"), newAuthority(t, spiffeid.RequireTrustDomainFromString("third.example"), "third")
		e1, e2 := entry("e1", "/one", 1000), entry("e2", "/two", 1001)
		e1.FederatesWith = []spiffeid.TrustDomain{otherTD}
		s.add(e1, e2)
		s.cache.SetBundle(&bundle.Snapshot{Own: bundleOf(t, td, 1, s.ca), Federated: map[spiffeid.TrustDomain]*bundle.Bundle{
			otherTD: bundleOf(t, otherTD, 1, friend), thirdParty.td: bundleOf(t, thirdParty.td, 1, thirdParty),
		}})
		const sub = "spiffe://example.org/peer"
		good := s.ca.token(t, sub, []string{"a", "b"}, time.Hour, map[string]any{"role": "db", "n": 1.5, "list": []string{"x"}})
		for name, tt := range map[string]struct {
			uid             uint32
			audience, token string
			want            codes.Code
		}{
			"good":                    {1000, "a", good, codes.OK},
			"no audience":             {1000, "", good, codes.InvalidArgument},
			"no token":                {1000, "a", "", codes.InvalidArgument},
			"another audience":        {1000, "c", good, codes.InvalidArgument},
			"garbage":                 {1000, "a", "x.y.z", codes.InvalidArgument},
			"expired":                 {1000, "a", s.ca.token(t, sub, []string{"a"}, -2*time.Minute, nil), codes.InvalidArgument},
			"federated":               {1000, "a", friend.token(t, "spiffe://other.example/x", []string{"a"}, time.Hour, nil), codes.OK},
			"federated for another":   {1001, "a", friend.token(t, "spiffe://other.example/x", []string{"a"}, time.Hour, nil), codes.InvalidArgument},
			"known, not federated":    {1000, "a", thirdParty.token(t, "spiffe://third.example/x", []string{"a"}, time.Hour, nil), codes.InvalidArgument},
			"key of another domain":   {1000, "a", friend.token(t, sub, []string{"a"}, time.Hour, nil), codes.InvalidArgument},
			"subject is no SPIFFE ID": {1000, "a", s.ca.token(t, "peer", []string{"a"}, time.Hour, nil), codes.InvalidArgument},
			"no expiry":               {1000, "a", s.ca.token(t, sub, []string{"a"}, time.Hour, map[string]any{"exp": nil}), codes.InvalidArgument},
			"unknown caller":          {1002, "a", good, codes.PermissionDenied},
		} {
			res, err := s.client(tt.uid).ValidateJWTSVID(withHeader(t.Context()),
				&workloadpb.ValidateJWTSVIDRequest{Audience: tt.audience, Svid: tt.token})
			if status.Code(err) != tt.want {
				t.Errorf("%s: got %v, want %v", name, err, tt.want)
			}
			if name == "good" && err == nil {
				claims := res.Claims.AsMap()
				if res.SpiffeId != sub || claims["role"] != "db" || claims["n"] != 1.5 || claims["sub"] != sub {
					t.Errorf("%s: got %v", name, res)
				}
			}
		}
	})
}
