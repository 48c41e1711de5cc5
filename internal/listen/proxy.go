package listen

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/pires/go-proxyproto"

	"github.com/renewd/renewd/internal/loglimit"
)

// Proxies are the load balancers that begin each connection with a PROXY protocol header,
// version 1 or 2 (proxy-protocol.txt of HAProxy), so that the server can tell their clients apart.
// Make it with [NewProxies]. It is safe for concurrent use.
type Proxies struct {
	networks atomic.Pointer[[]netip.Prefix]
	lines    *loglimit.Log
}

// NewProxies returns the load balancers with addresses in these networks.
func NewProxies(networks []netip.Prefix, log *slog.Logger) *Proxies {
	p := &Proxies{lines: NewLog(log)}
	p.Set(networks)
	return p
}

// Set replaces the networks, for connections that are accepted later.
func (p *Proxies) Set(networks []netip.Prefix) {
	networks = slices.Clone(networks)
	p.networks.Store(&networks)
}

// Run writes delayed log lines until ctx is done.
func (p *Proxies) Run(ctx context.Context) { p.lines.Run(ctx) }

// Listen returns lis, whose connections from a load balancer have the client's address once
// their first byte was read. A read of one without a valid header fails. The header is
// read with the first byte, never by Accept, so a slow one delays no other connection; the
// deadline for the first byte is that of the header. Of any other peer no header is
// accepted: it is data, and no TLS handshake begins like that.
func (p *Proxies) Listen(lis net.Listener) net.Listener { return &proxied{lis, p} }

// proxied is a listener behind load balancers.
type proxied struct {
	net.Listener
	proxies *Proxies
}

// Accept implements net.Listener.
func (l *proxied) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil || !l.proxies.has(c.RemoteAddr()) {
		return c, err
	}
	return &proxiedConn{Conn: c, proxies: l.proxies}, nil
}

func (p *Proxies) has(address net.Addr) bool {
	tcp, ok := address.(*net.TCPAddr)
	if !ok {
		return false
	}
	ip := tcp.AddrPort().Addr().Unmap().WithZone("")
	return slices.ContainsFunc(*p.networks.Load(), func(n netip.Prefix) bool { return n.Contains(ip) })
}

// headerBuffer is enough for each usual header, and for the longest of version 1, which
// the library reads at once.
const headerBuffer = 256

// proxiedConn is a connection from a load balancer.
type proxiedConn struct {
	net.Conn
	proxies *Proxies
	once    sync.Once
	err     error         // of the header
	rest    *bufio.Reader // read with the header; nil when it was consumed
	client  atomic.Pointer[net.TCPAddr]
}

// Read implements net.Conn. The first call, which must have returned before the next,
// reads the header, too.
func (c *proxiedConn) Read(b []byte) (int, error) {
	if c.once.Do(c.header); c.err != nil {
		return 0, c.err
	}
	if c.rest == nil {
		return c.Conn.Read(b)
	}
	n, err := c.rest.Read(b)
	if c.rest.Buffered() == 0 {
		c.rest = nil
	}
	return n, err
}

// RemoteAddr implements net.Conn: the client's address after the header was read, and the
// load balancer's before that and for a connection of its own.
func (c *proxiedConn) RemoteAddr() net.Addr {
	if client := c.client.Load(); client != nil {
		return client
	}
	return c.Conn.RemoteAddr()
}

func (c *proxiedConn) header() {
	reader := bufio.NewReaderSize(c.Conn, headerBuffer)
	h, err := proxyproto.Read(reader)
	var client *net.TCPAddr
	if err == nil && !h.Command.IsLocal() {
		var ok bool
		if client, ok = h.SourceAddr.(*net.TCPAddr); !ok {
			err = errors.New("the header names no TCP client")
		}
	}
	if reader.Buffered() == 0 && errors.Is(err, proxyproto.ErrNoProxyProtocol) || errors.Is(err, net.ErrClosed) {
		c.err = io.EOF // closed without a byte, as by a probe of the port, or here
		return
	}
	if err != nil {
		c.err = fmt.Errorf("PROXY protocol header expected from a load balancer: %w", err)
		balancer := Client(c.Conn.RemoteAddr())
		c.proxies.lines.Note(slog.LevelWarn, "connection of a load balancer without a valid PROXY protocol header refused", Name(balancer),
			"address", c.Conn.RemoteAddr().String(), "error", err)
		return
	}
	if client != nil {
		c.client.Store(client)
	}
	if reader.Buffered() > 0 {
		c.rest = reader
	}
}
