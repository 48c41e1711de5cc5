package upstream_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/internal/agent/upstream"
)

// nodeClock is a node's wrong clock.
type nodeClock struct{ skew atomic.Int64 }

func (c *nodeClock) set(skew time.Duration) { c.skew.Store(int64(skew)) }
func (c *nodeClock) now() time.Time         { return time.Now().Add(time.Duration(c.skew.Load())) }

// up is how old the server's certificate is when the nodes of these tests start.
const up = 20 * time.Hour

// A wrong clock costs no join token: the agent SVID is stored and used, over a
// renewal, an outage and a restart, and after the clock is corrected.
func TestWrongClockAtTheFirstStart(t *testing.T) {
	t.Parallel()
	for _, skew := range []time.Duration{-75 * time.Second, -time.Hour, -72 * time.Hour, 2 * time.Hour, 3 * time.Hour} {
		t.Run(skew.String(), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				var clock nodeClock
				s, dir := newServer(t), t.TempDir()
				time.Sleep(up)
				clock.set(skew)
				works := func(a *agent, when string) {
					t.Helper()
					if err := a.PostStatus(t.Context(), 1); err != nil {
						t.Errorf("%s: %v", when, err)
					}
					if err := a.Identified(); err != nil {
						t.Errorf("%s: %v", when, err)
					}
				}
				a := newAgent(t, s, options{dir: dir, token: "t", now: clock.now})
				attest(t, a)
				works(a, "attested")
				check(t, a.RenewNode(t.Context()))
				works(a, "renewed")
				s.stop()
				for range 60 {
					if a.PostStatus(t.Context(), 1) == nil {
						t.Error("the server is down")
					}
					time.Sleep(10 * time.Second)
				}
				s.start()
				time.Sleep(10 * time.Second)
				works(a, "after an outage") // the server presents another certificate
				time.Sleep(15 * time.Minute)
				a.close(t)

				clock.set(skew)
				a = newAgent(t, s, options{dir: dir, token: "t", now: clock.now})
				attest(t, a)
				works(a, "restarted")
				clock.set(0)
				time.Sleep(10 * time.Second)
				works(a, "clock right")
				a.close(t)
				if n := s.count("AttestAgent"); n != 1 {
					t.Errorf("attested %d times with one token", n)
				}
			})
		})
	}
}

// The node's clock is ahead, so that the server's certificate seems expired. The
// token is not sent, and one log line in ten minutes names the remedy. After the clock
// is corrected the node attests.
func TestServerCertificateExpiredByTheNodesClock(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var clock nodeClock
		s := newServer(t)
		time.Sleep(up)
		clock.set(5 * time.Hour)
		a := newAgent(t, s, options{token: "t", now: clock.now})
		defer a.close(t)
		done := make(chan error, 1)
		go func() { done <- a.Attest(t.Context()) }()
		time.Sleep(30 * time.Minute)
		synctest.Wait()
		if n := s.count("AttestAgent"); n > 0 {
			t.Errorf("the token was sent %d times", n)
		}
		warnings, remedies, counts := 0, 0, 0
		for line := range strings.Lines(a.logs.String()) {
			if strings.Contains(line, "level=WARN") {
				warnings++
				remedies += strings.Count(line, "set the clock")
				counts += strings.Count(line, " count=")
			}
		}
		if warnings != 3 || remedies != 3 || counts != 2 {
			t.Errorf("%d warnings in 30 minutes, %d with the remedy and %d with a count: %s", warnings, remedies, counts, a.logs)
		}
		clock.set(0)
		time.Sleep(6 * time.Second)
		select {
		case err := <-done:
			check(t, err)
		default:
			t.Fatal("not attested with the clock right")
		}
	})
}

// An SVID that has expired by the server's clock is replaced with the next token,
// whatever the node's clock shows, in a running agent and after a restart.
func TestSVIDExpiredByTheServersClock(t *testing.T) {
	t.Parallel()
	for _, skew := range []time.Duration{0, -72 * time.Hour, time.Hour} {
		for _, restart := range []bool{false, true} {
			t.Run(fmt.Sprint(skew, restart), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					var clock nodeClock
					s, dir := newServer(t), t.TempDir()
					time.Sleep(up)
					clock.set(skew)
					file := filepath.Join(dir, "token")
					check(t, os.WriteFile(file, []byte("t"), 0o600))
					o := options{dir: filepath.Join(dir, "data"), tokenFile: file, now: clock.now}
					a := newAgent(t, s, o)
					attest(t, a)
					check(t, a.PostStatus(t.Context(), 1))
					if restart {
						a.close(t)
					}
					time.Sleep(2 * time.Hour)
					if restart {
						a = newAgent(t, s, o)
					}
					defer a.close(t)
					if err := a.PostStatus(t.Context(), 1); upstream.Code(err) != "Unauthenticated" || a.Identified() == nil {
						t.Errorf("expired: %v, %v", err, a.Identified())
					}
					s.locked(func() { s.tokens["second"] = true })
					check(t, os.WriteFile(file, []byte("second"), 0o600))
					time.Sleep(6 * time.Second)
					check(t, a.PostStatus(t.Context(), 1))
				})
			})
		}
	}
}

// The agent sends the token only after the server has refused the agent SVID held. A
// server that could not be asked may be back a moment later.
func TestTokenIsNotSentBeforeTheHeldSVIDIsRefused(t *testing.T) {
	t.Parallel()
	for name, trouble := range map[string]func(context.Context, net.Conn) (net.Conn, error){
		"no connection": func(_ context.Context, conn net.Conn) (net.Conn, error) {
			return nil, errors.Join(io.EOF, conn.Close())
		},
		"frozen": func(_ context.Context, conn net.Conn) (net.Conn, error) { return &frozen{Conn: conn}, nil },
		"frozen once it has presented its certificate": func(_ context.Context, conn net.Conn) (net.Conn, error) { return &frozen{Conn: conn, after: 1}, nil },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				var clock nodeClock
				s, dir := newServer(t), t.TempDir()
				time.Sleep(up)
				file := filepath.Join(dir, "token")
				check(t, os.WriteFile(file, []byte("t"), 0o600))
				var dials atomic.Int64
				o := options{dir: filepath.Join(dir, "data"), tokenFile: file, now: clock.now}
				a := newAgent(t, s, o)
				attest(t, a)
				a.close(t)
				s.locked(func() { s.tokens["second"] = true })
				check(t, os.WriteFile(file, []byte("second"), 0o600))
				clock.set(2 * time.Hour) // the SVID held has expired by it
				o.dial = func(ctx context.Context, address string) (net.Conn, error) {
					conn, err := s.dial(ctx, address)
					if dials.Add(1) == 1 && err == nil {
						return trouble(ctx, conn)
					}
					return conn, err
				}
				a = newAgent(t, s, o)
				defer a.close(t)
				attest(t, a)
				check(t, a.PostStatus(t.Context(), 1))
				if n := s.count("AttestAgent"); n != 1 {
					t.Errorf("attested %d times", n)
				}
			})
		})
	}
}

// frozen is a connection to a machine that accepts data and does not answer.
type frozen struct {
	net.Conn
	after int // writes that still reach it
}

func (c *frozen) Write(b []byte) (int, error) {
	if c.after--; c.after >= 0 {
		return c.Conn.Write(b)
	}
	return len(b), nil
}

// attest attests the agent within a minute or fails the test.
func attest(t *testing.T, a *agent) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	check(t, a.Attest(ctx))
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
