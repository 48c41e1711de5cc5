package listen_test

import (
	"errors"
	"fmt"
	"math"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/internal/listen"
)

// listener is a Listener with the connections that it has accepted.
type listener struct {
	*listen.Listener
	net      *network
	accepted chan net.Conn
	refused  refusals
}

func listenOn(t *testing.T, p *listen.Pool, limits listen.Limits) *listener {
	t.Helper()
	l := &listener{net: newNetwork(), accepted: make(chan net.Conn, 100)}
	l.Listener = p.Listen(l.net, listen.ForAll(limits), func(from netip.Prefix, _ error) { l.refused.count(from) })
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			l.accepted <- c
		}
	}()
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		<-done
		close(l.accepted)
		for c := range l.accepted {
			c.Close()
		}
	})
	return l
}

// active makes the next accepted connection one with an HTTP request.
func (l *listener) active(t *testing.T) net.Conn {
	t.Helper()
	c := <-l.accepted
	l.ConnState(c, http.StateActive)
	return c
}

// TestSilentConnections: they are not accepted, time out, and are evicted for new ones.
func TestSilentConnections(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := listenOn(t, listen.NewPoolOf(40), listen.Limits{})
		var all []client
		for range 25 { // half of 40 may be silent
			all = append(all, l.net.dial(t, "10.0.0.1"))
		}
		for i, c := range all {
			if open := c.open(); open != (i >= 5) {
				t.Errorf("connection %d is open: %v", i, open)
			}
		}
		// A client that sends something is served meanwhile, at any address.
		l.net.dial(t, "10.0.0.1").say("x")
		l.net.dial(t, "10.0.0.2").say("x")
		if n := len(l.accepted); n != 2 {
			t.Fatalf("%d connections are accepted, want 2", n)
		}
		b := make([]byte, 10)
		if n, err := (<-l.accepted).Read(b); n != 1 || b[0] != 'x' || err != nil {
			t.Errorf("the first byte is read as %q, %v", b[:n], err)
		}
		time.Sleep(5 * time.Second)
		for _, c := range all {
			if c.open() {
				t.Error("a silent connection is open after 5 s")
			}
		}
	})
}

// TestHandshakesAreEvicted: a new handshake evicts the oldest one of its address, or of
// its /48, if that has taken a second.
func TestHandshakesAreEvicted(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := listenOn(t, listen.NewPoolOf(1000), listen.Limits{Handshakes: 2})
		other := l.net.dial(t, "10.0.0.2").say("x")
		first := l.net.dial(t, "10.0.0.1").say("x")
		second := l.net.dial(t, "10.0.0.1").say("x")
		early := l.net.dial(t, "10.0.0.1").say("x")
		wantOpen(t, map[client]bool{other: true, first: true, second: true, early: false})
		time.Sleep(time.Second)
		third := l.net.dial(t, "10.0.0.1").say("x")
		wantOpen(t, map[client]bool{other: true, first: false, second: true, third: true})
		if l.refused.by["10.0.0.1/32"] != 2 || len(l.refused.by) != 1 {
			t.Errorf("refused: %v", l.refused.by)
		}

		var site []client
		elsewhere := l.net.dial(t, "2001:db8:2::1").say("x")
		for i := range 20 { // the site's limit is that of eight addresses
			if i == 16 {
				time.Sleep(time.Second)
			}
			site = append(site, l.net.dial(t, fmt.Sprintf("2001:db8:1:%x::1", i)).say("x"))
		}
		for i, c := range site {
			if open := c.open(); open != (i >= 4) {
				t.Errorf("handshake %d of the site is open: %v", i, open)
			}
		}
		wantOpen(t, map[client]bool{elsewhere: true, other: true, third: true})
	})
}

// TestHTTPClients: a request ends the handshake, and connections with a request have
// their own limit.
func TestHTTPClients(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := listenOn(t, listen.NewPoolOf(1000), listen.Limits{Handshakes: 1, Anonymous: 2})
		first := l.net.dial(t, "10.0.0.1").say("x")
		l.active(t)
		second := l.net.dial(t, "10.0.0.1").say("x")
		again := l.active(t)
		l.ConnState(again, http.StateActive) // its next request
		third := l.net.dial(t, "10.0.0.1").say("x")
		l.active(t)
		other := l.net.dial(t, "10.0.0.2").say("x")
		l.active(t)
		wantOpen(t, map[client]bool{first: true, second: true, third: false, other: true})
		again.Close()
		fourth := l.net.dial(t, "10.0.0.1").say("x")
		l.active(t)
		wantOpen(t, map[client]bool{first: true, fourth: true})
	})
}

