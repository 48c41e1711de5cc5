package workload

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/renewd/renewd/internal/agent/attest"
)

// peerCredentials identifies the process at the other end of each new
// connection. The socket has no TLS: the kernel identifies the caller (SPIFFE
// Workload Endpoint, section 4).
type peerCredentials struct{ s *Server }

var errTooManyConns = errors.New("too many open connections of this user")

// ServerHandshake identifies the caller's process and holds it until the connection
// is closed.
func (c peerCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	p, err := c.s.cfg.Peers(conn)
	if err != nil {
		if !errors.Is(err, attest.ErrGone) {
			c.s.cfg.Log.Warn("caller not identified", "error", err)
		}
		return nil, nil, err
	}
	if !c.s.conns.acquire(p.UID()) {
		c.s.logLimitExceeded(p, "connections", c.s.conns.limit)
		p.Close()
		return nil, nil, errTooManyConns
	}
	held := &peerConn{coalescingConn: coalescingConn{Conn: conn}, close: sync.OnceFunc(func() {
		c.s.conns.release(p.UID())
		p.Close()
	})}
	return held, peerInfo{peer: p, conn: held}, nil
}

// ClientHandshake fails: these credentials are for servers.
func (peerCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("not a client")
}

// Info names the protocol "unix".
func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix"}
}

// Clone returns c, which has no state of its own.
func (c peerCredentials) Clone() credentials.TransportCredentials { return c }

// OverrideServerName does nothing: these credentials are for servers.
func (peerCredentials) OverrideServerName(string) error { return nil }

// peerInfo carries the process to the handlers.
type peerInfo struct {
	credentials.CommonAuthInfo
	peer *attest.Peer
	conn *peerConn
}

func (peerInfo) AuthType() string { return "unix" }

func peerOf(ctx context.Context) (peerInfo, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return peerInfo{}, false
	}
	info, ok := p.AuthInfo.(peerInfo)
	return info, ok
}

func peerOfUnixConn(conn net.Conn) (*attest.Peer, error) {
	uc, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, fmt.Errorf("identify caller: %T is not a Unix socket connection", conn)
	}
	return attest.FromConn(uc)
}
