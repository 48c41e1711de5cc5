package workload

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
)

// Of several entries with one hint only the oldest is served, X.509 and JWT, so that
// the default identity is that of spire-agent. That is logged once.
func TestOneEntryForEachHint(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := &minter{}
		s := newSystem(t, func(c *Config) { c.JWT = m })
		var all []*cache.Entry
		for i, e := range []struct {
			hint    string
			created int64
		}{{"web", 10}, {"web", 5}, {"web", 5}, {"", 10}, {"db", 10}} {
			all = append(all, entry(fmt.Sprintf("e%d", i), fmt.Sprintf("/w%d", i), 1000))
			all[i].Hint, all[i].CreatedAt = e.hint, time.Unix(e.created, 0)
		}
		s.add(all...)
		m.set(func(_ context.Context, id string, audience []string) (string, error) {
			return s.ca.token(t, "spiffe://example.org/w"+id[1:], audience, time.Hour, nil), nil
		})
		c := s.client(1000)
		want := []string{"/w1 web", "/w3 ", "/w4 db"}
		var x509, jwt []string
		for _, svid := range one(t, fetchX509(t.Context(), c)).Svids {
			x509 = append(x509, svid.SpiffeId[len("spiffe://example.org"):]+" "+svid.Hint)
		}
		if !slices.Equal(x509, want) {
			t.Errorf("X.509-SVIDs %q, want %q", x509, want)
		}
		for range 2 {
			res, err := c.FetchJWTSVID(withHeader(t.Context()), &workloadpb.JWTSVIDRequest{Audience: []string{"a"}})
			if err != nil {
				t.Fatal(err)
			}
			jwt = nil
			for _, svid := range res.Svids {
				jwt = append(jwt, svid.SpiffeId[len("spiffe://example.org"):]+" "+svid.Hint)
			}
			if !slices.Equal(jwt, want) {
				t.Errorf("JWT-SVIDs %q, want %q", jwt, want)
			}
		}
		_, err := c.FetchJWTSVID(withHeader(t.Context()), &workloadpb.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: "spiffe://example.org/w2"})
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("a hidden entry asked for by its SPIFFE ID: %v, want PermissionDenied as from spire-agent", err)
		}
		said := s.logs.attrs("entry omitted")
		if len(said) != 2 || said[0]["entry_id"] != "e0" || said[1]["entry_id"] != "e2" {
			t.Errorf("logged %v, want e0 and e2 once", said)
		}
	})
}

// jtiSystem has one entry whose tokens are for one request each.
func jtiSystem(t *testing.T) (*system, *minter) {
	t.Helper()
	m := &minter{}
	s := newSystem(t, func(c *Config) { c.JWT = m })
	e := entry("e1", "/one", 1000)
	e.IncludeJTI = true
	s.add(e)
	var mu sync.Mutex
	n := 0
	m.set(func(_ context.Context, _ string, audience []string) (string, error) {
		mu.Lock()
		n++
		id := n
		mu.Unlock()
		time.Sleep(time.Second)
		return s.ca.token(t, "spiffe://example.org/one", audience, time.Hour, map[string]any{"jti": fmt.Sprint(id)}), nil
	})
	return s, m
}

// Each request gets its own token, also at the same time and for the same audience.
func TestJWTWithJTIIsForOneRequest(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, m := jtiSystem(t)
		const rounds, callers = 3, 5
		var mu sync.Mutex
		seen := map[string]int{}
		for range rounds {
			var calls sync.WaitGroup
			for range callers {
				c := s.client(1000)
				calls.Go(func() {
					token, err := fetchJWT(t.Context(), c, "a")
					if err != nil {
						t.Error(err)
					}
					mu.Lock()
					seen[token]++
					mu.Unlock()
				})
			}
			calls.Wait()
		}
		if len(seen) != rounds*callers || m.count() != rounds*callers {
			t.Errorf("%d tokens of %d mints for %d requests", len(seen), m.count(), rounds*callers)
		}
	})
}