// TestPoolIsShared: listeners share one bound, and accepted connections are not evicted.
func TestPoolIsShared(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := listen.NewPoolOf(8)
		agents, relying := listenOn(t, p, listen.Limits{}), listenOn(t, p, listen.Limits{})
		served := func(l *listener, ip string) (client, net.Conn) {
			c := l.net.dial(t, ip).say("x")
			return c, l.active(t)
		}
		// At most a quarter of the pool is for the anonymous callers of each listener.
		a1, _ := served(agents, "10.0.0.1")
		a2, _ := served(agents, "10.0.0.2")
		a3, _ := served(agents, "10.0.0.3")
		r1, _ := served(relying, "10.0.0.1")
		r2, last := served(relying, "10.0.0.2")
		wantOpen(t, map[client]bool{a1: true, a2: true, a3: false, r1: true, r2: true})
		// The other four are handshakes, two at most, and silent ones.
		h1 := relying.net.dial(t, "10.0.0.3").say("x")
		h2 := agents.net.dial(t, "10.0.0.3").say("x")
		time.Sleep(time.Second)
		h3 := agents.net.dial(t, "10.0.0.3").say("x")
		s1, s2 := agents.net.dial(t, "10.0.0.3"), relying.net.dial(t, "10.0.0.3")
		wantOpen(t, map[client]bool{h1: false, h2: true, h3: true, s1: true, s2: true})
		s3 := relying.net.dial(t, "10.0.0.3")
		wantOpen(t, map[client]bool{a1: true, a2: true, r1: true, r2: true, h2: true, h3: true, s1: false, s2: true, s3: true})
		s4 := relying.net.dial(t, "10.0.0.3").say("x")
		wantOpen(t, map[client]bool{s2: false, h2: false, h3: true, s4: true})
		last.Close()
		time.Sleep(time.Second)
		again, _ := served(relying, "10.0.0.2")
		wantOpen(t, map[client]bool{a1: true, a2: true, r1: true, again: true})
	})
}

// TestAnonymousAreEvicted: when a listener has all its connections of anonymous callers, a new
// one evicts the oldest that is ten seconds old. The limit of its own address comes first.
func TestAnonymousAreEvicted(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := listenOn(t, listen.NewPoolOf(16), listen.Limits{Anonymous: 2})
		dial := func(ip string) client {
			c := l.net.dial(t, ip).say("x")
			l.active(t)
			return c
		}
		a1, a2 := dial("10.0.0.1"), dial("10.0.0.1")
		time.Sleep(5 * time.Second)
		b1, b2 := dial("10.0.0.2"), dial("10.0.0.2") // a quarter of 16
		early := dial("10.0.0.3")
		wantOpen(t, map[client]bool{a1: true, a2: true, b1: true, b2: true, early: false})
		time.Sleep(5 * time.Second)
		own := dial("10.0.0.1")
		wantOpen(t, map[client]bool{a1: true, a2: true, own: false})
		c1 := dial("10.0.0.3")
		wantOpen(t, map[client]bool{a1: false, a2: true, b1: true, b2: true, c1: true})
		a3 := dial("10.0.0.1") // has one left
		wantOpen(t, map[client]bool{a2: false, a3: true, b1: true, b2: true, c1: true})
		d1 := dial("10.0.0.4")
		wantOpen(t, map[client]bool{a3: true, b1: true, b2: true, c1: true, d1: false})
		if got := l.refused.by; got["10.0.0.1/32"] != 3 || got["10.0.0.3/32"] != 1 || got["10.0.0.4/32"] != 1 {
			t.Errorf("refused: %v", got)
		}
	})
}

