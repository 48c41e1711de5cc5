package workload

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/renewd/renewd/internal/agent/attest"
)

// peerCredentials identifies the process at the other end of each new
// connection. There is no TLS on this socket: the kernel vouches for the
// caller (SPIFFE Workload Endpoint, section 4).
type peerCredentials struct{ s *Server }

var errTooManyConns = errors.New("the user has too many connections open")

// ServerHandshake holds the caller's process until the connection is closed.
func (c peerCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	p, err := c.s.cfg.Peers(conn)
	if err != nil {
		if !errors.Is(err, attest.ErrGone) {
			c.s.log.Warn("a caller could not be identified", slog.Any("error", err))
		}
		return nil, nil, err
	}
	if !c.s.conns.acquire(p.UID()) {
		c.s.warnBusy(p, "connections", c.s.conns.limit)
		p.Close()
		return nil, nil, errTooManyConns
	}
	held := &peerConn{joined: joined{Conn: conn}, close: sync.OnceFunc(func() {
		c.s.conns.release(p.UID())
		p.Close()
	})}
	return held, peerInfo{peer: p, conn: held}, nil
}

// ClientHandshake is for clients and never called.
func (peerCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("not a client")
}

// Info describes the protocol.
func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix"}
}

// Clone returns c, which has no state of its own.
func (c peerCredentials) Clone() credentials.TransportCredentials { return c }

// OverrideServerName is for clients.
func (peerCredentials) OverrideServerName(string) error { return nil }

// peerInfo carries the process to the handlers.
type peerInfo struct {
	credentials.CommonAuthInfo
	peer *attest.Peer
	conn *peerConn
}

func (peerInfo) AuthType() string { return "unix" }

func peerFrom(ctx context.Context) (*attest.Peer, bool) {
	info, ok := infoFrom(ctx)
	return info.peer, ok
}

func infoFrom(ctx context.Context) (peerInfo, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return peerInfo{}, false
	}
	info, ok := p.AuthInfo.(peerInfo)
	return info, ok
}

func unixPeer(conn net.Conn) (*attest.Peer, error) {
	uc, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, fmt.Errorf("identify the caller: %T is no connection of a Unix socket", conn)
	}
	return attest.FromConn(uc)
}
