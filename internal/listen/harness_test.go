package listen_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/renewd/renewd/internal/listen"
)

// network is a listener in memory, for clients at any address.
type network struct {
	conns chan net.Conn
	end   chan struct{}
	close func()
}

func newNetwork() *network {
	n := &network{conns: make(chan net.Conn), end: make(chan struct{})}
	n.close = sync.OnceFunc(func() { close(n.end) })
	return n
}

func (n *network) Accept() (net.Conn, error) {
	select {
	case c := <-n.conns:
		return c, nil
	case <-n.end:
		return nil, net.ErrClosed
	}
}

func (n *network) Close() error   { n.close(); return nil }
func (n *network) Addr() net.Addr { return &net.TCPAddr{} }

type accepted struct {
	net.Conn
	from net.Addr
}

func (a accepted) RemoteAddr() net.Addr { return a.from }

// client is the client's end of a connection.
type client struct {
	net.Conn
	t *testing.T
}

// dial connects from an IP address and waits until the bubble is idle.
func (n *network) dial(t *testing.T, ip string) client {
	t.Helper()
	near, far := net.Pipe()
	t.Cleanup(func() { near.Close() })
	n.conns <- accepted{far, &net.TCPAddr{IP: net.ParseIP(ip), Port: 40000}}
	synctest.Wait()
	return client{near, t}
}

// say writes a text, as far as the server reads it.
func (c client) say(text string) client {
	c.t.Helper()
	c.SetWriteDeadline(time.Now().Add(time.Millisecond))
	_, _ = io.WriteString(c, text)
	synctest.Wait()
	return c
}

// open reports whether the connection is still open.
func (c client) open() bool {
	c.SetReadDeadline(time.Now().Add(time.Millisecond))
	for {
		if _, err := c.Read(make([]byte, 1024)); err != nil {
			return errors.Is(err, os.ErrDeadlineExceeded)
		}
	}
}

// wantOpen fails the test unless each connection is open or closed as wanted.
func wantOpen(t *testing.T, want map[client]bool) {
	t.Helper()
	for c, open := range want {
		if c.open() != open {
			t.Errorf("a connection is open: %v, want %v", !open, open)
		}
	}
}

// refusals counts the connections that were refused, by client.
type refusals struct {
	mu sync.Mutex
	by map[string]int
}

func (r *refusals) count(from fmt.Stringer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.by == nil {
		r.by = make(map[string]int)
	}
	r.by[from.String()]++
}

// named are credentials by which a client sends its name, one letter; "-" is anonymous.
type named struct {
	credentials.TransportCredentials
}

type name struct {
	credentials.CommonAuthInfo
	letter string
}

func (name) AuthType() string { return "letter" }

func (named) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	letter := make([]byte, 1)
	if _, err := io.ReadFull(c, letter); err != nil {
		return nil, nil, err
	}
	return c, name{letter: strings.Trim(string(letter), "-")}, nil
}

func (named) Info() credentials.ProtocolInfo            { return credentials.ProtocolInfo{} }
func (n named) Clone() credentials.TransportCredentials { return n }

// reasons holds why connections were refused, in order.
type reasons struct {
	mu  sync.Mutex
	all []string
}

func (r *reasons) take() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.all
}

// serve runs a server without services on a network, with limits.
func serve(t *testing.T, limits listen.Limits, refused *reasons) *network {
	t.Helper()
	return serveOf(t, listen.NewPool(), limits, refused)
}

// serveOf is serve with the connections of a pool.
func serveOf(t *testing.T, p *listen.Pool, limits listen.Limits, refused *reasons) *network {
	t.Helper()
	n := newNetwork()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- listen.Serve(ctx, n, listen.Config{
			Credentials: named{}, Pool: p, Limits: listen.ForAll(limits), MaxRequest: 1 << 20, MaxStreams: 128,
			Identify: func(info credentials.AuthInfo) string { return info.(name).letter },
			Register: func(grpc.ServiceRegistrar) {},
			Refused: func(from netip.Prefix, _ string, reason error) {
				refused.mu.Lock()
				defer refused.mu.Unlock()
				refused.all = append(refused.all, fmt.Sprintf("%s: %v", from, reason))
			},
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return n
}