// However many callers there are, the slots of the entry limit the requests at a time.
// A call waits for its token through a failure, within its deadline.
func TestJWTWithJTIKeepsTheLimits(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, m := jtiSystem(t)
		var mu sync.Mutex
		running, most, fails := 0, 0, 3
		m.set(func(_ context.Context, _ string, audience []string) (string, error) {
			mu.Lock()
			running++
			most = max(most, running)
			fails--
			id, fail := fails, fails >= 0
			mu.Unlock()
			time.Sleep(time.Second)
			mu.Lock()
			running--
			mu.Unlock()
			if fail {
				return "", errors.New("try again")
			}
			return s.ca.token(t, "spiffe://example.org/one", audience, time.Hour, map[string]any{"jti": fmt.Sprint(id)}), nil
		})
		c := s.client(1000)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		var calls sync.WaitGroup
		for range 3 * maxEntryMints {
			calls.Go(func() {
				if _, err := fetchJWT(ctx, c, "a"); err != nil {
					t.Error(err)
				}
			})
		}
		calls.Wait()
		if most != maxEntryMints {
			t.Errorf("%d mints at a time, want %d", most, maxEntryMints)
		}
		if want := 3*maxEntryMints + 3; m.count() != want {
			t.Errorf("%d mints, want one for each request and each failure: %d", m.count(), want)
		}
	})
}

// With ReplaceTainted a token of a tainted key is minted again when callers ask, once
// however many do, and is served meanwhile. Without it the token is served as before.
func TestJWTOfATaintedKey(t *testing.T) {
	t.Parallel()
	for _, replace := range []bool{false, true} {
		t.Run(fmt.Sprint(replace), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				m := &minter{}
				s := newSystem(t, func(c *Config) { c.JWT, c.ReplaceTainted = m, replace })
				s.add(entry("e1", "/one", 1000))
				next := newAuthority(t, td, "b")
				signer := s.ca
				sign := func(_ context.Context, _ string, audience []string) (string, error) {
					time.Sleep(time.Second)
					return signer.token(t, "spiffe://example.org/one", audience, 24*time.Hour, map[string]any{"jti": fmt.Sprint(time.Now())}), nil
				}
				m.set(sign)
				c := s.client(1000)
				ask := func() string {
					t.Helper()
					token, err := fetchJWT(t.Context(), c, "a")
					if err != nil {
						t.Fatal(err)
					}
					return token
				}
				old := ask()
				time.Sleep(time.Minute)
				taint := func() {
					b, err := bundle.New(td, bundle.Content{
						Sequence: 2, X509: []bundle.X509Authority{{Certificate: s.ca.cert}},
						JWT: []bundle.JWTAuthority{
							{KeyID: s.ca.kid, PublicKey: s.ca.jwtKey.Public(), Tainted: true}, {KeyID: next.kid, PublicKey: next.jwtKey.Public()},
						},
					})
					if err != nil {
						t.Fatal(err)
					}
					s.cache.SetBundle(&bundle.Snapshot{Own: b})
				}
				taint()
				time.Sleep(time.Hour)
				if m.count() != 1 {
					t.Fatalf("%d mints without a caller, want none", m.count()-1)
				}
				start := time.Now()
				for range 20 {
					if got := ask(); got != old {
						t.Error("the cached token is not served while another is minted")
					}
				}
				if took := time.Since(start); took > 0 {
					t.Errorf("callers waited %v", took)
				}
				time.Sleep(2 * time.Second)
				lagging := ask() // again signed by the tainted key: the server lags
				if replace != (lagging != old) {
					t.Errorf("replace %v, and the token is another one: %v", replace, lagging != old)
				}
				// It is minted again, but not at each call.
				before := m.count()
				for range 60 {
					time.Sleep(time.Second)
					ask()
				}
				if n := m.count() - before; replace != (n > 0) || n > 7 {
					t.Errorf("%d mints in a minute in which the server lags", n)
				}
				signer = next
				time.Sleep(taintedRemintAge)
				ask()
				time.Sleep(2 * time.Second)
				last, before := ask(), m.count()
				if key, _ := s.cachedJWT("a"); replace != (key.KeyID == next.kid) || key.Token != last {
					t.Errorf("replace %v, and the token is by key %q", replace, key.KeyID)
				}
				for range 60 {
					time.Sleep(time.Second)
					ask()
				}
				if m.count() != before {
					t.Errorf("%d mints of a token that needs none", m.count()-before)
				}
			})
		})
	}
}
