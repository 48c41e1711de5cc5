package listen_test

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pires/go-proxyproto"

	"github.com/renewd/renewd/internal/listen"
)

// proxied is a listener on a real port behind load balancers, whose accepted connections
// send back the address that they are from, and what they received up to a dot.
type proxied struct {
	t       *testing.T
	address string
	log     *lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func listenProxied(t *testing.T, limits listen.Limits, networks ...netip.Prefix) *proxied {
	t.Helper()
	raw, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxied{t: t, address: raw.Addr().String(), log: new(lockedBuffer)}
	proxies := listen.NewProxies(networks, slog.New(slog.NewTextHandler(p.log, nil)))
	lis := listen.NewPoolOf(100).Listen(proxies.Listen(raw), listen.ForAll(limits), nil)
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	work.Go(func() { proxies.Run(ctx) })
	work.Go(func() {
		for {
			c, err := lis.Accept()
			if err != nil {
				return
			}
			work.Go(func() { answer(c) })
		}
	})
	t.Cleanup(func() {
		cancel()
		lis.Close()
		work.Wait()
	})
	return p
}

func answer(c net.Conn) {
	defer c.Close()
	_ = c.SetReadDeadline(time.Now().Add(30 * time.Second))
	var got []byte
	for b := make([]byte, 1); ; {
		if _, err := c.Read(b); err != nil {
			return
		}
		if got = append(got, b[0]); b[0] == '.' {
			break
		}
	}
	_, _ = io.WriteString(c, c.RemoteAddr().String()+" "+string(got))
}

func (p *proxied) dial() net.Conn {
	p.t.Helper()
	c, err := net.Dial("tcp", p.address)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		p.t.Fatal(err)
	}
	return c
}

// send connects, sends data at once, and returns the answer; empty if the connection is
// closed without one.
func (p *proxied) send(data string) string {
	p.t.Helper()
	c := p.dial()
	_, _ = io.WriteString(c, data)
	answer, _ := io.ReadAll(c) // a reset ends it, too
	return strings.ReplaceAll(string(answer), c.LocalAddr().String(), "PEER")
}

// v2 returns a header of version 2.
func v2(t *testing.T, command proxyproto.ProtocolVersionAndCommand, from, to net.Addr, tlvs ...proxyproto.TLV) string {
	t.Helper()
	h := proxyproto.HeaderProxyFromAddrs(2, from, to)
	h.Command = command
	if err := h.SetTLVs(tlvs); err != nil {
		t.Fatal(err)
	}
	b, err := h.Format()
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

var loopback = netip.MustParsePrefix("127.0.0.0/8")

// TestProxyHeaders: a connection of a load balancer is its client's, whatever the header's
// version and the address family; without a valid header it is refused. A header of any
// other peer is data.
func TestProxyHeaders(t *testing.T) {
	t.Parallel()
	four := &net.TCPAddr{IP: net.IPv4(192, 0, 2, 7).To4(), Port: 4000}
	six := &net.TCPAddr{IP: net.ParseIP("2001:db8::7"), Port: 4000}
	four2, six2 := &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1).To4(), Port: 8081}, &net.TCPAddr{IP: net.ParseIP("2001:db8::1"), Port: 8081}
	unix := &net.UnixAddr{Net: "unix", Name: "/a"}
	large := proxyproto.TLV{Type: 0xE0, Value: make([]byte, 4000)}
	tooLarge := proxyproto.TLV{Type: 0xE0, Value: make([]byte, 5000)}
	const one = "PROXY TCP4 192.0.2.7 192.0.2.1 4000 8081\r\n"
	trusted := listenProxied(t, listen.Limits{}, netip.MustParsePrefix("2001:db8::/32"), loopback)
	other := listenProxied(t, listen.Limits{}, netip.MustParsePrefix("10.0.0.0/8"))
	for _, tt := range []struct{ name, send, want, untrusted string }{
		{"v1 TCP4", one + "hello.", "192.0.2.7:4000 hello.", "PEER PROXY TCP4 192."},
		{"v1 TCP6", "PROXY TCP6 2001:db8::7 2001:db8::1 4000 8081\r\nhello.", "[2001:db8::7]:4000 hello.", "PEER PROXY TCP6 2001:db8::7 2001:db8::1 4000 8081\r\nhello."},
		{"v1 UNKNOWN", "PROXY UNKNOWN\r\nhello.", "PEER hello.", "PEER PROXY UNKNOWN\r\nhello."},
		{"v2 TCP4", v2(t, proxyproto.PROXY, four, four2) + "hello.", "192.0.2.7:4000 hello.", "-"},
		{"v2 TCP6", v2(t, proxyproto.PROXY, six, six2) + "hello.", "[2001:db8::7]:4000 hello.", "-"},
		{"v2 with values", v2(t, proxyproto.PROXY, four, four2, large) + "hello.", "192.0.2.7:4000 hello.", "-"},
		{"v2 LOCAL", v2(t, proxyproto.LOCAL, four, four2) + "hello.", "PEER hello.", "-"},
		{"v2 of a socket", v2(t, proxyproto.PROXY, unix, unix) + "hello.", "", "-"},
		{"too large", v2(t, proxyproto.PROXY, four, four2, tooLarge) + "hello.", "", "-"},
		{"none", "hello.", "", "PEER hello."},
		{"almost", "PROXY hello.", "", "PEER PROXY hello."},
		{"v1 without end", "PROXY TCP4 " + strings.Repeat("1", 300) + ".", "", "-"},
		{"v1 twice", one + one + "hello.", "192.0.2.7:4000 PROXY TCP4 192.", "-"},
		{"garbage", "\r\n\r\n\x00\r\nQUIT\n\xff\xff.", "", "-"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if got := trusted.send(tt.send); got != tt.want {
				t.Errorf("of a load balancer: %q, want %q", got, tt.want)
			}
			if got := other.send(tt.send); tt.untrusted != "-" && got != tt.untrusted {
				t.Errorf("of another peer: %q, want %q", got, tt.untrusted)
			}
		})
	}
	t.Cleanup(func() {
		const want = `msg="connection of a load balancer without a valid PROXY protocol header refused" address=127.0.0.1:`
		if got := trusted.log.String(); strings.Count(got, want) != 1 { // rate limited
			t.Errorf("log of the load balancer:\n%s", got)
		}
		if got := other.log.String(); got != "" {
			t.Errorf("log of another peer:\n%s", got)
		}
	})
}