// TestAnonymousGiveWayToAll: when the process has no connection left, a new one evicts an
// anonymous caller's, at whichever listener.
func TestAnonymousGiveWayToAll(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := listen.NewPoolOf(4) // one of them may be anonymous at each listener
		var conns []client
		for range 4 {
			l := listenOn(t, p, listen.Limits{})
			conns = append(conns, l.net.dial(t, "10.0.0.1").say("x"))
			l.active(t)
		}
		n := serveOf(t, p, listen.Limits{}, new(reasons))
		early := n.dial(t, "10.0.0.2")
		wantOpen(t, map[client]bool{conns[0]: true, conns[1]: true, conns[2]: true, conns[3]: true, early: false})
		time.Sleep(10 * time.Second)
		agent := n.dial(t, "10.0.0.2").say("a")
		wantOpen(t, map[client]bool{conns[0]: false, conns[1]: true, conns[2]: true, conns[3]: true, agent: true})
	})
}

func TestPoolOfThisProcess(t *testing.T) {
	t.Parallel()
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	files := int(min(limit.Cur, math.MaxInt32))
	if got, want := listen.NewPool().Max(), max(files-256, files/2); got != want {
		t.Errorf("%d connections with %d open files, want %d", got, files, want)
	}
}

// TestListenerFails: Accept returns a temporary error once, and a permanent one always.
func TestListenerFails(t *testing.T) {
	t.Parallel()
	broken := errors.New("broken")
	l := listen.NewPool().Listen(&failing{errs: []error{syscall.EMFILE, broken}}, listen.ForAll(listen.Limits{}), nil)
	defer l.Close()
	for _, want := range []error{syscall.EMFILE, broken, broken} {
		if _, err := l.Accept(); !errors.Is(err, want) {
			t.Errorf("Accept: %v, want %v", err, want)
		}
	}
}

type failing struct {
	network
	errs []error
}

func (f *failing) Accept() (net.Conn, error) {
	err := f.errs[0]
	f.errs = f.errs[1:]
	return nil, err
}

func (f *failing) Close() error { return nil }

// TestConnectionsOfCallers: known and anonymous callers have separate limits, and a new
// connection of a caller evicts its oldest.
func TestConnectionsOfCallers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var refused reasons
		n := serve(t, listen.Limits{Handshakes: 1, Anonymous: 2, Known: 4, Caller: 3}, &refused)
		say := func(ip, caller string) client { return n.dial(t, ip).say(caller) }
		anonymous1, anonymous2 := say("10.0.0.1", "-"), say("10.0.0.1", "-")
		anonymous3 := say("10.0.0.1", "-")
		a1, a2, a3 := say("10.0.0.1", "a"), say("10.0.0.1", "a"), say("10.0.0.2", "a")
		wantOpen(t, map[client]bool{anonymous1: true, anonymous2: true, anonymous3: false, a1: true, a2: true, a3: true})
		a4 := say("10.0.0.2", "a")
		wantOpen(t, map[client]bool{a1: false, a2: true, a3: true, a4: true})
		b, c, d := say("10.0.0.1", "b"), say("10.0.0.1", "c"), say("10.0.0.1", "d")
		// The limit of 10.0.0.1 counts a2, b, c and d, and not those of a at 10.0.0.2.
		e1, e2 := say("10.0.0.1", "e"), say("10.0.0.3", "e")
		wantOpen(t, map[client]bool{e1: false, e2: true, anonymous1: true, anonymous2: true, a2: true, b: true, c: true, d: true})
		if got := refused.take(); !slices.Equal(got, []string{
			"10.0.0.1/32: 10.0.0.1/32 has 2 connections of anonymous callers already: close some and try again",
			"10.0.0.1/32: its caller has made a newer connection",
			"10.0.0.1/32: 10.0.0.1/32 has 4 connections already: close some and try again",
		}) {
			t.Errorf("the reasons are %q", got)
		}
	})
}

// TestHandshakesEnd: a handshake that does not proceed is ended.
func TestHandshakesEnd(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := serve(t, listen.Limits{}, new(reasons))
		c := n.dial(t, "10.0.0.1").say("-") // and never says that it speaks HTTP/2
		time.Sleep(9 * time.Second)
		wantOpen(t, map[client]bool{c: true})
		time.Sleep(time.Second)
		wantOpen(t, map[client]bool{c: false})
	})
}
