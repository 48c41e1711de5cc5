package spireapi_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// from returns the same server, reached from an IP address.
func (r *running) from(t testing.TB, ip string) *running {
	t.Helper()
	return serveOn(t, r.Server, &listener{
		Listener: bufconn.Listen(1 << 12), from: &net.TCPAddr{IP: net.ParseIP(ip), Port: 40000},
	})
}

// took returns how long f takes. An error of f fails the test.
func took(t *testing.T, f func() error) time.Duration {
	t.Helper()
	begin := time.Now()
	if err := f(); err != nil {
		t.Fatal(err)
	}
	return time.Since(begin)
}

// items asks for n X.509-SVIDs in one batch.
func (c *client) items(ctx context.Context, t *testing.T, n int) error {
	_, csr := newKey(t)
	_, err := c.BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{
		Params: slices.Repeat([]*svidv1.NewX509SVIDParams{{EntryId: "a", Csr: csr}}, n),
	})
	return err
}

func (c *client) renew(ctx context.Context, t *testing.T) error {
	_, csr := newKey(t)
	_, err := c.RenewAgent(ctx, &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr}})
	return err
}

func (c *client) jwt(ctx context.Context) error {
	_, err := c.NewJWTSVID(ctx, &svidv1.NewJWTSVIDRequest{EntryId: "a", Audience: []string{"x"}})
	return err
}

// knock attests with a token that does not exist.
func (c *client) knock(ctx context.Context) error {
	_, err := c.attest(ctx, "join_token", "guessed", []byte("x"))
	if status.Code(err) == codes.InvalidArgument {
		return nil // it was not limited
	}
	return err
}

// TestLimits: a client makes as many calls at once as the limit of a second, and
// then more.
func TestLimits(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		rate int
		many func(t *testing.T, c *client) error // uses up the limit of a second
		one  func(t *testing.T, c *client) error
	}{
		{
			"AttestAgent", 1,
			func(t *testing.T, c *client) error { return c.knock(t.Context()) },
			func(t *testing.T, c *client) error { return c.knock(t.Context()) },
		},
		{
			"BatchNewX509SVID", 500,
			func(t *testing.T, c *client) error { return c.items(t.Context(), t, 500) },
			func(t *testing.T, c *client) error { return c.items(t.Context(), t, 1) },
		},
		{
			"RenewAgent", 500, // shared with BatchNewX509SVID
			func(t *testing.T, c *client) error {
				return errors.Join(c.items(t.Context(), t, 200), c.renew(t.Context(), t), c.items(t.Context(), t, 299))
			},
			func(t *testing.T, c *client) error { return c.renew(t.Context(), t) },
		},
		{
			"NewJWTSVID", 500,
			func(t *testing.T, c *client) error { return times(500, func() error { return c.jwt(t.Context()) }) },
			func(t *testing.T, c *client) error { return c.jwt(t.Context()) },
		},
		{
			"PostStatus", 10,
			func(t *testing.T, c *client) error { return times(10, func() error { return c.ping(t.Context()) }) },
			func(t *testing.T, c *client) error { return c.ping(t.Context()) },
		},
		{
			"Report", 10,
			func(t *testing.T, c *client) error { // not shared with PostStatus
				return times(10, func() error { return errors.Join(c.report(t.Context(), &api.ReportRequest{}), c.ping(t.Context())) })
			},
			func(t *testing.T, c *client) error { return c.report(t.Context(), &api.ReportRequest{}) },
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			seen := &counts{by: make(map[string]int)}
			bubble(t, spireapi.Config{Ledger: newFakeLedger(), Observer: seen}, func(t *testing.T, s *running) {
				caller, local := s.join(t)
				s.apply(t, []spireapi.Entry{entry("a")})
				c := s.from(t, "10.0.0.1").dial(t, caller)
				share := time.Second / time.Duration(tt.rate)
				if d := took(t, func() error { return tt.many(t, c) }); d != 0 {
					t.Errorf("what a second gives takes %v", d)
				}
				if n := seen.limited(tt.name); n != 0 {
					t.Errorf("%d calls were limited too early", n)
				}
				for range 3 {
					if d := took(t, func() error { return tt.one(t, c) }); d != share {
						t.Errorf("one more takes %v, want %v", d, share)
					}
				}
				if n := seen.limited(tt.name); n != 3 {
					t.Errorf("%d calls are counted as limited, want 3", n)
				}
				// Clients at another address, or without one, do not wait.
				for _, other := range []*client{s.from(t, "10.0.0.2").dial(t, caller), local, local} {
					if d := took(t, func() error { return tt.many(t, other) }); d != 0 {
						t.Errorf("somebody else waits for %v", d)
					}
				}
				// After a second without calls the budget is full again.
				time.Sleep(time.Hour)
				if d := took(t, func() error { return tt.many(t, c) }); d != 0 {
					t.Errorf("what a second gives takes %v after a pause", d)
				}
				if d := took(t, func() error { return tt.one(t, c) }); d != share {
					t.Errorf("one more takes %v after a pause, want %v", d, share)
				}
			})
		})
	}
}