// TestProxyProbe: a load balancer that only connects is not logged.
func TestProxyProbe(t *testing.T) {
	t.Parallel()
	p := listenProxied(t, listen.Limits{}, loopback)
	c := p.dial()
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); len(got) > 0 || err != nil {
		t.Errorf("a connection without a byte gets %q, %v", got, err)
	}
	if got := p.log.String(); got != "" {
		t.Errorf("log:\n%s", got)
	}
}

// slowHeaders are the beginnings of headers.
var slowHeaders = []string{"", "P", "PROXY", "\r\n\r\n\x00\r\nQUIT\n\x21"}

// TestSlowProxyDelaysNobody: others are served while the headers of some connections do not
// come, or only in part.
func TestSlowProxyDelaysNobody(t *testing.T) {
	t.Parallel()
	p := listenProxied(t, listen.Limits{}, loopback)
	for _, start := range slowHeaders {
		if _, err := io.WriteString(p.dial(), start); err != nil {
			t.Fatal(err)
		}
	}
	for range 10 {
		if got := p.send("PROXY TCP4 192.0.2.7 192.0.2.1 4000 8081\r\nhello."); got != "192.0.2.7:4000 hello." {
			t.Errorf("beside slow ones: %q", got)
		}
	}
}

// TestSlowProxyHeaders: a connection of a load balancer whose header is not complete within
// five seconds is refused, and that is logged.
func TestSlowProxyHeaders(t *testing.T) {
	t.Parallel()
	for _, start := range slowHeaders {
		synctest.Test(t, func(t *testing.T) {
			n, log := newNetwork(), new(lockedBuffer)
			lis := listen.NewPoolOf(100).Listen(
				listen.NewProxies([]netip.Prefix{loopback}, slog.New(slog.NewTextHandler(log, nil))).Listen(n), listen.ForAll(listen.Limits{}), nil)
			defer lis.Close()
			c := n.dial(t, "127.0.0.1").say(start)
			time.Sleep(4900 * time.Millisecond)
			// The library refuses a header of version 1 that comes in parts at once.
			wantOpen(t, map[client]bool{c: start != "PROXY"})
			time.Sleep(200 * time.Millisecond)
			wantOpen(t, map[client]bool{c: false})
			if got := log.String(); !strings.Contains(got, "without a valid PROXY protocol header refused") {
				t.Errorf("%q: log:\n%s", start, got)
			}
		})
	}
}

// TestProxyClientsHaveTheirOwnLimits: the limits of a listener count the clients of a load
// balancer, not the balancer.
func TestProxyClientsHaveTheirOwnLimits(t *testing.T) {
	t.Parallel()
	p := listenProxied(t, listen.Limits{Handshakes: 1}, loopback)
	from := func(client string) (net.Conn, chan string) {
		c, answer := p.dial(), make(chan string, 1)
		if _, err := io.WriteString(c, "PROXY TCP4 "+client+" 192.0.2.1 4000 8081\r\nhello"); err != nil {
			t.Fatal(err)
		}
		go func() {
			all, _ := io.ReadAll(c)
			answer <- string(all)
		}()
		return c, answer
	}
	one, first := from("192.0.2.7")
	two, second := from("192.0.2.7")
	other, third := from("192.0.2.8")
	// One of the client's two is refused, whichever comes second.
	left, last := two, second
	var refused string
	select {
	case refused = <-first:
	case refused = <-second:
		left, last = one, first
	}
	if refused != "" {
		t.Errorf("a second handshake of a client gets %q", refused)
	}
	for _, c := range []net.Conn{left, other} {
		if _, err := io.WriteString(c, "."); err != nil {
			t.Error(err)
		}
	}
	if a, b := <-last, <-third; a != "192.0.2.7:4000 hello." || b != "192.0.2.8:4000 hello." {
		t.Errorf("the clients get %q and %q", a, b)
	}
}