func times(n int, f func() error) error {
	for range n {
		if err := f(); err != nil {
			return err
		}
	}
	return nil
}

// TestAddressesOfOneClient attests from pairs of addresses.
func TestAddressesOfOneClient(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		a, b string
		same bool
	}{
		{"10.0.0.1", "10.0.0.1", true},
		{"10.0.0.1", "10.0.0.2", false},
		{"10.0.0.1", "::ffff:10.0.0.1", true},
		{"2001:db8:0:1::1", "2001:db8:0:1:ffff::", true},
		{"2001:db8:0:1::1", "2001:db8:0:2::1", false},
	} {
		t.Run(tt.a+" "+tt.b, func(t *testing.T) {
			t.Parallel()
			bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
				a, b := s.from(t, tt.a).dial(t, nil), s.from(t, tt.b).dial(t, nil)
				first := took(t, func() error { return a.knock(t.Context()) })
				second := took(t, func() error { return b.knock(t.Context()) })
				if want := map[bool]time.Duration{true: time.Second}[tt.same]; first != 0 || second != want {
					t.Errorf("they wait for %v and %v, want 0s and %v", first, second, want)
				}
			})
		})
	}
}

// TestThousandAtOnce is an agent's start: two batches, of which the second waits.
func TestThousandAtOnce(t *testing.T) {
	t.Parallel()
	seen := &counts{by: make(map[string]int)}
	bubble(t, spireapi.Config{Observer: seen}, func(t *testing.T, s *running) {
		caller, _ := s.join(t)
		s.apply(t, []spireapi.Entry{entry("a")})
		c := s.from(t, "10.0.0.1").dial(t, caller)
		// The deadline of a stock agent.
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		d := took(t, func() error {
			other := make(chan error, 1)
			go func() { other <- c.items(ctx, t, 500) }()
			return errors.Join(c.items(ctx, t, 500), <-other)
		})
		if d != time.Second {
			t.Errorf("1,000 SVIDs take %v", d)
		}
		// A batch that is too large is refused, and does not count.
		time.Sleep(time.Second)
		wantCode(t, c.items(ctx, t, 501), codes.ResourceExhausted)
		wantCode(t, c.items(ctx, t, 0), codes.InvalidArgument)
		if d := took(t, func() error { return c.items(ctx, t, 500) }); d != 0 {
			t.Errorf("the next batch waits for %v", d)
		}
		if n := seen.limited("BatchNewX509SVID"); n != 1 {
			t.Errorf("%d calls are counted as limited, want 1", n)
		}
	})
}

// TestAnonymousCallsDoNotCountForAgents: a caller without an SVID calls agent-only
// methods from an agent's address.
func TestAnonymousCallsDoNotCountForAgents(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		caller, _ := s.join(t)
		at := s.from(t, "10.0.0.1")
		anonymous, c := at.dial(t, nil), at.dial(t, caller)
		for range 50 {
			wantCode(t, anonymous.ping(t.Context()), codes.PermissionDenied, notAttested)
		}
		if d := took(t, func() error { return c.ping(t.Context()) }); d != 0 {
			t.Errorf("the agent waits for %v", d)
		}
	})
}

// TestLimitsAreLogged: at most once a minute for each client, with a count, and at
// most so many lines for all clients.
func TestLimitsAreLogged(t *testing.T) {
	t.Parallel()
	log := new(records)
	seen := &counts{by: make(map[string]int)}
	bubble(t, spireapi.Config{Log: log.logger(), Observer: seen}, func(t *testing.T, s *running) {
		caller, _ := s.join(t)
		c := s.from(t, "10.0.0.1").dial(t, caller)
		hurried, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		for range 3 {
			begin := time.Now()
			flood(100, func(int) error { return c.knock(hurried) })
			time.Sleep(time.Minute - time.Since(begin))
		}
		waits, refusals := log.take(t, "rate limited, calls delayed"), log.take(t, "rate limited, calls rejected")
		if w, r := len(waits), len(refusals); w < 3 || w > 4 || r < 3 || r > 4 {
			t.Errorf("%d lines about waiting, %d about refusals in three minutes", w, r)
		}
		if r := refusals[0]; r["level"] != "WARN" || r["address"] != "10.0.0.1/32" || r["method"] != "AttestAgent" {
			t.Errorf("the log line has the wrong level, address or method: %v", r)
		}
		if n := seen.limited("AttestAgent"); n != 3*99 {
			t.Errorf("%d calls are counted, want all %d", n, 3*99)
		}
		time.Sleep(time.Hour)
		log.take(t, "rate limited, calls delayed")
		for i := range 50 {
			c := s.from(t, fmt.Sprintf("10.0.1.%d", i)).dial(t, nil)
			flood(2, func(int) error { return c.knock(t.Context()) })
		}
		time.Sleep(time.Minute)
		waits = log.take(t, "rate limited, calls delayed")
		if n := len(waits); n < 10 || n > 35 || total(waits) != 50 {
			t.Errorf("%d lines that count %d waits, about 50 clients", n, total(waits))
		}
	})
}

// TestLimitsOverTCP uses real sockets at two addresses of this machine.
func TestLimitsOverTCP(t *testing.T) {
	t.Parallel()
	seen := &counts{by: make(map[string]int)}
	s := newServer(t, spireapi.Config{Observer: seen})
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, lis) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	}()
	knock := func(from string, patience time.Duration) codes.Code {
		t.Helper()
		dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		conn, err := grpc.NewClient("passthrough:///"+lis.Addr().String(),
			grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true})),
			grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
				return dialer.DialContext(ctx, "tcp", address)
			}))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		return status.Code((&client{AgentClient: agentv1.NewAgentClient(conn)}).knock(ctx))
	}
	// Half of the time until the deadline is less than the second call would have to
	// wait, so it is refused at once, unless this machine is very slow.
	for range 50 {
		if knock("127.0.0.1", time.Second) == codes.ResourceExhausted {
			before := seen.limited("AttestAgent")
			if code := knock("127.0.0.2", time.Minute); code != codes.OK || seen.limited("AttestAgent") != before {
				t.Errorf("another address: %v, limited", code)
			}
			return
		}
	}
	t.Error("no call was refused")
}

// TestLimitsOfNetworks: a client has the limits of the smallest network that it is in, each
// client for itself, and a limit may be off. Reloaded limits apply to the next call.
func TestLimitsOfNetworks(t *testing.T) {
	t.Parallel()
	limit := func(change func(*spireapi.Limits)) spireapi.Limits {
		l := spireapi.DefaultLimits
		change(&l)
		return l
	}
	of := &spireapi.ClientLimits{
		Default: limit(func(l *spireapi.Limits) { l.Statuses = 5 }),
		Networks: map[netip.Prefix]spireapi.Limits{
			netip.MustParsePrefix("10.0.0.0/8"):    limit(func(l *spireapi.Limits) { l.Statuses = 2 }),
			netip.MustParsePrefix("10.1.0.0/16"):   limit(func(l *spireapi.Limits) { l.Statuses = 0 }),
			netip.MustParsePrefix("2001:db8::/32"): limit(func(l *spireapi.Limits) { l.Statuses = 3 }),
			netip.MustParsePrefix("10.2.0.0/16"):   limit(func(l *spireapi.Limits) { l.Statuses, l.X509SVIDs = 1, 100 }),
		},
	}
	bubble(t, spireapi.Config{Ledger: newFakeLedger(), Limits: of}, func(t *testing.T, s *running) {
		caller, _ := s.join(t)
		s.apply(t, []spireapi.Entry{entry("a")})
		clients := map[string]*client{}
		for ip, most := range map[string]int{"192.0.2.1": 5, "10.0.0.1": 2, "10.0.0.2": 2, "10.2.0.1": 1, "2001:db8::1": 3, "10.1.0.1": 1000} {
			c := s.from(t, ip).dial(t, caller)
			clients[ip] = c
			if d := took(t, func() error { return times(most, func() error { return c.ping(t.Context()) }) }); d != 0 {
				t.Errorf("%s waits for %v", ip, d)
			}
			if d := took(t, func() error { return c.ping(t.Context()) }); most < 1000 && d != time.Second/time.Duration(most) {
				t.Errorf("one more of %s waits for %v, want a %dth of a second", ip, d, most)
			}
		}
		// A full batch passes with a lower rate, too, and the next waits for that rate.
		c := clients["10.2.0.1"]
		if d := took(t, func() error { return c.items(t.Context(), t, 500) }); d != 0 {
			t.Errorf("a batch waits for %v", d)
		}
		if d := took(t, func() error { return c.items(t.Context(), t, 200) }); d != 2*time.Second {
			t.Errorf("another batch waits for %v", d)
		}

		apply, err := s.Reload(spireapi.Reloaded{Limits: &spireapi.ClientLimits{Default: limit(func(l *spireapi.Limits) { l.Statuses = 4 })}})
		check(t, err)
		time.Sleep(time.Hour)
		if d := took(t, func() error { return times(3, func() error { return clients["10.0.0.1"].ping(t.Context()) }) }); d != time.Second/2 {
			t.Errorf("before the limits are applied: %v", d)
		}
		apply()
		check(t, clients["10.0.0.1"].ping(t.Context())) // a budget in use gets its new size at the next call
		for ip, c := range clients {
			time.Sleep(time.Hour) // the budgets are full
			if d := took(t, func() error { return times(5, func() error { return c.ping(t.Context()) }) }); d != time.Second/4 {
				t.Errorf("%s after the reload waits for %v", ip, d)
			}
		}
	})
}

// TestConnectionLimitsOfNetworks: the limits of connections and of calls in flight are those
// of the client's network, and zero is none.
func TestConnectionLimitsOfNetworks(t *testing.T) {
	t.Parallel()
	one := spireapi.DefaultLimits
	one.Anonymous = 1
	none := spireapi.DefaultLimits
	none.Anonymous = 0
	of := &spireapi.ClientLimits{Default: spireapi.DefaultLimits, Networks: map[netip.Prefix]spireapi.Limits{
		netip.MustParsePrefix("10.0.0.0/8"): one, netip.MustParsePrefix("192.0.2.0/24"): none,
	}}
	bubble(t, spireapi.Config{Limits: of}, func(t *testing.T, s *running) {
		for ip, most := range map[string]int{"10.0.0.1": 1, "192.0.2.1": 20, "198.51.100.1": 16} {
			at, served := s.from(t, ip), 0
			for range 20 {
				if _, err := at.dial(t, nil).GetBundle(t.Context(), &bundlev1.GetBundleRequest{}); err == nil {
					served++
				}
			}
			if served != most {
				t.Errorf("%d connections of %s are served, want %d", served, ip, most)
			}
		}
	})
}
